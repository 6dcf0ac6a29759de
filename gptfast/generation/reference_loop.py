"""Generation without a cache, in plain torch: the specification of the other loops."""

import torch

from gptfast.generation.request import Request
from gptfast.generation.sequences import Sequence, Sequences, Update, by_window_length
from gptfast.generation.snapshot import snapshot
from gptfast.model import GPT
from gptfast.ops.sampling import choose, draws, top_logprobs


class ReferenceLoop:
    """Computes the whole window of every sequence for each of its tokens; see sequences.Loop.

    Letters: n sequences, T time, V vocab_size.
    """

    def __init__(self, model: GPT, request: Request) -> None:
        self._model = snapshot(model, request.dtype)
        self._request = request
        self._sequences = Sequences(request, model.config.block_size)

    @torch.no_grad()
    def run(self, seconds: float) -> bool:
        """Generates one token for every sequence, however long that takes; see sequences.Loop."""
        self._sequences.slide_windows()
        most = self._request.max_batch
        for group in by_window_length(self._sequences.running()):
            for first in range(0, len(group), most):
                self._generate(group[first : first + most])
        return bool(self._sequences.running())

    def updates(self) -> list[Update]:
        """See sequences.Loop."""
        return self._sequences.updates()

    def _generate(self, group: list[Sequence]) -> None:
        """The next token of sequences whose windows have the same length."""
        idx = torch.tensor([each.window for each in group])  # (n, T)
        logits = self._model(idx.to(self._model.main_weight.device))[:, -1].float().cpu()  # (n, V)
        for each, finite in zip(group, logits.isfinite().all(-1).tolist(), strict=True):
            if not finite:
                raise self._sequences.not_finite(each)
        uniforms = draws(
            torch.tensor([each.seed for each in group]),
            torch.tensor([each.sequence_id for each in group]),
            torch.tensor([each.generated_length for each in group]),
        )
        seen = [each.tokens for each in group]
        tokens = choose(self._request.sampling, logits, seen, uniforms)  # (n,)
        logprobs = logits.double().log_softmax(-1)
        likeliest = top_logprobs(logprobs, self._request.top_logprobs)
        for i, (each, token) in enumerate(zip(group, tokens.tolist(), strict=True)):
            self._sequences.append(each, token, float(logprobs[i, token]), likeliest[i])
