"""Every configuration of every kernel on a GPU: against float64, and 200 times the same bits.

A race in a pipeline of loads shows as a result that differs once in a while.
"""

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
from gptfast.ops.triton import attention as attention_forward  # noqa: E402
from gptfast.ops.triton import attention_backward, launch, products  # noqa: E402

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


def configurations() -> Iterator[Any]:
    """Yields a case per configuration: what is computed, and what takes another one's place."""
    for module in (attention_forward, attention_backward):
        for name, kernel in vars(module).items():
            configs = kernel.configs if isinstance(kernel, launch.Kernel) else []
            for i, config in enumerate(configs):
                places = [(kernel, "configs", [config])]
                yield pytest.param([attention], places, id=f"{name}-{i}")
    for described, tiles in (
        (True, {*products.DESCRIBED_TILES, *products.EPILOGUE_TILES}),
        (False, products.POINTER_TILES[2]),
    ):
        for i, tile in enumerate(sorted(tiles)):
            places = [(products, "choose_tile", lambda *_, tile=tile: tile)]
            if not described:
                places.append((products, "has_descriptors", lambda _: False))
            kind = "described" if described else "pointers"
            yield pytest.param([linear, ffn], places, id=f"products-{kind}-{i}")
    yield pytest.param([cross_entropy], [], id="cross_entropy")


@pytest.mark.cuda
@pytest.mark.full
@pytest.mark.parametrize(("checks", "places"), [*configurations()])
def test_every_configuration_is_right_and_repeats(
    checks: list[Any], places: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not CUDA:
        pytest.skip("torch finds no CUDA device")
    for each in places:
        monkeypatch.setattr(*each)
    for compute in (found for check in checks for found in check()):
        first = compute()
        for _ in range(REPETITIONS):
            assert all(torch.equal(a, b) for a, b in zip(compute(), first, strict=True))
