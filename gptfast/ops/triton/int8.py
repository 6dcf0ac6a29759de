"""Rounds weights to 8 bits; the specification is `ops.int8.rounded`.

Every call of generation rounds anew, so this must not take longer than reading the weights once.
"""

import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.int8 import LARGEST, Int8Weight
from gptfast.ops.triton.launch import block_of, cdiv, kernel

ELEMENTS = 4096  # of a program's tile
MOST_COLUMNS = 1024


@kernel
@triton.jit(do_not_specialize=["N"])
def int8_kernel(
    weight, values, scales, N, row_stride, column_stride, LARGEST: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rounds ROWS rows of the weight (N, K) to multiples of max_k |w_nk| / LARGEST.

    It is compiled without fused multiply-add: w / scale has to be rounded before an addition rounds
    it to an integer, or ties would differ from the specification.
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = n.to(tl.int64)[:, None]
    largest, odd = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for k0 in tl.range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)[None, :]
        inside = (n < N)[:, None] & (k < K)
        w = tl.load(weight + row * row_stride + k * column_stride, mask=inside, other=0.0)
        w = w.to(tl.float32)
        largest = tl.maximum(largest, tl.abs(w))
        odd += w - w  # NaN if w is not finite
    scale = tl.div_rn(tl.max(largest, 1), tl.full([ROWS], LARGEST, tl.float32)) + tl.sum(odd, 1)
    tl.store(scales + n, scale, mask=n < N)
    inverse = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), tl.where(scale > 0.0, scale, 1.0))
    for k0 in tl.range(0, K, BLOCK):  # the rows are in a cache now
        k = k0 + tl.arange(0, BLOCK)[None, :]
        inside = (n < N)[:, None] & (k < K)
        w = tl.load(weight + row * row_stride + k * column_stride, mask=inside, other=0.0)
        whole = w.to(tl.float32) * inverse[:, None] + 12582912.0 - 12582912.0  # 1.5 * 2^23
        whole = tl.where((scale > 0.0)[:, None], whole, 0.0)
        tl.store(values + row * K + k, whole.to(tl.int8), mask=inside)


def round_to_int8(weight: Tensor, out: Int8Weight) -> None:
    """Computes `ops.int8.rounded(weight)`, bit for bit, into `out`.

    Args:
        weight: (N, K), of any floating dtype and any strides.
        out: Of the same shape, contiguous.
    """
    N, K = weight.shape
    block = min(MOST_COLUMNS, block_of(K))
    rows = ELEMENTS // block
    int8_kernel[(cdiv(N, rows),)](
        weight, *out, N, *weight.stride(), LARGEST=LARGEST, K=K, ROWS=rows, BLOCK=block,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
