"""Generation without a cache, in plain torch: the specification of the other loops."""

import torch

from gptfast.generation.request import MAX_BATCH, Request
from gptfast.generation.sequences import Sequences, Update
from gptfast.generation.snapshot import snapshot
from gptfast.model import GPT
from gptfast.ops.sampling import choose, draws, top_logprobs


class ReferenceLoop:
    """Computes the whole window of every sequence for each of its tokens.

    See sequences.GenerationLoop. Letters: n sequences, T time, V vocab_size.
    """

    def __init__(self, model: GPT, request: Request) -> None:
        self._model = snapshot(model, request.dtype)
        self._request = request
        self._sequences = Sequences(request, model.config.block_size)

    @torch.no_grad()
    def run(self, seconds: float) -> bool:
        """Generates one token for every sequence, however long that takes; see GenerationLoop."""
        most = self._request.max_batch or MAX_BATCH
        for group in self._by_window_length():
            for first in range(0, len(group), most):
                self._generate(group[first : first + most])
        return bool(self._sequences.running())

    def updates(self) -> list[Update]:
        """See sequences.GenerationLoop."""
        return self._sequences.updates()

    def _by_window_length(self) -> list[list[int]]:
        """Groups running sequences whose windows have the same length, the shortest first."""
        groups: dict[int, list[int]] = {}
        for i in self._sequences.running():
            groups.setdefault(len(self._window(i)), []).append(i)
        return [groups[length] for length in sorted(groups)]

    def _window(self, i: int) -> list[int]:
        """The tokens that the next one of a sequence is computed from."""
        text = self._request.prompts[i] + self._sequences.tokens[i]
        over = len(text) - self._model.config.block_size
        stride = self._request.stride or 1
        return text if over <= 0 else text[-(-over // stride) * stride :]

    def _generate(self, group: list[int]) -> None:
        """The next token of sequences whose windows have the same length."""
        request, sequences = self._request, self._sequences
        idx = torch.tensor([self._window(i) for i in group])  # (n, T)
        logits = self._model(idx.to(self._model.main_weight.device))[:, -1].float().cpu()  # (n, V)
        # The sum is NaN where a logit is or is +inf; a token whose logit is -inf is never drawn.
        for i, finite in zip(group, logits.logsumexp(-1).isfinite().tolist(), strict=True):
            if not finite:
                raise sequences.not_finite(i)
        uniforms = draws(
            torch.tensor([request.seeds[i] for i in group]),
            torch.tensor([request.sequence_ids[i] for i in group]),
            torch.tensor([len(sequences.tokens[i]) for i in group]),
        )
        seen = [request.prompts[i] + sequences.tokens[i] for i in group]
        tokens = choose(request.sampling, logits, seen, uniforms)[:, None]  # (n, 1)
        logprobs = logits.double().log_softmax(-1)
        likeliest = None
        if request.top_logprobs:
            likeliest = [[each] for each in top_logprobs(logprobs, request.top_logprobs)]
        own = logprobs.gather(1, tokens)
        sequences.extend(group, tokens.tolist(), own.tolist(), likeliest)
