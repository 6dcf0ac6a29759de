"""`gptfast eval`."""

import math
from dataclasses import dataclass
from typing import Literal

from gptfast.cli.options import ComputeOptions, File, Run, load_text_model, use_threads


@dataclass(frozen=True)
class Eval:
    """Measure a model on a text: loss, perplexity, bits per character and per byte."""

    run_path: Run  # a run of `gptfast train`, or any checkpoint directory
    compute: ComputeOptions
    data: File = None  # UTF-8 text; None: what the run held out of its own text
    # error: refuse a character that the model does not know; skip: leave it out of the text
    unknown: Literal["error", "skip"] = "error"

    def run(self) -> int:
        """Prints the numbers."""
        from gptfast.data import read_text
        from gptfast.tokenizer import text_size
        from gptfast.training import evaluate, held_out

        use_threads(self.compute.threads)
        model, tokenizer = load_text_model(self.run_path, self.compute)
        skipped = 0
        if self.data is None:
            ids = held_out(self.run_path)  # (N,)
        else:
            text = read_text(self.data)
            ids = tokenizer.encode_tensor(text, self.unknown)  # (N,)
            skipped = len(text) - text_size(tokenizer, ids).characters
        result = evaluate(model, ids)
        size = text_size(tokenizer, ids[1:])
        bits = result.loss / math.log(2) * result.tokens
        print(f"loss        {result.loss:.4f} nats per {tokenizer.unit}")
        print(f"perplexity  {result.perplexity:.4f}")
        for unit, count in (("character", size.characters), ("byte", size.utf8_bytes)):
            if count:
                print(f"bits        {bits / count:.4f} per {unit}")
        if tokenizer.unit == "token":
            print(f"tokens      {result.tokens:,}")
        print(f"characters  {size.characters:,}")
        if skipped:
            print(f"skipped     {skipped:,} characters that the vocabulary lacks")
        return 0
