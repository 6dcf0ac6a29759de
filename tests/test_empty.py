"""Empty inputs in any layout: empty or zero results, and zero gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import GPT, GPTConfig, TrainConfig, Trainer, ops
from gptfast.ops import reference

R = torch.randn
C, F, V = 8, 12, 5

# A call of an operator: the module that has it, its first input, its parameters.
Call = Callable[[Any, Tensor], Tensor]
PARAMS = {name: R(*shape) for name, shape in {
    "ln": (C,), "w": (F, C), "b": (F,), "back": (C, F), "qkv": (3 * C, C), "proj": (C, C),
    "head": (V, C), "table": (9, C),
}.items()}  # fmt: skip


def targets(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[:-1], dtype=torch.int64)


def loss(reduction: str) -> Call:
    return lambda o, x, p: o.linear_cross_entropy(
        x, p["head"], targets(x), ln_w=p["ln"], ln_b=p["ln"], reduction=reduction
    )


OPERATORS: dict[str, tuple[tuple[int, ...], Callable[..., Tensor]]] = {
    "causal_attention": ((2, 2, 3, 4), lambda o, x, p: o.causal_attention(x, x, x)),
    "causal_attention with dropout": (
        (2, 2, 3, 4), lambda o, x, p: o.causal_attention(x, x, x, dropout_p=0.5, seed=1),
    ),
    "layer_norm_linear": (
        (2, 3, C), lambda o, x, p: o.layer_norm_linear(x, p["ln"], p["ln"], p["w"], p["b"]),
    ),
    "linear_residual": (
        (2, 3, C), lambda o, x, p: o.linear_residual(x, p["proj"], p["ln"], x),
    ),
    "layer_norm_attention": (
        (2, 3, C),
        lambda o, x, p: o.layer_norm_attention(
            x, p["ln"], None, p["qkv"], None, p["proj"], p["ln"], n_head=2
        ),
    ),
    "layer_norm_ffn": (
        (2, 3, C),
        lambda o, x, p: o.layer_norm_ffn(
            x, p["ln"], p["ln"], p["w"], p["b"], p["back"], p["ln"], dropout_p=0.5, seed=1
        ),
    ),
    "mean of losses": ((2, 3, C), loss("mean")),
    "sum of losses": ((2, 3, C), loss("sum")),
    "losses": ((2, 3, C), loss("none")),
    "embedding": ((2, 3, 1), lambda o, x, p: o.embedding(targets(x), p["table"], p["table"])),
}  # fmt: skip


def empty_inputs(shape: tuple[int, ...]) -> list[Tensor]:
    """Inputs with one leading dimension 0 each, in every layout: dense, transposed, sliced."""
    found = []
    for i in range(len(shape) - 1):
        sizes = [0 if j == i else size for j, size in enumerate(shape)]
        swapped = [sizes[1], sizes[0], *sizes[2:]]
        found += [R(*sizes), R(*swapped).transpose(0, 1), R(*sizes[:-1], 2 * sizes[-1])]
        found[-1] = found[-1][..., : sizes[-1]]
        found.append(R(*shape).narrow(i, 1, 0))
    return found


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_no_rows_give_zero_gradients(isa: str, name: str, dtype: torch.dtype) -> None:
    shape, call = OPERATORS[name]
    for x in empty_inputs(shape):
        results = []
        for o in (ops, reference):
            params = {key: p.to(dtype).requires_grad_() for key, p in PARAMS.items()}
            leaf = x.to(dtype).requires_grad_()
            out = call(o, leaf, params)
            out.float().sum().backward()
            grads = {key: p.grad for key, p in params.items() if p.grad is not None}
            results.append((out, grads))
            assert all((grad == 0).all() for grad in grads.values())
            assert leaf.grad is None or leaf.grad.shape == leaf.shape
        (ours, grads), (expected, expected_grads) = results
        assert ours.shape == expected.shape and (ours == 0).all() and (expected == 0).all()
        assert grads.keys() == expected_grads.keys()


def test_queries_without_keys_give_zero(isa: str) -> None:
    q, none = R(1, 2, 3, 4, requires_grad=True), R(1, 2, 0, 4, requires_grad=True)
    out = ops.causal_attention(q, none, none)
    out.sum().backward()
    assert out.shape == q.shape and (out == 0).all()
    assert q.grad is not None and (q.grad == 0).all()
    assert none.grad is not None and none.grad.shape == none.shape


def test_heads_without_columns_are_refused() -> None:
    x = R(1, 2, 3, 0)
    with pytest.raises(ValueError, match="causal_attention: q must have at least 1 column"):
        ops.causal_attention(x, x, x)


def test_a_training_step_on_nothing_decays_the_weights_alone() -> None:
    torch.manual_seed(0)
    config = GPTConfig(block_size=6, vocab_size=5, n_embd=8)
    nothing = torch.zeros(0, 6, dtype=torch.int64)
    for backend in ("fused", "reference"):
        model = GPT(config, backend)
        before = [p.detach().clone() for p in model.parameters()]
        trainer = Trainer(model, TrainConfig(lr=0.1, weight_decay=0.5, steps=1))
        for _ in range(4):
            assert trainer.step(nothing, nothing).item() == 0.0
        for old, new in zip(before, model.parameters(), strict=True):
            torch.testing.assert_close(new.detach(), old * (1 - 0.1 * 0.5) ** 4)


def test_a_model_takes_no_texts_and_texts_of_no_tokens() -> None:
    model = GPT(GPTConfig(block_size=6, vocab_size=5, n_embd=8))
    for B, T in ((0, 6), (3, 0), (0, 0)):
        idx = torch.zeros(B, T, dtype=torch.int64)
        assert model(idx).shape == (B, T, 5)
        model.zero_grad()
        model.loss(idx, idx).backward()
        assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())
