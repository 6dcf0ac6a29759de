"""The Triton kernels of the loss and of the embedding's gradients, block by block.

tests/test_triton.py has their cases that need no more than the public functions.
"""

import pytest
import test_triton
import torch
from test_embedding import fused, plain, tables
from test_triton import DEVICE, DTYPES, there

from gptfast.ops.triton import embedding
from gptfast.testing import check_op

where = test_triton.where


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
@pytest.mark.parametrize(
    ("B", "T", "V", "C"), ((1, 1, 2, 8), (2, 5, 130, 16), (9, 33, 66, 100), (70, 3, 257, 300))
)
def test_embedding_of_a_large_vocabulary(
    B: int, T: int, V: int, C: int, dropout_p: float, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(embedding, "ONE_HOT", 0)
    monkeypatch.setattr(embedding, "ORDER_BLOCK", 64)
    monkeypatch.setattr(embedding, "TILE", 16)
    idx = torch.randint(V, (B, T), generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    idx[0, 0] = 0
    options = {"padding_idx": 0, "dropout_p": dropout_p, "seed": 3}
    check_op(fused, plain, plain, there(*tables(V, 40, C), idx), dtype, **options)
