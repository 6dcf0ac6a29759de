"""Weights of 8 bits with a scale per output, for generation alone.

    w_nk ~ scales_n values_nk,   scales_n = max_k |w_nk| / 127,   values_nk = round(w_nk / scales_n)

csrc/kernels/matmul/weights.inl rounds by the same rule, to the same bits.

Letters: N outputs of a linear layer, K inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127


class Int8Weight(NamedTuple):
    """A weight (N, K) of a linear layer."""

    values: Tensor  # (N, K) int8
    scales: Tensor  # (N,) float32; NaN where the weight's row was not finite

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self.values.nbytes + self.scales.nbytes

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Returns scales values as one tensor (N, K), rounded to `dtype` once."""
        found = torch.empty(self.values.shape, dtype=dtype, device=self.values.device)
        return torch.mul(self.values, self.scales[:, None], out=found)


def empty_int8(weight: Tensor) -> Int8Weight:
    """Reserves the memory for a weight (N, K), on its device."""
    return Int8Weight(
        torch.empty(weight.shape, dtype=torch.int8, device=weight.device),
        torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device),
    )


def rounded(weight: Tensor) -> Int8Weight:
    """Rounds a weight (N, K) of any floating dtype; the specification of all kernels that do."""
    weight = weight.float()
    # On a GPU torch divides by a number less exactly than by a tensor.
    scales = weight.abs().amax(1) / weight.new_full((), LARGEST)
    scales += scales - scales  # NaN if infinite
    whole = (weight * (1 / scales)[:, None]).round()
    return Int8Weight(torch.where((scales > 0)[:, None], whole, 0.0).to(torch.int8), scales)
