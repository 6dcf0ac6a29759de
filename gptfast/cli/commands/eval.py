"""`gptfast eval`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gptfast.cli.options import (
    ComputeOptions,
    Count,
    Run,
    TextOrTokens,
    bar,
    load_text_model,
    use_threads,
)

if TYPE_CHECKING:
    from torch import Tensor

    from gptfast.tokenizer import Tokenizer
    from gptfast.training import Evaluation


@dataclass(frozen=True)
class Eval:
    """Measure a model on a text: loss, perplexity, bits per character and per byte."""

    run_path: Run  # a run of `gptfast train`, a folder of Hugging Face or nanoGPT, or hf:OWNER/NAME
    compute: ComputeOptions
    # UTF-8 text, or a folder by `gptfast data prepare`; None: what the run held out of its own text
    data: TextOrTokens = None
    # error: refuse a character that the model does not know; skip: leave it out of the text
    unknown: Literal["error", "skip"] = "error"
    # how many tokens the window moves along the text. A model sees block_size tokens at once. None:
    # windows side by side, so the first tokens of each are predicted from few. With N, every token
    # past the first window is predicted from at least block_size - N + 1 tokens before it: the loss
    # is lower, and the work block_size / N times as much
    stride: Count = None

    def run(self) -> int:
        """Prints the numbers."""
        from gptfast.training import evaluate
        from gptfast.training.training import held_out_tokens

        use_threads(self.compute.threads)
        # Before the model, which may have to be fetched: its text may be unknown.
        ids = held_out_tokens(self.run_path) if self.data is None else None  # (N,)
        model, tokenizer = load_text_model(self.run_path, self.compute)
        skipped = 0
        if ids is None:
            ids, skipped = self._tokens(tokenizer)
        with bar("evaluating", max(0, len(ids) - 1)) as scored:
            result = evaluate(model, ids, stride=self.stride, tokenizer=tokenizer, scored=scored)
        for line in _lines(result, tokenizer.unit):
            print(line)
        print(f"window      {_window(model.config.block_size, self.stride)}")
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


def _lines(result: "Evaluation", unit: str) -> list[str]:
    size = result.size
    assert size is not None  # the tokenizer is known
    bits = {"token": result.bits_per_token} if unit == "token" else {}
    known = {"character": result.bits_per_character, "byte": result.bits_per_byte}
    bits |= {name: value for name, value in known.items() if value is not None}
    lines = [
        f"loss        {result.loss:.4f} nats per {unit}",
        f"perplexity  {result.perplexity:.4f}",
        *(f"bits        {value:.4f} per {name}" for name, value in bits.items()),
        f"tokens      {result.tokens:,}",
        f"characters  {size.characters:,}",
        f"bytes       {size.utf8_bytes:,}",
    ]
    if size.endings:
        lines.append(f"endings     {size.endings:,} tokens that end a text, and write no byte")
    return lines


def _window(block_size: int, stride: int | None) -> str:
    if stride is None:
        return f"{block_size:,} tokens, disjoint"
    least = block_size - stride + 1
    return f"{block_size:,} tokens, stride {stride:,}: past the first, each sees {least:,} or more"
