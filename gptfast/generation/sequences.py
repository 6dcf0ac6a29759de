"""The sequences of a request while a loop generates them: their windows, how they end, what is new.

A loop says how a token is computed, and these rules hold for all of them. The compiled engine has
the same rules in csrc/engine/session.cpp.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from gptfast.errors import DataError
from gptfast.generation.request import Request, not_finite

TopLogprobs = list[tuple[int, float]]  # the likeliest tokens and their log-probabilities


@dataclass
class Update:
    """What is new of one sequence; tokens that write a stop string are included."""

    sequence: int  # its place in the request
    state: str  # waiting, running, or why it ended: length, stop, window, invalid (an error)
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]


class Loop(Protocol):
    """What generates the sequences of a request."""

    def run(self, seconds: float) -> bool:
        """Generates for about `seconds`, one step at least; returns whether there is more to do."""
        ...

    def updates(self) -> list[Update]:
        """Returns what is new since the last call; the first call returns every sequence."""
        ...


@dataclass
class Sequence:
    """A prompt and what has been generated after it."""

    index: int  # its place in the request
    tokens: list[int]  # the prompt's first
    prompt_length: int
    seed: int
    sequence_id: int
    state: str  # as in Update
    offset: int = 0  # where its window starts
    logprobs: list[float] = field(default_factory=list)  # of the generated tokens
    top_logprobs: list[TopLogprobs] = field(default_factory=list)

    @property
    def generated_length(self) -> int:
        """How many tokens follow the prompt."""
        return len(self.tokens) - self.prompt_length

    @property
    def window(self) -> list[int]:
        """The tokens that the next one is computed from."""
        return self.tokens[self.offset :]

    @property
    def window_length(self) -> int:
        """How many tokens the window has."""
        return len(self.tokens) - self.offset


class Sequences:
    """All sequences of a request."""

    def __init__(self, request: Request, block_size: int) -> None:
        self._request, self._block_size = request, block_size
        state = "running" if request.max_new_tokens > 0 else "length"
        draws = zip(request.prompts, request.seeds, request.sequence_ids, strict=True)
        self._all = [
            Sequence(i, list(prompt), len(prompt), seed, sequence_id, state)
            for i, (prompt, seed, sequence_id) in enumerate(draws)
        ]
        self._reported: dict[int, tuple[int, str]] = {}  # generated length and state, by index

    def running(self) -> list[Sequence]:
        """The sequences that need another token."""
        return [each for each in self._all if each.state == "running"]

    def slide_windows(self) -> None:
        """Moves the window of every sequence that has outgrown it, or ends the sequence there."""
        for each in self.running():
            over = each.window_length - self._block_size
            if over <= 0:
                continue
            stride = self._request.stride
            if stride is None:
                each.state = "window"
            else:
                each.offset += -(-over // stride) * stride

    def append(
        self, sequence: Sequence, token: int, logprob: float, top_logprobs: TopLogprobs
    ) -> None:
        """Appends a token to a sequence, and ends the sequence where the token does."""
        request = self._request
        if token in request.stop_tokens:
            sequence.state = "stop"
            return
        sequence.logprobs.append(logprob)
        if request.top_logprobs:
            sequence.top_logprobs.append(top_logprobs)
        # Ctrl-C may come between two appends; `updates` counts tokens, so these come last.
        sequence.tokens.append(token)
        if self._has_stop_string(sequence):
            sequence.state = "stop"
        elif sequence.generated_length == request.max_new_tokens:
            sequence.state = "length"

    def extend(self, sequence: Sequence, tokens: list[int], logprobs: list[float]) -> None:
        """Appends tokens to a running sequence until it ends, and drops those after its end."""
        request = self._request
        if request.stop_tokens or request.stop_strings:
            for token, logprob in zip(tokens, logprobs, strict=True):
                if sequence.state == "running":
                    self.append(sequence, token, logprob, [])
            return
        room = request.max_new_tokens - sequence.generated_length
        sequence.logprobs += logprobs[:room]
        sequence.tokens += tokens[:room]  # last, as in `append`
        if room <= len(tokens):
            sequence.state = "length"

    def not_finite(self, sequence: Sequence) -> DataError:
        """Makes the error that the model's logits after this sequence are not finite."""
        return not_finite("prompt", sequence.index // self._request.num_samples)

    def updates(self) -> list[Update]:
        """See Loop."""
        found = []
        for each in self._all:
            start, state = self._reported.get(each.index, (0, None))
            end, prompt = each.generated_length, each.prompt_length
            if (start, state) == (end, each.state):
                continue
            self._reported[each.index] = end, each.state
            tokens = each.tokens[prompt + start : prompt + end]
            logprobs, top_logprobs = each.logprobs[start:end], each.top_logprobs[start:end]
            found.append(Update(each.index, each.state, tokens, logprobs, top_logprobs))
        return found

    def _has_stop_string(self, sequence: Sequence) -> bool:
        request = self._request
        if not request.stop_strings or request.pieces is None:
            return False
        text = "".join(request.pieces[token] for token in sequence.tokens[sequence.prompt_length :])
        return any(stop in text for stop in request.stop_strings)


def by_window_length(sequences: Iterable[Sequence]) -> list[list[Sequence]]:
    """Groups sequences whose windows have the same length, the shortest first."""
    groups: dict[int, list[Sequence]] = {}
    for each in sequences:
        groups.setdefault(each.window_length, []).append(each)
    return [groups[length] for length in sorted(groups)]
