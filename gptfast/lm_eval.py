"""gptfast as a model of lm-evaluation-harness (lm_eval). Requires the extra `eval`.

In Python:

    import lm_eval
    from gptfast.lm_eval import GptfastLM

    results = lm_eval.simple_evaluate(model=GptfastLM("runs/s"), tasks=["lambada_openai"])

The command `lm_eval` finds no models of other packages, so this module starts it (its own device,
where none is named, is a GPU):

    python -m gptfast.lm_eval --model gptfast --model_args path=runs/s --device cpu --tasks piqa
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gptfast
from gptfast.checks import as_number, is_iterable
from gptfast.errors import ConfigError, DataError, GptfastError
from gptfast.model import GPT
from gptfast.tokenizer import Tokenizer

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    _MISSING = "lm-evaluation-harness is missing: pip install 'gptfast-kernels[eval]'"
    if __name__ == "__main__":
        print(f"gptfast.lm_eval: {_MISSING}", file=sys.stderr)
        sys.exit(2)
    raise ConfigError(_MISSING) from None

DEFAULT_LENGTH = (
    256  # tokens of an answer where a task names no number, as for lm_eval's own models
)
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
LONGER = 8  # how many times as many tokens to compare next if the ones before were greedy


@register_model("gptfast")
class GptfastLM(LM):
    """A GPT for lm_eval's tasks. All requests of a task are one batch.

    Args:
        path: A run of `gptfast train`, or anything else that `gptfast.load` reads; or what it
            returned, a model with its tokenizer.
        device: The device for a model that is read.
        dtype: As for `gptfast.generate`.
        stride: How many tokens the window moves along a text whose perplexity is computed, see
            `gptfast.score`. None: block_size, as lm_eval's own models do it.
        prefix: The text before one that begins with nothing. None: the tokenizer's end-of-text
            token, or a line break where it has none.
        seed: The seed of sampled answers.
        batch_size: Has no effect, nor has the next one; lm_eval passes both.
        max_batch_size: See batch_size.

    Raises:
        ConfigError: The model has no tokenizer, or an option is wrong.
        CheckpointError: `path` cannot be read.
    """

    def __init__(
        self,
        path: str | Path | tuple[GPT, Tokenizer | None],
        *,
        device: str = "cpu",
        dtype: str | None = None,
        stride: int | None = None,
        prefix: str | None = None,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.model, tokenizer = path if isinstance(path, tuple) else gptfast.load(str(path), device)
        if tokenizer is None:
            raise ConfigError("the model has no tokenizer, which a task's texts need")
        self.tokenizer, self.prefix, self.dtype, self.seed = tokenizer, prefix, dtype, seed
        self.stride = self.model.config.block_size if stride is None else stride

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Scores continuations of contexts.

        A text that the window does not hold keeps its last block_size + 1 tokens, and all of the
        continuation.

        Args:
            requests: Those of lm_eval; `args` are context and continuation.

        Returns:
            Of each the log-probability, in nats, and whether greedy generation writes it.

        Raises:
            DataError: A continuation is empty, or a text has a character that the model does not
                know, whose probability is therefore unknown.
        """
        T, texts, counts = self.model.config.block_size, [], []
        for i, request in enumerate(requests):
            tokens, count = self._pair(i, *request.args)
            if count == 0:
                raise DataError(f"request {i}: the continuation is empty")
            texts.append(tokens[-max(T, count) - 1 :])
            counts.append(count)
        scores = gptfast.score(self.model, texts, stride=self.stride, dtype=self.dtype)
        sums = [math.fsum(s.logprobs[-count:]) for s, count in zip(scores, counts, strict=True)]
        return list(zip(sums, self._greedy(texts, counts), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Scores whole texts, in windows that move by `stride`, each after `prefix`.

        Args:
            requests: Those of lm_eval; `args` is the text.

        Returns:
            The log-probability, in nats, of each.
        """
        start = self._start() if requests else []
        texts = [start + self._encode(i, request.args[0]) for i, request in enumerate(requests)]
        scores = gptfast.score(self.model, texts, stride=self.stride, dtype=self.dtype)
        return [math.fsum(each.logprobs[len(start) - 1 :]) for each in scores]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Generates answers. One that outgrows the window goes on: see `overflow` of `generate`.

        Args:
            requests: Those of lm_eval; `args` are a context and options: `until`, `max_gen_toks` or
                another of LENGTHS, `do_sample` and those of SAMPLING.

        Returns:
            The texts, without the stop that ended them.

        Raises:
            ConfigError: There is no such option.
        """
        groups: dict[str, list[int]] = {}  # of equal options
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        answers = [""] * len(requests)
        for group in groups.values():
            prompts = [self._encode(i, requests[i].args[0]) or self._start() for i in group]
            options = generation_options(requests[group[0]].args[1])
            found = self._generate(prompts, tokenizer=self.tokenizer, seed=self.seed, **options)
            for i, result in zip(group, found, strict=True):
                answers[i] = result.text or ""
        return answers

    def _generate(self, prompts: list[list[int]], **options: Any) -> list[gptfast.Generation]:
        found = gptfast.generate(self.model, prompts, dtype=self.dtype, **options)
        if any(each.finish_reason == "interrupted" for each in found):
            raise KeyboardInterrupt
        return found

    def _greedy(self, texts: list[list[int]], counts: list[int]) -> list[bool]:
        """Whether greedy generation writes the last tokens of each text, `counts` of them.

        Most differ in the first token, so one token is generated after every different context,
        then more for those that go on.
        """
        greedy, remaining, length = [True] * len(texts), list(range(len(texts))), 1
        while remaining:
            length = min(length, max(counts[i] for i in remaining))
            contexts = {i: tuple(texts[i][: -counts[i]]) for i in remaining}
            prompts = list(dict.fromkeys(contexts.values()))
            options: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": length}
            found = self._generate([list(each) for each in prompts], **options)
            written = {each: result.tokens for each, result in zip(prompts, found, strict=True)}
            for i in remaining:
                wanted = texts[i][-counts[i] :][:length]
                greedy[i] = written[contexts[i]][: len(wanted)] == wanted
            remaining = [i for i in remaining if greedy[i] and counts[i] > length]
            length *= LONGER
        return greedy

    def _pair(self, i: int, context: str, continuation: str) -> tuple[list[int], int]:
        """Encodes both as one text; returns how many of its tokens are the continuation's.

        White space at the end of a context goes to the continuation, as lm_eval does it, where
        tokens hold words with the space before them. Where a token of the whole text would reach
        across the boundary, the parts are encoded each by itself.
        """
        if self.tokenizer.unit != "character":
            end = len(context.rstrip())
            context, continuation = context[:end], context[end:] + continuation
        before, whole = self._encode(i, context), self._encode(i, context + continuation)
        if whole[: len(before)] != before:
            whole = before + self._encode(i, continuation)
        return whole if before else self._start() + whole, len(whole) - len(before)

    def _start(self) -> list[int]:
        """The tokens before a text that begins with nothing."""
        end = self.tokenizer.end_of_text
        if self.prefix is None and end is not None:
            return [end]
        try:
            tokens = self.tokenizer.encode("\n" if self.prefix is None else self.prefix)
        except DataError as error:
            raise ConfigError(f"give a text for others to begin after (prefix): {error}") from None
        if not tokens:
            raise ConfigError("prefix must have at least one token, got ''")
        return tokens

    def _encode(self, i: int, text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text)
        except DataError as error:
            raise DataError(f"request {i}: {error}") from None


def generation_options(task: Mapping[str, Any]) -> dict[str, Any]:
    """Translates a task's options to options of `gptfast.generate`.

    Raises:
        ConfigError: There is no such option.
    """
    given = {name: value for name, value in task.items() if value is not None}
    until = given.pop("until", [])
    listed = [until] if isinstance(until, str) or not is_iterable(until) else [*until]
    if not all(isinstance(each, str) for each in listed):
        raise ConfigError(f"until must be a text or a list of texts, got {until!r}")
    stop = [each for each in listed if each]
    lengths = [given.pop(name) for name in LENGTHS if name in given]
    temperature = as_number(given.get("temperature", 0.0))
    if temperature is None:
        raise ConfigError(f"temperature must be a number, got {task['temperature']!r}")
    drawn = given.pop("do_sample", temperature > 0.0)
    if given.pop("num_beams", 1) != 1:
        raise ConfigError(f"num_beams must be 1, got {task['num_beams']!r}")
    for name in given:
        if name not in SAMPLING:
            known = ", ".join(("until", *LENGTHS, "do_sample", *SAMPLING))
            raise ConfigError(f"there is no option {name!r} of generation; there are {known}")
    if not drawn:
        given["temperature"] = 0.0
    return {"max_new_tokens": lengths[0] if lengths else DEFAULT_LENGTH, "stop": stop} | given


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except GptfastError as error:
        print(f"gptfast: {error}", file=sys.stderr)
        sys.exit(2)
