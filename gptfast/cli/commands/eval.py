"""`gptfast eval`."""

import math
from dataclasses import dataclass
from typing import Literal

from gptfast.cli.options import ComputeOptions, File, Run, load_text_model, use_threads


@dataclass(frozen=True)
class Eval:
    """Measure a model on a text: loss, perplexity and bits per character."""

    run_path: Run  # a run of `gptfast train`, or any checkpoint directory
    compute: ComputeOptions
    data: File = None  # UTF-8 text; None: what the run held out of its own text
    # error: refuse a character that the model does not know; skip: leave it out of the text
    unknown: Literal["error", "skip"] = "error"

    def run(self) -> int:
        """Prints the numbers."""
        from gptfast.data import read_text
        from gptfast.training import evaluate, held_out

        use_threads(self.compute.threads)
        model, tokenizer = load_text_model(self.run_path, self.compute)
        skipped = 0
        if self.data is None:
            ids = held_out(self.run_path)  # (N,)
        else:
            text = read_text(self.data)
            ids = tokenizer.encode_tensor(text, self.unknown)  # (N,)
            skipped = len(text) - len(ids)
        result = evaluate(model, ids)
        print(f"loss        {result.loss:.4f} nats per character")
        print(f"perplexity  {result.perplexity:.4f}")
        print(f"bits        {result.loss / math.log(2):.4f} per character")
        print(f"characters  {result.tokens:,}")
        if skipped:
            print(f"skipped     {skipped:,} characters that the vocabulary lacks")
        return 0
