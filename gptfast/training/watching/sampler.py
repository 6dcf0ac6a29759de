"""Samples while training: what the model writes, at each evaluation."""

import json
from typing import TYPE_CHECKING

from gptfast.console import say
from gptfast.errors import ConfigError, reason
from gptfast.files import write_atomic
from gptfast.generation import generate
from gptfast.tokenizer import Tokenizer
from gptfast.training.callbacks import Callback
from gptfast.training.run import SAMPLES_NAME
from gptfast.training.state import Row

if TYPE_CHECKING:
    from gptfast.training.loop import Loop


class Sampler(Callback):
    """Continues a text at each evaluation; `TrainConfig.sample` makes one.

    The continuations go to `samples.jsonl` in the run's directory, one JSON object per evaluation
    with `step`, `prompt` and `text`. All are drawn with the same seed, so that they differ by what
    the model has learned; the draws have a generator of their own and do not change the run.

    Args:
        prompt: The text to continue.
        tokenizer: The run's.
        shown: Whether to print the continuations on stderr, too.
        max_new_tokens: Tokens to generate.
        temperature: Divides the logits.
        seed: The seed of the draws.

    Raises:
        ConfigError: There is no tokenizer.
        DataError: The tokenizer lacks a character of the prompt.
    """

    def __init__(
        self,
        prompt: str,
        tokenizer: Tokenizer | None,
        *,
        shown: bool = True,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        seed: int = 0,
    ) -> None:
        if tokenizer is None:
            raise ConfigError("a sample while training needs a tokenizer, got none")
        tokenizer.encode(prompt)
        self.prompt, self.tokenizer, self.shown = prompt, tokenizer, shown
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed

    def on_start(self, run: "Loop") -> None:
        """Drops the samples of steps that are trained again, after a crash between two saves."""
        if run.path is None or not (run.path / SAMPLES_NAME).exists():
            return
        lines = (run.path / SAMPLES_NAME).read_bytes().splitlines(keepends=True)
        kept = b"".join(line for line in lines if _step(line) <= run.state.step)
        write_atomic({run.path / SAMPLES_NAME: kept})

    def on_evaluation(self, run: "Loop", row: Row) -> None:
        """Continues the text, shows and keeps the result."""
        [result] = generate(
            run.model,
            [self.prompt],
            tokenizer=self.tokenizer,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
        )
        if result.finish_reason == "interrupted":  # a second Ctrl-C, see `first_interrupt`
            raise KeyboardInterrupt
        if self.shown:
            say(f"--- a sample of step {row['step']}:\n{self.prompt}{result.text}\n---")
        if run.path is not None:
            line = {"step": row["step"], "prompt": self.prompt, "text": result.text}
            try:
                # Of half a surrogate pair, which UTF-8 has not, this writes JSON's escape.
                text = json.dumps(line, ensure_ascii=False) + "\n"
                with open(run.path / SAMPLES_NAME, "ab") as file:
                    file.write(text.encode("utf-8", "backslashreplace"))
            except OSError as error:
                run.warn(f"{run.path / SAMPLES_NAME}: cannot be written ({reason(error)})")


def _step(line: bytes) -> float:
    """The step of a line; infinity where a crash left half of it."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
