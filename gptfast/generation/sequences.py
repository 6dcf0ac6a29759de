"""The sequences of a request while a loop generates them: how they grow and end, what is new.

A loop says how a token is computed, and these rules hold for all of them. The compiled engine has
the same rules in csrc/engine/session.cpp.
"""

import functools
from typing import Any, NamedTuple, Protocol

from gptfast.errors import DataError
from gptfast.generation.request import Request, not_finite

TopLogprobs = list[tuple[int, float]]  # the likeliest tokens and their log-probabilities


class Update(NamedTuple):
    """What is new of one sequence; tokens that write a stop string are included."""

    sequence: int  # its place in the request
    state: str  # waiting, running, or why it ended: length, stop, end, window, invalid (an error)
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]


class GenerationLoop(Protocol):
    """What generates the sequences of a request."""

    def run(self, seconds: float) -> bool:
        """Generates for about `seconds`, one step at least; returns whether there is more to do."""
        ...

    def updates(self) -> list[Update]:
        """Returns what is new since the last call; the first call returns every sequence."""
        ...


class Sequences:
    """What has been generated after each prompt; sequences are known by their place i in a request.

    There may be thousands, and a step may take some microseconds, so each has an item in several
    lists, not an object.
    """

    def __init__(self, request: Request, block_size: int) -> None:
        self._request = request
        count, most = len(request.prompts), request.max_new_tokens
        self.limits = [most] * count  # how many tokens may follow each prompt
        self.states = ["running" if most > 0 else "length"] * count  # as in Update
        if most > 0 and request.stride is None:
            for i, prompt in enumerate(request.prompts):
                self.limits[i] = min(most, max(0, block_size + 1 - len(prompt)))
                if self.limits[i] == 0:
                    self.states[i] = "window"
        nothing: list[Any] = []  # shared by all that have not begun; nobody appends to it

        def empty() -> list[list[Any]]:
            return [nothing if state == "running" else [] for state in self.states]

        self.tokens: list[list[int]] = empty()
        self.logprobs: list[list[float]] = empty()  # of these tokens
        self._top_logprobs: list[list[TopLogprobs]] = []
        if request.top_logprobs:
            self._top_logprobs = [[] for _ in range(count)]
        # States and lengths as last reported; empty before the first time, None after the last.
        self._reported: list[tuple[str, int]] | None = []
        end = [] if request.end_token is None else [request.end_token]
        self.stop_tokens = [*request.stop_tokens, *end]  # none of which becomes part of a text
        self._reach = max(map(len, request.stop_strings), default=1) - 1
        self._tails = [b""] * count if self._reach else []  # ends of texts that may begin a stop

    def running(self) -> list[int]:
        """Lists the sequences that need another token."""
        return [i for i, state in enumerate(self.states) if state == "running"]

    def extend(
        self,
        sequences: list[int],
        tokens: list[list[int]],
        logprobs: list[list[float]],
        top_logprobs: list[list[TopLogprobs]] | None = None,
        suspects: list[int] | None = None,
    ) -> None:
        """Appends to running sequences what was drawn for each, up to the sequence's end.

        Args:
            sequences: Which ones.
            tokens: The tokens of each, no more than its limit allows. The sequences keep these
                lists and those of the next argument as their own.
            logprobs: Of these tokens.
            top_logprobs: Of the same positions, if the request wants them.
            suspects: Places in these lists where a stop may be among the tokens; all if None.
        """
        request, limits = self._request, self.limits
        stops: list[str | None] = [None] * len(sequences)
        if self.stop_tokens or request.stop_strings:
            for n in range(len(sequences)) if suspects is None else suspects:
                length, stops[n] = self._find_stop(sequences[n], tokens[n])
                tokens[n], logprobs[n] = tokens[n][:length], logprobs[n][:length]
        if top_logprobs is not None:
            for i, likeliest, new in zip(sequences, top_logprobs, tokens, strict=True):
                self._top_logprobs[i] += likeliest[: len(new)]
        # Ctrl-C may come at any point; `updates` counts tokens, so these come last.
        _grow(self.logprobs, sequences, logprobs)
        _grow(self.tokens, sequences, tokens)
        for i, state in zip(sequences, stops, strict=True):
            if state is not None:
                self.states[i] = state
            elif len(self.tokens[i]) == limits[i]:
                self.states[i] = "length" if limits[i] == request.max_new_tokens else "window"

    def _find_stop(self, i: int, tokens: list[int]) -> tuple[int, str | None]:
        """Returns how many of the new tokens of a sequence stay, and its state if one is a stop.

        A stop token goes; the tokens that write a stop string stay.
        """
        request = self._request
        places = [tokens.index(stop) for stop in self.stop_tokens if stop in tokens]
        end, state = len(tokens), None
        if places:
            end = min(places)
            state = "end" if tokens[end] == request.end_token else "stop"
        if request.pieces is None or not request.stop_strings:
            return end, state
        pieces = [request.pieces[token] for token in tokens[:end]]
        tail = self._tails[i] if self._reach else b""
        text = tail + b"".join(pieces)
        found = ((text.find(stop), len(stop)) for stop in request.stop_strings)
        stop_ends = [start + length for start, length in found if start >= 0]
        if not stop_ends:
            if self._reach:
                self._tails[i] = text[-self._reach :]
            return end, state
        written = len(tail)
        for count, piece in enumerate(pieces, start=1):
            written += len(piece)
            if written >= min(stop_ends):
                return count, "stop"
        raise AssertionError("a stop string ends within the text")

    def not_finite(self, i: int) -> DataError:
        """Makes the error that the model's logits after a sequence are not finite."""
        return not_finite("prompt", i // self._request.num_samples)

    def updates(self) -> list[Update]:
        """See GenerationLoop. Lists of sequences that have ended are handed over, not copied."""
        before, states, tokens = self._reported, self.states, self.tokens
        if before is None:
            return []
        likeliest = self._top_logprobs or [[] for _ in states]
        if not before and "running" not in states:
            self._reported = None
            parts = zip(range(len(states)), states, tokens, self.logprobs, likeliest, strict=True)
            return [*map(_made, parts)]
        self._reported = [*zip(states, map(len, tokens), strict=True)]
        found = []
        for i, (state, end) in enumerate(self._reported):
            last, start = before[i] if before else ("", 0)
            if (last, start) != (state, end):
                new = slice(start, end)
                own = tokens[i][new], self.logprobs[i][new], likeliest[i][new]
                found.append(Update(i, state, *own))
        return found


# Makes an Update of an iterable as Update._make does, in a fifth of the time.
_made: Any = functools.partial(tuple.__new__, Update)


def _grow(lists: list[list[Any]], places: list[int], new: list[list[Any]]) -> None:
    """Appends to the lists at some places; an empty list is replaced by the new one."""
    for i, more in zip(places, new, strict=True):
        own = lists[i]
        if own:
            own += more
        else:
            lists[i] = more
