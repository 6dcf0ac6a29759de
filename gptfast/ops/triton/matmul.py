"""Products with nothing around them: torch's, by cuBLAS or hipBLASLt.

Measured on an H100 in bfloat16 they reach 620 to 715 TFLOP/s at the sizes of GPT-2, more than the
products of these kernels, which are for what surrounds a product: `linear.multiply`.
"""

import torch
from torch import Tensor


def matmul(
    a: Tensor, b: Tensor, dtype: torch.dtype | None = None, out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:  # fmt: skip
    """Computes a b, summed in float32.

    float32 operands are multiplied as torch.backends.cuda.matmul.fp32_precision says.

    Args:
        a: (M, K), of any strides.
        b: (K, N) of a's dtype, of any strides.
        dtype: The result's dtype: a's (the default) or float32.
        out: Receives the result, if given; (M, N), of any row stride, in `dtype`.
        accumulate: Whether to add the product to `out` instead.

    Returns:
        (M, N).
    """
    dtype = dtype or a.dtype
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
    beta = 1.0 if accumulate else 0.0
    if dtype == a.dtype or not a.is_cuda:  # other devices have no products of two dtypes
        return torch.addmm(out, a.to(dtype), b.to(dtype), beta=beta, out=out)
    return torch.addmm(out, a, b, out_dtype=dtype, beta=beta, out=out)
