"""The embedding against the float64 oracle, at every instruction set."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing import check_op

DTYPES = (torch.float32, torch.bfloat16)


def tables(V: int, block_size: int, C: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(V)
    return [torch.randn(V, C, generator=generator), torch.randn(block_size, C, generator=generator)]


def fused(wte: Tensor, wpe: Tensor, idx: Tensor, **options: Any) -> Tensor:
    return ops.embedding(idx, wte, wpe, **options)


def plain(wte: Tensor, wpe: Tensor, idx: Tensor, **options: Any) -> Tensor:
    return reference.embedding(idx, wte, wpe, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
@pytest.mark.parametrize("padding_idx", (None, 0))
@pytest.mark.parametrize(
    ("B", "T", "V", "C"), ((1, 1, 2, 8), (2, 5, 7, 16), (9, 33, 66, 100), (2, 30, 9, 1600))
)
def test_budget(
    isa: str,
    B: int,
    T: int,
    V: int,
    C: int,
    padding_idx: int | None,
    dropout_p: float,
    dtype: torch.dtype,
) -> None:
    idx = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    idx[0, 0] = 0
    options = {"padding_idx": padding_idx, "dropout_p": dropout_p, "seed": 3}
    check_op(fused, plain, plain, [*tables(V, 40, C), idx], dtype, **options)


def test_padding_row_and_unused_positions_get_no_gradient(isa: str) -> None:
    wte, wpe = (table.requires_grad_() for table in tables(6, 12, 24))
    ops.embedding(torch.tensor([[0, 1, 0, 2]]), wte, wpe, padding_idx=0).sum().backward()
    assert wte.grad is not None and wpe.grad is not None
    assert (wte.grad[0] == 0).all() and (wte.grad[1] == 1).all() and (wte.grad[3:] == 0).all()
    assert (wpe.grad[:4] == 1).all() and (wpe.grad[4:] == 0).all()


def test_result_dtype_is_chosen_apart_from_the_tables(isa: str) -> None:
    wte, wpe = (table.requires_grad_() for table in tables(6, 12, 24))
    out = ops.embedding(torch.tensor([[1, 2]]), wte, wpe, dtype=torch.bfloat16)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert wte.grad is not None and wte.grad.dtype == torch.float32


def test_indices_out_of_range_are_an_error(isa: str) -> None:
    wte, wpe = tables(6, 12, 24)
    for bad in (6, -1, 2**40):
        with pytest.raises(RuntimeError, match=rf"idx must be in \[0, 6\), got {bad}"):
            ops.embedding(torch.tensor([[1, bad]]), wte, wpe)
        with pytest.raises(ValueError, match=r"idx must be in \[0, 6\)"):
            reference.embedding(torch.tensor([[1, bad]]), wte, wpe)


@pytest.mark.parametrize("bad", (-1, 6))
def test_a_padding_row_that_there_is_not(bad: int) -> None:
    """-1 is rejected: to the kernel it means no padding row, to torch the last row."""
    wte, wpe = tables(6, 12, 24)
    for op in (ops, reference):
        with pytest.raises(
            ValueError, match=rf"embedding: padding_idx must be None or in \[0, 6\), got {bad}"
        ):
            op.embedding(torch.tensor([[1]]), wte, wpe, padding_idx=bad)


def test_errors_name_argument_expected_and_got() -> None:
    wte, wpe = tables(6, 12, 24)
    with pytest.raises(
        ValueError, match=r"idx must be \(B, T\) with T at most 12, got shape \(1, 13\)"
    ):
        ops.embedding(torch.zeros(1, 13, dtype=torch.int64), wte, wpe)
    with pytest.raises(TypeError, match=r"idx must be torch.int64, got torch.int32"):
        ops.embedding(torch.zeros(1, 3, dtype=torch.int32), wte, wpe)
    with pytest.raises(TypeError, match=r"idx must be on cpu, got meta"):
        ops.embedding(torch.zeros(1, 3, dtype=torch.int64, device="meta"), wte, wpe)
    with pytest.raises(ValueError, match=r"wte must be contiguous, got strides \(1, 6\)"):
        ops.embedding(torch.zeros(1, 3, dtype=torch.int64), wte.t().contiguous().t(), wpe)
