"""linear_cross_entropy against the float64 oracle and torch, at every instruction set."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing import assert_budget, autocast, check_op, run

DTYPES = (torch.float32, torch.bfloat16)


def case(M: int, K: int, V: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(M + K + V)
    x, weight = torch.randn(M, K, generator=generator), torch.randn(V, K, generator=generator) * 0.3
    return [x, weight, torch.randint(V, (M,), generator=generator)]


def norm_case(M: int, K: int, V: int) -> list[Tensor]:
    """Like `case`, with weight and bias of a norm."""
    generator = torch.Generator().manual_seed(M)
    return [*case(M, K, V), *(1 + torch.randn(2, K, generator=generator) * 0.3).unbind()]


def torch_linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, **options: int
) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets, **options)


def with_norm(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps `op`: the norm's parameters follow the targets."""

    def call(x: Tensor, weight: Tensor, targets: Tensor, ln_w: Tensor, ln_b: Tensor) -> Tensor:
        return op(x, weight, targets, ln_w=ln_w, ln_b=ln_b)

    return call


def torch_norm_linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ln_w: Tensor, ln_b: Tensor
) -> Tensor:
    return torch_linear_cross_entropy(F.layer_norm(x, x.shape[-1:], ln_w, ln_b), weight, targets)


# Below, at and above a block of 1536 columns; the gradients of 1700 rows are summed in parts.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "K", "V"),
    (
        (1, 16, 5),
        (3, 8, 1),
        (250, 64, 66),
        (97, 33, 1003),
        (500, 16, 5),
        (70, 32, 1536),
        (49, 24, 1537),
        (210, 16, 2500),
        (1700, 9, 21),
    ),
)
def test_budget(isa: str, M: int, K: int, V: int, dtype: torch.dtype) -> None:
    args = (ops.linear_cross_entropy, reference.linear_cross_entropy, torch_linear_cross_entropy)
    check_op(*args, case(M, K, V), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "V"), ((1, 16, 5), (250, 64, 66), (97, 33, 1700)))
def test_budget_with_norm(isa: str, M: int, K: int, V: int, dtype: torch.dtype) -> None:
    ours = with_norm(ops.linear_cross_entropy)
    args = (ours, with_norm(reference.linear_cross_entropy), torch_norm_linear_cross_entropy)
    check_op(*args, norm_case(M, K, V), dtype)


@pytest.mark.parametrize(("M", "K", "V"), ((250, 64, 66), (97, 33, 1700), (1700, 9, 21)))
def test_mixed_precision_keeps_to_the_budget(isa: str, M: int, K: int, V: int) -> None:
    ours, specified = map(with_norm, (ops.linear_cross_entropy, reference.linear_cross_entropy))
    args = (ours, specified, autocast(torch_norm_linear_cross_entropy))
    check_op(*args, norm_case(M, K, V), torch.bfloat16, activations=(0,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_without_bias_and_without_grad(isa: str, dtype: torch.dtype) -> None:
    x, weight, targets, ln_w, _ = (
        t.to(dtype) if t.is_floating_point() else t for t in norm_case(100, 24, 1200)
    )
    with torch.no_grad():
        ours = ops.linear_cross_entropy(x, weight, targets, ln_w=ln_w)
    trained = ops.linear_cross_entropy(x.requires_grad_(), weight, targets, ln_w=ln_w)
    expected = reference.linear_cross_entropy(x.detach().double(), weight, targets, ln_w=ln_w)
    assert ours == trained.detach()
    assert torch.allclose(ours.double(), expected, rtol=1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_rows(isa: str, dtype: torch.dtype) -> None:
    """A chunk has at most 40 Mi logits, here up to 1613 of the 1700 rows, at every level."""
    args = (ops.linear_cross_entropy, reference.linear_cross_entropy, torch_linear_cross_entropy)
    check_op(*args, case(1700, 8, 26000), dtype)


@pytest.mark.parametrize("masked", (5, 1536, 3071))
def test_logits_of_minus_infinity(isa: str, masked: int) -> None:
    """Also where all those of the first block of 1536 columns are."""
    x, weight = torch.ones(3, 1).requires_grad_(), torch.zeros(3072, 1)
    weight[:masked] = -torch.inf
    loss = ops.linear_cross_entropy(x, weight, torch.full((3,), 3071), reduction="none")
    assert torch.allclose(loss, torch.tensor(3072.0 - masked).log())
    (dlogits,) = torch.autograd.grad(
        ops.linear_cross_entropy(torch.ones(1, 1), (bias := weight.clone().requires_grad_()),
                                 torch.tensor([3071])), bias,
    )  # fmt: skip
    assert torch.isfinite(dlogits).all() and (dlogits[:masked] == 0).all()


def test_a_mean_by_tiny_weights(isa: str) -> None:
    inputs = case(6, 8, 5)
    x = inputs[0].requires_grad_()
    tiny = torch.full((6,), 1e-40)
    loss = ops.linear_cross_entropy(*inputs, token_weights=tiny)
    assert torch.allclose(loss, ops.linear_cross_entropy(*inputs), rtol=1e-4)
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


def test_gradients_by_batches() -> None:
    x, weight, targets = case(5, 8, 6)
    one = torch.autograd.functional.jacobian(
        lambda y: ops.linear_cross_entropy(y, weight, targets), x, vectorize=True
    )
    loss = ops.linear_cross_entropy(x.requires_grad_(), weight, targets)
    (several,) = torch.autograd.grad(loss, x, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    assert torch.equal(several, torch.stack([one, 2 * one]))


def test_a_single_row_without_leading_dimensions() -> None:
    x, weight, _ = case(1, 8, 6)
    ours, specified = (
        op.linear_cross_entropy(x[0], weight, torch.tensor(2)) for op in (ops, reference)
    )
    assert ours.shape == specified.shape == () and torch.allclose(ours, specified)


def test_parts_of_the_weights_gradient_do_not_depend_on_threads(isa: str) -> None:
    """A vocabulary of several shared pieces, whose parts of 1000 rows are added in order."""
    x, weight, targets = (each for each in case(1000, 64, 12000))
    grads = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        loss = ops.linear_cross_entropy(*leaves, targets)
        grads.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_targets_count_for_nothing(isa: str, dtype: torch.dtype) -> None:
    x, weight, targets = case(120, 32, 50)
    targets[::3] = 7
    inputs = [x, weight, targets]
    options = {"ignore_index": 7}
    args = (ops.linear_cross_entropy, reference.linear_cross_entropy, torch_linear_cross_entropy)
    check_op(*args, inputs, dtype, **options)
    dx = run(args[0], inputs, dtype, torch.ones(()), **options)[1]
    assert (dx[::3] == 0).all() and (dx[1::3] != 0).any()


def test_no_target_at_all_gives_zero(isa: str) -> None:
    x, weight, _ = case(10, 8, 5)
    x.requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, torch.full((10,), -100))
    loss.backward()
    assert loss.item() == 0.0 and x.grad is not None and (x.grad == 0).all()


def test_large_logits_do_not_overflow(isa: str) -> None:
    x, weight, targets = case(60, 16, 30)
    oracle = reference.linear_cross_entropy(x.double() * 100, weight.double() * 100, targets)
    own = torch_linear_cross_entropy(x * 100, weight * 100, targets)
    assert_budget(
        "loss", ops.linear_cross_entropy(x * 100, weight * 100, targets), own, oracle, 2.0
    )


@pytest.mark.slow
def test_large_vocabulary(isa: str) -> None:
    args = (ops.linear_cross_entropy, reference.linear_cross_entropy, torch_linear_cross_entropy)
    check_op(*args, case(200, 24, 50257), torch.float32)


def test_gradient_is_scaled_by_the_incoming_one(isa: str) -> None:
    x, weight, targets = case(40, 16, 30)
    plain = run(ops.linear_cross_entropy, [x, weight, targets], torch.float32, torch.ones(()))
    tripled = run(ops.linear_cross_entropy, [x, weight, targets], torch.float32, torch.tensor(3.0))
    assert torch.allclose(tripled[1], 3 * plain[1]) and torch.allclose(tripled[2], 3 * plain[2])


def test_targets_out_of_range_are_an_error(isa: str) -> None:
    x, weight, targets = case(40, 16, 30)
    for bad in (30, -1, 2**40):
        targets[17] = bad
        with pytest.raises(RuntimeError, match=rf"targets must be in \[0, 30\), got {bad}"):
            ops.linear_cross_entropy(x, weight, targets)


def test_errors_name_argument_expected_and_got() -> None:
    x, weight, targets = case(40, 16, 30)
    with pytest.raises(TypeError, match=r"targets must be torch.int64, got torch.int32"):
        ops.linear_cross_entropy(x, weight, targets.int())
    with pytest.raises(TypeError, match=r"targets must be on cpu, got meta"):
        ops.linear_cross_entropy(x, weight, targets.to("meta"))
    with pytest.raises(ValueError, match=r"targets must have shape \(40,\), got \(39,\)"):
        ops.linear_cross_entropy(x, weight, targets[1:])
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"label_smoothing must be in \[0, 1\), got {wrong}"):
            ops.linear_cross_entropy(x, weight, targets, label_smoothing=wrong)
    with pytest.raises(TypeError, match="label_smoothing must be a number, got a tensor"):
        learned = torch.tensor(0.1, requires_grad=True)
        ops.linear_cross_entropy(x, weight, targets, label_smoothing=learned)
    with pytest.raises(ValueError, match="ln_b needs ln_w, got ln_b alone"):
        ops.linear_cross_entropy(x, weight, targets, ln_b=torch.ones(16))


def token_weights(M: int) -> Tensor:
    """A weight per token: zero, above and below 1, negative."""
    return torch.linspace(-0.5, 2.0, M).where(torch.arange(M) % 5 > 0, 0.0)


def torch_weighted(
    x: Tensor, weight: Tensor, targets: Tensor, *, reduction: str, token_weights: Tensor | None,
    label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    losses = F.cross_entropy(
        F.linear(x, weight).float(), targets, reduction="none", label_smoothing=label_smoothing
    )
    if token_weights is not None:
        losses = losses * token_weights.to(losses)
    if reduction == "none":
        return losses
    total = losses.numel() if token_weights is None else token_weights.sum()
    return losses.sum() / (total if reduction == "mean" else 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize(("M", "K", "V"), ((1, 16, 5), (250, 33, 66), (97, 24, 1700)))
def test_reductions_and_token_weights(
    isa: str, M: int, K: int, V: int, reduction: str, weighted: bool, dtype: torch.dtype
) -> None:
    options = {
        "reduction": reduction,
        "token_weights": token_weights(M) + 0.1 if weighted else None,
    }
    args = (ops.linear_cross_entropy, reference.linear_cross_entropy, torch_weighted)
    check_op(*args, case(M, K, V), dtype, **options)


# One block of columns, and several, of which the last has another maximum than the first.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize(("M", "K", "V"), ((3, 8, 2), (250, 33, 66), (97, 24, 3100)))
def test_label_smoothing(
    isa: str, M: int, K: int, V: int, reduction: str, dtype: torch.dtype
) -> None:
    options = {
        "reduction": reduction,
        "token_weights": token_weights(M) + 0.1 if V == 66 else None,
        "label_smoothing": 0.7 if V == 66 else 0.1,
    }
    args = (ops.linear_cross_entropy, reference.linear_cross_entropy, torch_weighted)
    check_op(*args, case(M, K, V), dtype, **options)


def test_label_smoothing_and_ignored_targets(isa: str) -> None:
    x, weight, targets = case(120, 32, 50)
    targets[::3] = 7
    options = {"ignore_index": 7, "label_smoothing": 0.2}
    args = (ops.linear_cross_entropy, reference.linear_cross_entropy, torch_linear_cross_entropy)
    check_op(*args, [x, weight, targets], torch.float32, **options)
    dx = run(args[0], [x, weight, targets], torch.float32, torch.ones(()), **options)[1]
    assert (dx[::3] == 0).all() and (dx[1::3] != 0).any()


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_ignored_targets_have_no_weight(isa: str, reduction: str) -> None:
    x, weight, targets = case(120, 32, 50)
    targets[::3] = 7
    weights = token_weights(120)
    weights[::3] = torch.nan
    kept = torch.arange(120) % 3 > 0
    for op in (ops.linear_cross_entropy, reference.linear_cross_entropy):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        options = {"reduction": reduction, "ignore_index": 7}
        loss = op(*leaves, targets, token_weights=weights, **options)
        loss.sum().backward()
        those = [x[kept].clone().requires_grad_(), weight.clone().requires_grad_()]
        alone = op(*those, targets[kept], token_weights=weights[kept], **options)
        alone.sum().backward()
        torch.testing.assert_close(loss if reduction != "none" else loss[kept], alone)
        assert reduction != "none" or (loss[~kept] == 0).all()
        torch.testing.assert_close(leaves[0].grad[kept], those[0].grad)
        torch.testing.assert_close(leaves[1].grad, those[1].grad)
        assert (leaves[0].grad[~kept] == 0).all()


def test_weights_that_add_up_to_nothing_give_a_mean_of_zero(isa: str) -> None:
    x, weight, targets = case(10, 8, 5)
    for op in (ops.linear_cross_entropy, reference.linear_cross_entropy):
        leaf = x.clone().requires_grad_()
        loss = op(leaf, weight, targets, token_weights=torch.zeros(10))
        loss.backward()
        assert loss.item() == 0.0 and (leaf.grad == 0).all()


def test_losses_of_tokens_have_the_bits_of_a_text_alone(isa: str) -> None:
    x, weight, targets = case(60, 16, 30)
    together = ops.linear_cross_entropy(x, weight, targets, reduction="none")
    alone = ops.linear_cross_entropy(x[17:18], weight, targets[17:18], reduction="none")
    assert torch.equal(together[17:18], alone)
    shaped = ops.linear_cross_entropy(
        x.view(6, 10, 16), weight, targets.view(6, 10), reduction="none"
    )
    assert torch.equal(shaped.flatten(), together)


def test_a_mean_over_weights_that_add_up_to_0_is_0() -> None:
    x, weight, targets = case(2, 16, 5)
    for op in (ops.linear_cross_entropy, reference.linear_cross_entropy):
        leaf = x.detach().requires_grad_()
        loss = op(leaf, weight, targets, token_weights=torch.tensor([1.0, -1.0]))
        (dx,) = torch.autograd.grad(loss, leaf)
        assert loss == 0.0 and (dx == 0.0).all()


def test_errors_of_reductions_and_token_weights() -> None:
    x, weight, targets = case(40, 16, 30)
    with pytest.raises(ValueError, match=r"reduction must be one of .*, got 'max'"):
        ops.linear_cross_entropy(x, weight, targets, reduction="max")
    with pytest.raises(ValueError, match=r"token_weights must have shape \(40,\), got \(39,\)"):
        ops.linear_cross_entropy(x, weight, targets, token_weights=torch.ones(39))
    with pytest.raises(TypeError, match="token_weights must be a floating-point tensor"):
        ops.linear_cross_entropy(x, weight, targets, token_weights=targets)
    learned = torch.ones(40, requires_grad=True)
    message = "token_weights must be constants, .* multiply the losses of reduction='none'"
    with pytest.raises(TypeError, match=message):
        ops.linear_cross_entropy(x, weight, targets, token_weights=learned)
    with pytest.raises(TypeError, match=message):
        torch.func.grad(lambda w: ops.linear_cross_entropy(x, weight, targets, token_weights=w))(
            learned.detach()
        )


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("V", (50, 1600))
@pytest.mark.parametrize("offset", (1e4, 1e8))
def test_a_common_offset_of_the_logits_costs_no_digits(
    isa: str, V: int, offset: float, smoothing: float
) -> None:
    """The sum of exponentials is kept apart: added to the maximum it would be rounded away."""
    x, weight, targets = case(40, 8, V)
    x[:, 0], weight[:, 0] = 1.0, offset
    weight = weight.round()  # with x rounded as well, the logits are integers
    x = x.round()
    found = run(
        ops.linear_cross_entropy, [x, weight, targets], torch.float32, torch.ones(()),
        label_smoothing=smoothing,
    )  # fmt: skip
    wide = [x.double(), weight.double(), targets]
    logits = F.linear(x, weight)  # rounded to float32, as the kernel's are
    loss = F.cross_entropy(logits.double(), targets, label_smoothing=smoothing)
    assert found[0].item() == pytest.approx(loss.item(), rel=1e-5)
    expected = (1 - smoothing) * F.one_hot(targets, V) + smoothing / V
    dlogits = (logits.double().softmax(-1) - expected) / 40
    torch.testing.assert_close(found[2].double(), dlogits.t() @ wide[0], rtol=1e-4, atol=1e-6)
