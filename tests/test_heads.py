"""What heads do: their terms sum to the attention's output, however its modules are made."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptfast import GPT, ConfigError, GPTConfig, heads, ops
from gptfast.modules import CausalSelfAttention

CONFIG = {"block_size": 12, "vocab_size": 11, "n_layer": 2, "n_head": 4, "n_embd": 32}
IDX = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(2))


def make(**fields: Any) -> GPT:
    """A model in float64 whose biases count."""
    generator = torch.Generator().manual_seed(1)
    model = GPT(GPTConfig(**CONFIG | fields), generator=generator).double().eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("bias"):
                param.normal_(generator=generator)
    return model


def inputs(model: GPT, layer: int) -> Tensor:
    """What a block gets, (B, T, C), by a hook."""
    found = []
    hook = model.h[layer].register_forward_pre_hook(lambda module, args: found.append(args[0]))
    model(IDX)
    hook.remove()
    return found[0].detach()


def outputs(model: GPT, layer: int) -> Tensor:
    """The attention's output, (B, T, C), by calling its modules."""
    block = model.blocks[layer]
    return block.attn(block.ln_1(inputs(model, layer))).detach()


@pytest.mark.parametrize("bias", [True, False])
def test_contributions_sum_to_the_attentions_output(bias):
    model = make(bias=bias)
    parts = model.attention_contributions(IDX)
    assert parts.shape == (2, 3, 4, 9, 32) and parts.dtype == torch.float64
    for layer, block in enumerate(model.blocks):
        total = parts[layer].sum(1)
        if bias:
            total = total + block.attn.c_proj.bias
        torch.testing.assert_close(total, outputs(model, layer), atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_both_backends_attention_is_the_sum(backend, bias, dtype, atol):
    model = make(bias=bias).to(dtype)
    model.backend = backend
    parts = model.attention_contributions(IDX)
    assert parts.dtype == torch.float32
    op = ops if backend == "fused" else ops.reference
    for layer, block in enumerate(model.blocks):
        x, attn = inputs(model, layer), block.attn
        total = parts[layer].sum(1)
        if bias:
            total = total + attn.c_proj.bias
        after = op.layer_norm_attention(
            x, block.ln_1.weight, block.ln_1.bias, attn.c_attn.weight, attn.c_attn.bias,
            attn.c_proj.weight, attn.c_proj.bias, n_head=4,
        )  # fmt: skip
        torch.testing.assert_close(x.float() + total, after.float(), atol=atol, rtol=0)


def test_a_contribution_is_the_formulas():
    model = make()
    block, b, h, i = model.blocks[1], 2, 3, 6
    x = block.ln_1(inputs(model, 1))[b]  # (T, C)
    U_V = block.attn.c_attn.weight[2 * 32 + h * 8 : 2 * 32 + (h + 1) * 8].T  # (C, D)
    b_V = block.attn.c_attn.bias[2 * 32 + h * 8 : 2 * 32 + (h + 1) * 8]
    U_O = block.attn.c_proj.weight[:, h * 8 : (h + 1) * 8].T  # (D, C)
    w = model.attention_weights(IDX)[1, b, h, i]  # (T,)
    wanted = sum(w[j] * ((x[j] @ U_V + b_V) @ U_O) for j in range(i + 1))
    found = model.attention_contributions(IDX)[1, b, h, i]
    torch.testing.assert_close(found, wanted.detach(), atol=1e-13, rtol=1e-12)


class Doubled(nn.Module):
    """Wraps an attention and adds a part that no head has."""

    def __init__(self, inner: CausalSelfAttention) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *, attend: Any = None) -> Tensor:
        return 2 * self.inner(x, attend=attend) + x


@pytest.mark.parametrize("where", ["c_attn", "c_proj", "ln_1", "attn"])
def test_contributions_of_replaced_modules(where):
    model = make()
    block = model.blocks[1]
    if where == "attn":
        block.attn = Doubled(block.attn)
    elif where == "c_proj":
        block.attn.c_proj = nn.Sequential(nn.Linear(32, 5), nn.Linear(5, 32)).double()
    elif where == "c_attn":
        block.attn.c_attn.register_forward_hook(lambda module, args, out: out.sin())
    else:
        block.ln_1 = nn.LayerNorm(32, eps=0.1).double()
    terms = heads.attention_terms(model, IDX)
    assert torch.equal(terms.heads, model.attention_contributions(IDX))
    torch.testing.assert_close(terms.output[1], outputs(model, 1), atol=1e-13, rtol=1e-12)
    total = terms.heads.sum(2) + terms.bias
    torch.testing.assert_close(total, terms.output, atol=1e-13, rtol=1e-12)
    if where in ("c_attn", "ln_1"):
        assert (terms.bias[1] - block.attn.c_proj.bias).abs().max() < 1e-13


def test_an_output_that_is_no_sum_over_heads_is_an_error():
    model = make()
    model.h[1].attn.c_proj.register_forward_hook(lambda module, args, out: out.tanh())
    with pytest.raises(ConfigError, match=r"h\.1\.attn must be linear in its heads' outputs"):
        model.attention_contributions(IDX)


def test_models_without_heads_are_errors():
    with pytest.raises(ConfigError, match="attention=False has no attention weights"):
        make(attention=False).attention_contributions(IDX)
    model = make()
    model.h[0].attn = nn.Identity()
    with pytest.raises(ConfigError, match=r"contributions: h\.0\.attn must be .* got Identity"):
        model.attention_contributions(IDX)
    with pytest.raises(ValueError, match="at most block_size=12 positions, got 13"):
        make().attention_contributions(torch.zeros(1, 13, dtype=torch.int64))


def test_contributions_leave_the_model_as_it_was():
    model = make(dropout=0.5).train()
    state = torch.get_rng_state()
    first = model.attention_contributions(IDX)
    assert torch.equal(first, model.attention_contributions(IDX)) and not first.requires_grad
    assert torch.equal(state, torch.get_rng_state()) and model.training


def test_entropies():
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    wanted = [0.0, math.log(2), -sum(w * math.log(w) for w in (0.2, 0.3, 0.5))]
    assert heads.entropy(rows).tolist() == pytest.approx(wanted)
    weights = make().attention_weights(IDX)
    found = heads.entropy(weights)
    assert found.shape == (2, 3, 4, 9) and (found[..., 0] == 0).all()
    assert (found <= torch.arange(1, 10).log() + 1e-12).all()


@pytest.mark.parametrize("bias", [True, False])
def test_projections_add_up_to_the_outputs_norm(bias):
    model = make(bias=bias)
    terms = heads.attention_terms(model, IDX)
    found = heads.shares(terms, 1, -2)
    assert found.names == ["0", "1", "2", "3"] + ["bias"] * bias
    output = outputs(model, 0)[1, 7]
    assert found.output[0].item() == pytest.approx(output.norm().item())
    torch.testing.assert_close(found.projections.sum(1), found.output)
    assert found.norms[0, 2].item() == pytest.approx(terms.heads[0, 1, 2, 7].norm().item())
    assert (found.projections.abs() <= found.norms + 1e-12).all() and found.difference < 1e-13


def test_shares_of_nothing_are_zero():
    model = make(bias=False)
    for block in model.blocks:
        nn.init.zeros_(block.attn.c_proj.weight)
    found = heads.shares(heads.attention_terms(model, IDX), 0, 3)
    assert not any(each.any() for each in (found.norms, found.projections, found.output))
