"""The feed-forward sublayer (LN + FFN + residual) and a matrix product: gptfast against torch.

Letters: M rows, C n_embd, F 4C, K inner and N outer columns of a product.
"""

import functools
import sys
from collections.abc import Iterator

import peers
import torch
from command import main
from common import (
    DTYPES,
    OURS,
    Case,
    Row,
    compare,
    compiled,
    plain_linear,
    random_tensors,
    wide,
    work,
)

from gptfast import ops
from gptfast.ops import reference

SHAPES = ((4096, 128), (4096, 384), (1024, 768))
GEMM = (4096, 512, 128)


def ffn(M: int, C: int, dtype: str) -> Case:
    """Makes the case of the sublayer, forward and backward, without dropout."""
    F = 4 * C
    x, grad, ln_w, ln_b, b1, b2 = random_tensors(
        (M, C), (M, C), (C,), (C,), (F,), (C,), dtype=dtype
    )
    w1, w2 = random_tensors((F, C), (C, F), dtype=dtype, scale=C**-0.5)
    inputs = [x, ln_w, ln_b, w1, b1, w2, b2]
    contenders = {
        OURS: work(ops.layer_norm_ffn, inputs, grad),
        "torch": work(peers.ffn, inputs, grad),
        "torch.compile": work(compiled(peers.ffn), inputs, grad),
    }
    oracle = work(reference.layer_norm_ffn, [wide(t) for t in inputs], wide(grad))
    flops = 3 * 2 * 2 * M * C * F
    return compare(contenders, oracle, flops, dtype, compiles=("torch.compile",))


def gemm(M: int, K: int, N: int, dtype: str) -> Case:
    """Makes the case of a linear layer without bias, forward only."""
    inputs = random_tensors((M, K), (N, K), dtype=dtype)
    contenders = {
        OURS: work(plain_linear, inputs, None),
        "torch.mm": work(lambda x, weight: torch.mm(x, weight.t()), inputs, None),
    }
    oracle = work(lambda x, weight: x @ weight.t(), [wide(t) for t in inputs], None)
    return compare(contenders, oracle, 2 * M * K * N, dtype)


def rows() -> Iterator[Row]:
    """Yields all rows of the script."""
    for M, C in SHAPES:
        for dtype in DTYPES:
            build = functools.partial(ffn, M, C, dtype)
            name = f"LN+FFN+residual {M}x{C} forward+backward"
            yield Row(name, dtype, build, quick=(M, C) == SHAPES[0])
    for dtype in DTYPES:
        build = functools.partial(gemm, *GEMM, dtype)
        yield Row(f"GEMM {'x'.join(map(str, GEMM))} forward", dtype, build, quick=True)


def run(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit code."""
    return main("ffn", __doc__ or "", rows(), argv)


if __name__ == "__main__":
    sys.exit(run())
