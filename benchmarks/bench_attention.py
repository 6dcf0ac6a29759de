"""Causal attention: gptfast against torch's SDPA, nn.MultiheadAttention and FlexAttention.

Letters: B batch, H heads, T time, D head_dim, C n_embd.
"""

import copy
import functools
import sys
from collections.abc import Iterator
from typing import Any

import peers
import torch
from command import main
from common import (
    DTYPES,
    Case,
    Row,
    compare,
    compiled,
    forward_backward,
    random_tensors,
    wide,
    work,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptfast import ops
from gptfast.ops import reference

SHAPES = (
    *((64, 2, 16, 64), (64, 2, 64, 64), (16, 6, 256, 64), (4, 12, 1024, 64)),
    *((1, 12, 4096, 64), (1, 1, 4096, 64)),
)
MODES = ("forward", "forward+backward", "forward+backward, dropout 0.2")
SDPA_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
VERIFIED_SCORES = 2**24  # scores that are verified in float64; with more, the first heads only


def flops(shape: tuple[int, ...], backward: bool) -> float:
    """FLOPs: 2 products of T (T + 1) / 2 scores each, and 4 more in the backward pass."""
    B, H, T, D = shape
    return (3 if backward else 1) * 2 * 2 * B * H * D * T * (T + 1) / 2


def first_heads(shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Returns the batches and heads to verify: the first in the order of dropout's numbers."""
    B, H, T, _ = shape
    heads = max(1, VERIFIED_SCORES // T**2)
    return (slice(heads // H), slice(H)) if heads >= H else (slice(1), slice(heads))


def sdpa_by(backend: SDPBackend) -> Any:
    """Returns scaled_dot_product_attention by this backend alone."""

    def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return run


def flex_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlexAttention under torch.compile, as its documentation recommends."""
    attend, mask = _flex(q.shape[2], str(q.device))
    return attend(q, k, v, block_mask=mask)


@functools.cache
def _flex(T: int, device: str) -> tuple[Any, Any]:
    from torch.nn.attention import flex_attention as flex

    mask = flex.create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device=device)
    return compiled(flex.flex_attention), mask


def attention(shape: tuple[int, ...], mode: str, dtype: str) -> Case:
    """Makes the case of one shape, mode and dtype."""
    *inputs, grad = random_tensors(*(4 * [shape]), dtype=dtype)
    backward = grad if mode != "forward" else None
    p = 0.2 if "dropout" in mode else 0.0
    masked: dict[str, Any] = {"dropout_p": p, "seed": 5} if p else {}

    def contender(op: Any, **options: Any) -> Any:
        return work(functools.partial(op, **options), inputs, backward)

    contenders = {
        "gptfast": contender(ops.causal_attention, dropout_p=p),
        "SDPA": contender(F.scaled_dot_product_attention, dropout_p=p, is_causal=True),
    }
    if inputs[0].is_cuda:
        # Each by itself, because SDPA takes the first that can.
        for name, backend in SDPA_BACKENDS.items():
            contenders[name] = contender(sdpa_by(backend), dropout_p=p, is_causal=True)
    if backward is None:
        contenders["FlexAttention"] = contender(flex_attention)
    part = first_heads(shape)
    parts = [x[part] for x in inputs]
    part_grad = None if backward is None else grad[part]
    # SDPA draws its own dropout mask, so peers.attention, with our mask, is verified in its place.
    checked = {
        "gptfast": contender(ops.causal_attention, **masked),
        "SDPA": work(functools.partial(peers.attention, **masked), parts, part_grad),
    }
    oracle = work(
        functools.partial(reference.causal_attention, **masked),
        [wide(x) for x in parts],
        None if part_grad is None else wide(part_grad),
    )
    return compare(
        contenders,
        oracle,
        flops(shape, backward is not None),
        dtype,
        checked=checked if p else None,
        part=lambda x: x[part],  # has no effect on a result that is already a part
        one_scale=backward is not None,
        compiles=("FlexAttention",) if backward is None else (),
    )


def sub_block(dtype: str) -> Case:
    """Makes the case of x + attention(LN(x)), with projections: nn.MultiheadAttention, gptfast."""
    B, T, C, H = 64, 64, 128, 2
    norm, module = nn.LayerNorm(C), nn.MultiheadAttention(C, H, batch_first=True)
    norm, module = norm.to(DTYPES[dtype]), module.to(DTYPES[dtype])
    x, grad = random_tensors((B, T, C), (B, T, C), dtype=dtype)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)

    def theirs(x: Tensor, grad: Tensor, norm: nn.Module, module: nn.Module) -> Any:
        def forward() -> Tensor:
            y = norm(x)
            return x + module(y, y, y, attn_mask=hidden, need_weights=False)[0]

        return forward_backward(forward, [x, *norm.parameters(), *module.parameters()], grad)

    def ours() -> Tensor:
        weights = module.in_proj_weight, module.in_proj_bias
        return ops.layer_norm_attention(
            x, norm.weight, norm.bias, *weights, *module.out_proj.parameters(), n_head=H
        )

    x.requires_grad_()
    double = copy.deepcopy(norm).double(), copy.deepcopy(module).double()
    leaves = [x, *norm.parameters(), *module.parameters()]
    contenders = {
        "gptfast": forward_backward(ours, leaves, grad),
        "nn.MultiheadAttention": theirs(x, grad, norm, module),
    }
    oracle = theirs(wide(x).requires_grad_(), wide(grad), *double)
    projections = 3 * 2 * B * T * 4 * C * C
    return compare(contenders, oracle, projections + flops((B, H, T, C // H), True), dtype)


def rows() -> Iterator[Row]:
    """Yields all rows of the script."""
    for shape in SHAPES:
        for mode in MODES:
            for dtype in DTYPES:
                name = f"{'x'.join(map(str, shape))} {mode}"
                build = functools.partial(attention, shape, mode, dtype)
                yield Row(name, dtype, build, quick=shape == SHAPES[0])
    for dtype in DTYPES:
        name = "x + MHA(LN(x)) 64x64x128, 2 heads, forward+backward"
        yield Row(name, dtype, functools.partial(sub_block, dtype), quick=True)


def run(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit code."""
    return main("attention", __doc__ or "", rows(), argv)


if __name__ == "__main__":
    sys.exit(run())
