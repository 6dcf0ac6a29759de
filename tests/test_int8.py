"""The rule by which weights are rounded to 8 bits: the integers of the compiled engine."""

import math

import pytest
import torch

import gptfast
from gptfast import GPT, GPTConfig
from gptfast.ops import select
from gptfast.ops.int8 import rounded

K, N = 16, 60


@pytest.mark.skipif(select.extension() is None, reason="the compiled engine is not there")
def test_the_compiled_engine_has_the_same_integers_and_scales() -> None:
    """Its head multiplies one-hot rows, so a logit is one integer times its scale."""
    config = GPTConfig(block_size=2, vocab_size=N, n_layer=1, n_embd=K, attention=False)
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        head = model.lm_head.weight.normal_()
        head[0] = 0.0  # the logit that log-probabilities are compared with
        head[1] = torch.arange(K) - 7.5  # ties: half a unit, one and a half, ...
        head[1, 0] = 127.0
        head[2:40] *= torch.linspace(0.1, 20.0, 38)[:, None]
        model.ln_f.weight.zero_()
    values, scales = rounded(head.detach())
    for k in range(K):
        with torch.no_grad():
            model.ln_f.bias.copy_(torch.eye(K)[k])
        (found,) = gptfast.generate(model, [[1]], max_new_tokens=1, logprobs=N, dtype="int8")
        logprobs = torch.full((N,), math.nan, dtype=torch.float64)
        for token, logprob in found.top_logprobs[0]:
            logprobs[token] = logprob
        whole = ((logprobs - logprobs[0])[1:] / scales[1:]).double()
        assert torch.equal(whole.round(), values[1:, k].double())
        assert float((whole - whole.round()).abs().max()) < 1e-3
