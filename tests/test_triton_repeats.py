"""Every configuration of every kernel on a GPU: against float64, and 200 times the same bits.

A race in a pipeline of loads shows as a result that differs once in a while; products whose left
operand is normalised as it is read, and so comes from registers, have had some.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peers import ffn as torch_ffn
from test_attention import check_attention, heads
from test_cross_entropy import case, torch_linear_cross_entropy
from test_ffn import block
from test_linear import normal, torch_layer_norm_linear, torch_linear_residual

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing import check_op, run

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32  # the interpreter multiplies bfloat16 wrongly
REPETITIONS = 200 if CUDA else 2
M, K, N = (8192, 768, 2304) if CUDA else (70, 32, 48)
T = 1000 if CUDA else 70


def on_device(tensors: list[Any]) -> list[Any]:
    return [x if x is None else x.to(DEVICE) for x in tensors]


def checked(ours: Any, exact: Any, own: Any, inputs: list[Any], **options: Any) -> Any:
    """Asserts the budget; returns a function that computes result and gradients once more."""
    inputs = on_device(inputs)
    check_op(ours, exact, own, inputs, DTYPE, **options)
    rounded = [x if x is None or not x.is_floating_point() else x.to(DTYPE) for x in inputs]
    grad = torch.ones_like(ours(*rounded, **options))
    return lambda: run(ours, rounded, None, grad, **options)


def attention() -> list[Any]:
    q, k, v = (heads(2, 4, T, 64, seed=i).to(DEVICE) for i in range(3))
    options: dict[str, Any] = {"dropout_p": 0.2, "seed": 5}
    check_attention(q, k, v, DTYPE, **options)
    inputs, grad = [x.to(DTYPE) for x in (q, k, v)], torch.ones_like(q, dtype=DTYPE)
    return [lambda: run(ops.causal_attention, inputs, DTYPE, grad, **options)]


def linear() -> list[Any]:
    weight, bias = normal(N, K) * K**-0.5, normal(N)
    normed = [normal(M, K), normal(K, seed=1), normal(K, seed=2), weight, bias]
    added = [normal(M, K), weight, bias, normal(M, N)]
    return [
        checked(
            ops.layer_norm_linear, reference.layer_norm_linear, torch_layer_norm_linear, normed
        ),
        checked(ops.linear_residual, reference.linear_residual, torch_linear_residual, added),
    ]


def ffn() -> list[Any]:
    args = ops.layer_norm_ffn, reference.layer_norm_ffn, torch_ffn
    return [checked(*args, block(M, K, 4 * K), dropout_p=0.2, seed=3)]


def cross_entropy() -> list[Any]:
    args = ops.linear_cross_entropy, reference.linear_cross_entropy, torch_linear_cross_entropy
    return [checked(*args, case(M // 4, K, N))]


CHECKS = {
    "attention": attention, "attention_backward": attention, "linear": linear, "rows": linear,
    "ffn": ffn, "cross_entropy": cross_entropy,
}  # fmt: skip


def configurations() -> Iterator[Any]:
    """Yields a case per configuration: the module, the kernel's name, the configuration."""
    for module in CHECKS:
        kernels = vars(importlib.import_module(f"gptfast.ops.triton.{module}"))
        for name, kernel in kernels.items():
            configs = getattr(kernel, "configs", None)
            if isinstance(configs, list):
                for i, config in enumerate(configs):
                    yield pytest.param(module, name, config, id=f"{module}-{name}-{i}")


@pytest.mark.cuda
@pytest.mark.full
@pytest.mark.parametrize(("module", "name", "config"), configurations())
def test_every_configuration_is_right_and_repeats(
    module: str, name: str, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not CUDA:
        pytest.skip("torch finds no CUDA device")
    kernel = getattr(importlib.import_module(f"gptfast.ops.triton.{module}"), name)
    monkeypatch.setattr(kernel, "configs", [config])
    for compute in CHECKS[module]():
        first = compute()
        for _ in range(REPETITIONS):
            assert all(torch.equal(a, b) for a, b in zip(compute(), first, strict=True))
