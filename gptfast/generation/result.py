"""What was generated, and how it is shown."""

import codecs
import math
import reprlib
from dataclasses import dataclass, field
from typing import Literal

from gptfast import markup

FinishReason = Literal["length", "stop", "end", "window", "interrupted"]
TEXT_SHOWN = 200  # characters, in a repr
SURPRISING = 8.0  # bits of a token with the strongest background

_short = reprlib.Repr()
_short.maxstring = TEXT_SHOWN


@dataclass
class Generation:
    """What was generated for one prompt, without the prompt and without the stop that ended it.

    A text that ends within a character ends with U+FFFD. Where a stop string begins within a token,
    that token is the last one, and the text ends before the stop.

    A notebook shows the text, the less probable a token the stronger its background, with its
    probability under the pointer. `IPython.display.display(*results)` shows several.
    """

    text: str | None  # None without a tokenizer
    tokens: list[int]
    logprobs: list[float]  # of each token, in nats, before penalty, temperature and filters
    # "end": the tokenizer's end of a text came; "window": it is full, and overflow="stop"
    finish_reason: FinishReason
    # per token, the likeliest tokens and their log-probabilities; empty with logprobs=0
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # What each token writes; None without a tokenizer, and where `generate` did not make this.
        # No field, because it follows from the others: it is not compared, stored or shown.
        self.pieces: list[bytes] | None = None

    def __repr__(self) -> str:
        tokens = f"{_short.repr(self.tokens)} of {len(self.tokens)}"
        logprob = math.fsum(self.logprobs)
        return (
            f"Generation(text={_short.repr(self.text)}, finish_reason={self.finish_reason!r},"
            f" tokens={tokens}, logprob={logprob:.4f})"
        )

    def _repr_html_(self) -> str:
        facts = (
            f"{len(self.tokens):,} tokens, log-probability {math.fsum(self.logprobs):.2f} nats,"
            f" finish reason: {self.finish_reason}; marked is what was improbable"
        )
        return markup.section(facts, markup.preformatted(self._marked_text()))

    def _marked_text(self) -> str:
        """The text as HTML; of a Generation that `generate` did not make, without backgrounds."""
        if self.pieces is None and self.text is not None:
            return markup.escaped(self.text)
        texts = [f"{token} " for token in self.tokens]
        if self.pieces is not None:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            last = len(self.pieces) - 1
            texts = [decoder.decode(piece, i == last) for i, piece in enumerate(self.pieces)]
        shown = []
        for text, token, logprob in zip(texts, self.tokens, self.logprobs, strict=True):
            note = f"{text!r}: probability {math.exp(logprob):.4f} ({logprob:.2f} nats), id {token}"
            shown.append(markup.marked(text, note, -logprob / math.log(2) / SURPRISING))
        return "".join(shown)
