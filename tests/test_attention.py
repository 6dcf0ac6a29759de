"""causal_attention against the float64 oracle and torch's own, at every instruction set."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from peers import attention as torch_attention
from torch import Tensor
from torch.nn import functional as F

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing import assert_budget, error, run

DTYPES = (torch.float32, torch.bfloat16)


def heads(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_attention(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, **options: Any) -> None:
    """Asserts the error budget for the result and for dq, dk, dv.

    dS = p (dP - delta) is a difference of similar terms that a fused kernel rounds separately, so
    the rounding in the budget is that of the largest of the three gradients.
    """
    inputs = [x.to(dtype) for x in (q, k, v)]
    grad = heads(*q.shape, seed=9).to(q.device, dtype)
    oracle = run(reference.causal_attention, inputs, torch.float64, grad, **options)
    own = run(torch_attention, inputs, dtype, grad, **options)
    actual = run(ops.causal_attention, inputs, dtype, grad, **options)
    largest = max(x.abs().max().item() for x in oracle[1:])
    assert_budget("out", actual[0], own[0], oracle[0], 2.0)
    for name, a, t, o in zip(("dq", "dk", "dv"), actual[1:], own[1:], oracle[1:], strict=True):
        assert_budget(name, a, t, o, 3.0, scale=largest)


@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", (8, 16, 33, 64, 100, 128, 256))
@pytest.mark.parametrize("T", (5, 16, 17, 64, 100, 257))
def test_budget(isa: str, T: int, D: int, dtype: torch.dtype, dropout_p: float) -> None:
    q, k, v = (heads(2, 3, T, D, seed=i) for i in range(3))
    check_attention(q, k, v, dtype, dropout_p=dropout_p, seed=5, stream=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", (8, 33, 128))
@pytest.mark.parametrize("T", (1, 2))
def test_one_and_two_positions(isa: str, T: int, D: int, dtype: torch.dtype) -> None:
    # If a weight is (almost) 1, its gradient is (almost) 0, the difference of two dot products of D
    # terms. In torch's summation order they are equal, so the bound is the rounding of the terms.
    q, k, v = (heads(2, 3, T, D, seed=i).to(dtype) for i in range(3))
    grad = heads(2, 3, T, D, seed=9).to(dtype)
    oracle = run(reference.causal_attention, (q, k, v), torch.float64, grad)
    actual = run(ops.causal_attention, (q, k, v), dtype, grad)
    terms = (grad.double().abs() @ v.double().abs().transpose(-2, -1)).max() / math.sqrt(D)
    bound = torch.finfo(dtype).eps * terms * max(q.abs().max(), k.abs().max())
    for a, o in zip(actual, oracle, strict=True):
        assert (a.double() - o).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequence_of_one_head(isa: str, dtype: torch.dtype) -> None:
    q, k, v = (heads(1, 1, 700, 64, seed=i) for i in range(3))
    check_attention(q, k, v, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
@pytest.mark.parametrize(
    ("Tq", "Tk"),
    ((1, 200), (5, 150), (100, 101), (7, 3), (200, 40), (1, 16), (13, 16), (25, 10), (100, 3)),
)
def test_mask_is_aligned_bottom_right(
    isa: str, Tq: int, Tk: int, dtype: torch.dtype, dropout_p: float
) -> None:
    q, k, v = heads(2, 2, Tq, 32), heads(2, 2, Tk, 32, seed=1), heads(2, 2, Tk, 32, seed=2)
    check_attention(q, k, v, dtype, dropout_p=dropout_p, seed=5)


@pytest.mark.parametrize(("T", "factor"), ((16, 0.75), (150, 1.3)))
def test_gradients_are_as_exact_as_torchs(isa: str, T: int, factor: float) -> None:
    # Probabilities from a float32 log-sum-exp have its rounding, except with few keys.
    inputs = [heads(30, 4, T, 8, seed=i) * 2 for i in range(3)]
    grad = heads(30, 4, T, 8, seed=9)
    torch_own = partial(F.scaled_dot_product_attention, is_causal=True)
    oracle = run(reference.causal_attention, inputs, torch.float64, grad)
    own = run(torch_own, inputs, torch.float32, grad)
    actual = run(ops.causal_attention, inputs, torch.float32, grad)
    for a, t, o in zip(actual[1:], own[1:], oracle[1:], strict=True):
        assert (a.double() - o).norm() <= factor * (t.double() - o).norm()


def test_query_that_sees_no_key_gives_zeros_and_no_gradient(isa: str) -> None:
    q, k, v = (
        x.requires_grad_() for x in (heads(1, 1, 5, 16), heads(1, 1, 2, 16), heads(1, 1, 2, 16))
    )
    out = ops.causal_attention(q, k, v)
    out.sum().backward()
    assert (out[:, :, :3] == 0).all() and (out[:, :, 3:] != 0).any()
    assert q.grad is not None and (q.grad[:, :, :3] == 0).all()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v) if x.grad is not None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(isa: str, dtype: torch.dtype) -> None:
    packed = heads(2, 50, 3, 4, 32)
    q, k, v = packed.permute(2, 0, 3, 1, 4)  # views of one projection
    check_attention(q, k, v, dtype)
    column_first = heads(2, 4, 32, 50).transpose(2, 3)  # last stride is not 1
    check_attention(column_first, k, v.flip(2), dtype)


def test_a_gradient_lies_as_its_input() -> None:
    """A gradient has its input's strides, so that autograd need not copy it."""
    apart = [heads(2, 4, 50, 32, seed=i).requires_grad_() for i in range(3)]
    together = [x.requires_grad_() for x in heads(2, 50, 3, 4, 32).permute(2, 0, 3, 1, 4)]
    for inputs in (apart, together):
        out = ops.causal_attention(*inputs)
        for grad, x in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
            assert grad.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("scale", (0.3, 0.0, -0.5))
@pytest.mark.parametrize("T", (40, 257))  # 257: two blocks of keys, most rows mask the second
def test_scale(isa: str, scale: float, T: int) -> None:
    q, k, v = (heads(1, 2, T, 24, seed=i) for i in range(3))
    check_attention(q, k, v, torch.float32, scale=scale)


def check_large_scores(size: float, T: int, dtype: torch.dtype, where: Any = "cpu") -> None:
    """Asserts the budget for scores so large that one key per query has all the weight.

    dq and dk are 0 except for dP - delta times large keys and queries. The two are equal sums of D
    products, added up in float32 in orders of their own, so their budget is that of SDPA on the CPU
    (on a GPU its float32 gradients of such scores are NaN) and one such rounding, for SDPA adds up
    both in the same order on some processors.
    """
    q, k, v = (heads(1, 2, T, 16, seed=i) for i in range(3))
    inputs = [x.to(where, dtype) for x in (q * size**0.5, k * size**0.5, v)]
    grad = heads(1, 2, T, 16, seed=9).to(where, dtype)
    sdpa = partial(F.scaled_dot_product_attention, is_causal=True)
    for dropout_p in (0.0, 0.2):
        options = {"dropout_p": dropout_p, "seed": 5}
        oracle = run(reference.causal_attention, inputs, torch.float64, grad, **options)
        own = run(torch_attention, inputs, dtype, grad, **options)
        actual = run(ops.causal_attention, inputs, dtype, grad, **options)
        assert_budget("out", actual[0], own[0], oracle[0], 2.0)
        assert_budget("dv", actual[3], own[3], oracle[3], 3.0)
        if dropout_p == 0.0:
            theirs = run(sdpa, [x.cpu() for x in inputs], dtype, grad.cpu())
            products = (inputs[2].abs() @ grad.abs().transpose(2, 3)).max().item()
            rounding = torch.finfo(torch.float32).eps * products * 16**-0.5
            for i, other in ((1, k), (2, q)):
                assert actual[i].isfinite().all() and actual[i].dtype == dtype
                budget = 3 * error(theirs[i], oracle[i].cpu()) + rounding * size**0.5 * other.max()
                assert error(actual[i], oracle[i]) <= budget, ("dq, dk", i)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (2e5, 2e8, 1e10, 1e20))
@pytest.mark.parametrize("T", (16, 40, 150, 300))
def test_scores_of_any_size(isa: str, T: int, size: float, dtype: torch.dtype) -> None:
    check_large_scores(size, T, dtype)


def offset_inputs(T: int, dtype: torch.dtype, offset: float) -> list[Tensor]:
    """Inputs whose scores are integers, exact in any summation order, plus offset^2."""
    q, k, v = (heads(2, 2, T, 16, seed=i).mul(2).round() for i in range(3))
    q[..., 0] = k[..., 0] = offset
    return [x.to(dtype) for x in (q, k, v)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", (0.25, -0.25))
@pytest.mark.parametrize("T", (1, 16, 40, 150, 300))
def test_an_offset_of_all_scores_changes_no_bit(
    isa: str, T: int, scale: float, dtype: torch.dtype
) -> None:
    near, far = (
        ops.causal_attention(*offset_inputs(T, dtype, offset), scale=scale)
        for offset in (0.0, 1000.0)
    )
    assert torch.equal(near, far)


def overflowing_inputs(T: int, signs: tuple[int, int]) -> list[Tensor]:
    """Inputs with overflowing scores: the first half of the keys, and one of the last."""
    q, k, v = (heads(1, 2, T, 8, seed=i) for i in range(3))
    q[..., 0] = 1e25
    k[..., 0] = 0.0
    k[..., : T // 2, 0] = signs[0] * 1e25
    k[..., T - 2, 0] = signs[1] * 1e25
    return [q, k, v]


def check_overflow(T: int, signs: tuple[int, int], dtype: torch.dtype, where: Any = "cpu") -> None:
    inputs = [x.to(where, dtype) for x in overflowing_inputs(T, signs)]
    expected, actual = reference.causal_attention(*inputs), ops.causal_attention(*inputs)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=4 * eps, equal_nan=True)
    assert expected.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signs", ((-1, 0), (-1, 1), (1, 0), (-1, -1)))
@pytest.mark.parametrize("T", (9, 40, 300))  # 300 keys are several blocks, the first of 128
def test_scores_that_overflow_are_those_of_the_reference(
    isa: str, T: int, signs: tuple[int, int], dtype: torch.dtype
) -> None:
    """A row with a score of +inf, or with only -inf, is nan; -inf among others has no weight."""
    check_overflow(T, signs, dtype)


def check_unseen(
    Tq: int, Tk: int, at: int, dtype: torch.dtype, where: Any = "cpu", **options: Any
) -> None:
    """Asserts that nan and inf behind the mask change no bit.

    Keys from `at` on must not affect the results and gradients of queries that mask them, and those
    queries must not affect the gradients of these keys.
    """
    shapes = ((1, 2, Tq, 20), (1, 2, Tk, 20), (1, 2, Tk, 20))
    inputs = [heads(*shape, seed=i).to(where, dtype) for i, shape in enumerate(shapes)]
    grad = heads(1, 2, Tq, 20, seed=9).to(where, dtype)
    clean = run(ops.causal_attention, inputs, dtype, grad, **options)
    before = at - (Tk - Tq)  # queries that mask key `at`
    for value in (math.nan, math.inf):
        for i in (1, 2):
            changed = [x.clone() for x in inputs]
            changed[i][:, :, at:] = value
            got = run(ops.causal_attention, changed, dtype, grad, **options)
            assert torch.equal(got[0][:, :, :before], clean[0][:, :, :before])
            assert torch.equal(got[1][:, :, :before], clean[1][:, :, :before])
            assert not got[0][:, :, before:].isfinite().all(-1).any()
        changed, bad = [x.clone() for x in inputs], grad.clone()
        changed[0][:, :, :before] = bad[:, :, :before] = value
        for q, g in ((changed[0], grad), (inputs[0], bad)):
            got = run(ops.causal_attention, (q, *inputs[1:]), dtype, g, **options)
            for a, b in zip(got[2:], clean[2:], strict=True):
                assert torch.equal(a[:, :, at:], b[:, :, at:])


UNSEEN = ((5, 5, 2), (16, 16, 13), (40, 40, 30), (40, 64, 51), (64, 40, 6), (150, 150, 101))
UNSEEN += ((300, 300, 129), (97, 200, 141), (200, 97, 50), (300, 300, 255))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
@pytest.mark.parametrize(("Tq", "Tk", "at"), UNSEEN)
def test_what_a_query_does_not_see_has_no_part_in_it(
    isa: str, Tq: int, Tk: int, at: int, dropout_p: float, dtype: torch.dtype
) -> None:
    check_unseen(Tq, Tk, at, dtype, dropout_p=dropout_p, seed=5)


@pytest.mark.parametrize(("Tq", "Tk", "at"), UNSEEN[:6])
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_of_the_reference_too(Tq: int, Tk: int, at: int, value: float) -> None:
    q, k, v = heads(1, 2, Tq, 8), heads(1, 2, Tk, 8, seed=1), heads(1, 2, Tk, 8, seed=2)
    clean, before = reference.causal_attention(q, k, v), at - (Tk - Tq)
    keys, values = k.clone(), v.clone()
    keys[:, :, at:] = values[:, :, at:, 3] = value
    of_keys, of_values = (reference.causal_attention(q, *x) for x in ((keys, v), (k, values)))
    assert torch.equal(of_keys[:, :, :before], clean[:, :, :before])
    assert torch.equal(of_values[:, :, :before], clean[:, :, :before])
    assert not of_values[:, :, before:, 3].isfinite().any()


def test_large_scores_do_not_overflow(isa: str) -> None:
    q, k, v = (heads(1, 1, 150, 16, seed=i) * 30 for i in range(3))  # scores up to 3,000
    grad = heads(1, 1, 150, 16, seed=9)
    oracle = run(reference.causal_attention, (q, k, v), torch.float64, grad)
    for a, o in zip(run(ops.causal_attention, (q, k, v), torch.float32, grad), oracle, strict=True):
        assert (a.double() - o).abs().max() <= 2e-3 * o.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", (300, 900))
def test_rows_of_a_batch_have_the_bits_they_have_alone(
    isa: str, T: int, dtype: torch.dtype
) -> None:
    # Several blocks of keys, which add to the same dQ if there are few heads; 900 in two rounds.
    q, k, v = (heads(5, 3, T, 40, seed=i).to(dtype).requires_grad_() for i in range(3))
    grad = heads(5, 3, T, 40, seed=4).to(dtype)
    out = ops.causal_attention(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    for count in (1, 2):
        torch.set_num_threads(count)
        one = [x[3:4].detach().requires_grad_() for x in (q, k, v)]
        alone = ops.causal_attention(*one)
        assert torch.equal(alone, out[3:4])
        for a, b in zip(torch.autograd.grad(alone, one, grad[3:4]), grads, strict=True):
            assert torch.equal(a, b[3:4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "queries"), [(16, range(16)), (300, (64, 65, 127, 128, 200, 299))])
def test_last_query_alone_has_the_bits_it_has_among_all(
    isa: str, dtype: torch.dtype, T: int, queries: Iterable[int]
) -> None:
    """For numbers of keys that lie on one side of every level's bound for small attention."""
    q, k, v = (heads(2, 2, T, 64, seed=i).to(dtype) for i in range(3))
    whole = ops.causal_attention(q, k, v)
    for t in queries:
        step = ops.causal_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        assert torch.equal(step[:, :, 0], whole[:, :, t])


def test_gradients_repeat_bitwise(isa: str) -> None:
    q, k, v = (heads(1, 2, 400, 32, seed=i).requires_grad_() for i in range(3))
    grads = []
    for _ in range(3):
        out = ops.causal_attention(q, k, v, dropout_p=0.1, seed=3)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_dropout_of_everything_gives_zeros(isa: str) -> None:
    q, k, v = (heads(1, 1, 20, 16, seed=i) for i in range(3))
    assert (ops.causal_attention(q, k, v, dropout_p=1.0, seed=1) == 0).all()


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_compiled_it_has_the_same_bits(dropout_p: float) -> None:
    leaves = [heads(2, 2, 20, 16, seed=i).requires_grad_() for i in range(3)]

    def attend(*inputs: Tensor) -> Tensor:
        return ops.causal_attention(*inputs, dropout_p=dropout_p, seed=torch.tensor(3))

    results = []
    for op in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        out = op(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_errors_name_argument_expected_and_got() -> None:
    q = heads(1, 2, 8, 16)
    with pytest.raises(ValueError, match=r"causal_attention: q must have 4 dimensions, got shape"):
        ops.causal_attention(q[0], q, q)
    with pytest.raises(ValueError, match=r"k must have shape \(1, 2, 8, 16\), got \(1, 3, 8, 16\)"):
        ops.causal_attention(q, heads(1, 3, 8, 16), q)
    with pytest.raises(TypeError, match=r"v must be torch.float32, got torch.bfloat16"):
        ops.causal_attention(q, q, q.bfloat16())
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\], got 1.5"):
        ops.causal_attention(q, q, q, dropout_p=1.5)
    with pytest.raises(TypeError, match=r"q must be a floating-point tensor, got torch.int64"):
        ops.causal_attention(q.long(), q, q)
