"""`gptfast eval`."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gptfast.cli.options import ComputeOptions, Run, TextOrTokens, load_text_model, use_threads

if TYPE_CHECKING:
    from torch import Tensor

    from gptfast.tokenizer import Tokenizer


@dataclass(frozen=True)
class Eval:
    """Measure a model on a text: loss, perplexity, bits per character and per byte."""

    run_path: Run  # a run of `gptfast train`, a folder of Hugging Face or nanoGPT, or hf:OWNER/NAME
    compute: ComputeOptions
    # UTF-8 text, or a folder by `gptfast data prepare`; None: what the run held out of its own text
    data: TextOrTokens = None
    # error: refuse a character that the model does not know; skip: leave it out of the text
    unknown: Literal["error", "skip"] = "error"

    def run(self) -> int:
        """Prints the numbers."""
        from gptfast.tokenizer import text_size
        from gptfast.training import evaluate
        from gptfast.training.training import held_out_tokens

        use_threads(self.compute.threads)
        model, tokenizer = load_text_model(self.run_path, self.compute)
        skipped = 0
        if self.data is None:
            ids = held_out_tokens(self.run_path)  # (N,)
        else:
            ids, skipped = self._tokens(tokenizer)
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

    def _tokens(self, tokenizer: "Tokenizer") -> "tuple[Tensor, int]":
        """Reads `data`: its tokens, and how many characters the vocabulary lacks."""
        from gptfast.tokenizer import text_size
        from gptfast.training.source import source_of_text

        source = source_of_text(None, None, self.data)
        ids = source.ids(tokenizer, self.unknown)
        if self.unknown == "error" or source.blocks is None:
            return ids, 0
        return ids, sum(map(len, source.blocks())) - text_size(tokenizer, ids).characters
