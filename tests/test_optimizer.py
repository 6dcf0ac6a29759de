"""The fused clipping and AdamW against torch's, at every instruction set."""

import copy
from collections.abc import Callable, Sequence
from typing import Literal

import pytest
import torch
from torch import nn

from gptfast.ops import adamw, select
from gptfast.testing import RESULT_FACTOR, assert_budget
from gptfast.training.optimizer import AdamW, weight_groups

SHAPES = ((3,), (5, 7), (40_000,), (130, 300), (1,))
OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
EMA = 0.3  # lies between the limits of the second and the third step


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(params: Sequence[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def torch_step(optimizer: torch.optim.Optimizer, params: list, clip: float | None) -> None:
    if clip is not None:
        nn.utils.clip_grad_norm_(params, clip)
    optimizer.step()


def assert_close(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("clip", (None, 0.5, 1e6))
def test_steps_are_those_of_torch(isa: str, clip: float | None) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, torch_optimizer = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(6):
        set_gradients(ours, step), set_gradients(theirs, step)
        optimizer.clipped_step(clip)
        torch_step(torch_optimizer, theirs, clip)
        assert_close(ours, theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert optimizer.state[a]["step"] == torch_optimizer.state[b]["step"] == 6


def check_steps(
    ours: list[nn.Parameter],
    optimizer: AdamW,
    clip: float | None,
    steps: int,
    set_grads: Callable[[list, int], None] = set_gradients,
    decayed: Literal["all", "matrices"] = "all",
) -> None:
    """Holds an optimizer's steps to the error budget against float64, beside torch's in float32."""
    theirs = [nn.Parameter(param.detach().clone()) for param in ours]
    exact = [nn.Parameter(param.detach().double()) for param in ours]
    others = [
        (torch.optim.AdamW(weight_groups(params, decayed), **OPTIONS), params, copies_of(params))
        for params in (theirs, exact)
    ]
    for step in range(steps):
        for params in (ours, theirs, exact):
            set_grads(params, step)
        optimizer.clipped_step(clip)
        for other, params, averages in others:
            torch_step(other, params, clip)
            average(averages, params, step + 1)
    (_, _, own), (_, _, oracle) = others
    found = {"weights": (ours, theirs, exact)}
    if optimizer.averages:
        found["averages"] = (optimizer.averages, own, oracle)
    for name, lists in found.items():
        each = (torch.cat([x.detach().flatten() for x in tensors]) for tensors in lists)
        # Among many weights torch's largest error is never 0 by chance, so no rounding is added.
        assert_budget(name, *each, RESULT_FACTOR, scale=0.0)


def copies_of(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [param.detach().clone() for param in params]


def average(averages: list[torch.Tensor], params: Sequence[torch.Tensor], step: int) -> None:
    """The running means after a step, by their definition."""
    ema = min(EMA, (1 + step) / (10 + step))
    for mean, param in zip(averages, params, strict=True):
        mean.mul_(ema).add_(param.detach(), alpha=1 - ema)


@pytest.mark.parametrize(
    ("clip", "decayed", "ema"), ((None, "all", None), (0.5, "all", None), (0.5, "matrices", EMA))
)
def test_steps_keep_to_the_budget(
    isa: str, clip: float | None, decayed: Literal["all", "matrices"], ema: float | None
) -> None:
    ours = in_groups(parameters())
    optimizer = AdamW(weight_groups(ours, decayed), ema=ema, **OPTIONS)
    check_steps(ours, optimizer, clip, 20, decayed=decayed)


def in_groups(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters in the order of the groups of "matrices"."""
    return sorted(params, key=lambda param: param.dim() < 2)


def test_groups_have_their_own_decay_and_averages_change_nothing(isa: str) -> None:
    def moved(decay: float, decayed: Literal["all", "matrices"] = "all", ema: float | None = None):
        params = in_groups(parameters())
        options = OPTIONS | {"weight_decay": decay}
        optimizer = AdamW(weight_groups(params, decayed), ema=ema, **options)
        assert optimizer.by_kernel == (select.extension() is not None)
        for step in range(3):
            set_gradients(params, step)
            optimizer.clipped_step(0.5)
        return params

    with_decay, without, both = moved(0.1), moved(0.0), moved(0.1, "matrices", EMA)
    assert [group["weight_decay"] for group in AdamW(weight_groups(both, "matrices")).param_groups]
    for all_decay, none_decays, ours in zip(with_decay, without, both, strict=True):
        assert torch.equal(ours, all_decay if ours.dim() > 1 else none_decays)
        assert not torch.equal(all_decay, none_decays)


@pytest.mark.parametrize("fused", (True, False))
def test_averages_are_in_the_state_and_go_on(isa: str, fused: bool) -> None:
    params = parameters()
    assert AdamW(params).averages == []
    optimizer = AdamW(params, fused_kernel=fused, ema=EMA, **OPTIONS)
    first = copies_of(params)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.averages, first, strict=True))
    set_gradients(params, 0)
    params[1].grad = None
    optimizer.clipped_step(None)
    average(first, params, 1)
    assert_close(optimizer.averages, first)
    assert params[1] not in optimizer.state and torch.equal(optimizer.averages[1], params[1])
    again = copy.deepcopy(params)
    resumed = AdamW(again, fused_kernel=fused, ema=EMA, **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own in (params, again):
        set_gradients(own, 1)
    optimizer.clipped_step(1.0), resumed.clipped_step(1.0)
    for a, b in zip(optimizer.averages, resumed.averages, strict=True):
        assert torch.equal(a, b)
    torch.optim.AdamW(again, **OPTIONS).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_step_of_torch_moves_the_averages(dtype: torch.dtype) -> None:
    params = [nn.Parameter(param.detach().to(dtype)) for param in parameters()]
    optimizer, averages = AdamW(params, ema=EMA, **OPTIONS), copies_of(params)
    for step in range(1, 5):
        set_gradients(params, step)
        optimizer.step()
        average(averages, params, step)
        assert_close(optimizer.averages, averages)


def test_averages_start_where_a_state_has_none(isa: str) -> None:
    params = parameters()
    older = AdamW(params, **OPTIONS)
    set_gradients(params, 0)
    older.clipped_step(None)
    for fused in (True, False):
        own = copy.deepcopy(params)
        optimizer, averages = AdamW(own, fused_kernel=fused, ema=EMA, **OPTIONS), copies_of(own)
        optimizer.load_state_dict(copy.deepcopy(older.state_dict()))
        set_gradients(own, 1)
        optimizer.clipped_step(None)
        average(averages, own, 2)
        assert_close(optimizer.averages, averages)


def test_state_goes_to_torch_and_back(isa: str) -> None:
    params = parameters()
    optimizer = AdamW(params, **OPTIONS)
    set_gradients(params, 0)
    optimizer.clipped_step(1.0)
    with_torch, resumed = copy.deepcopy(params), copy.deepcopy(params)
    theirs, ours = torch.optim.AdamW(with_torch, **OPTIONS), AdamW(resumed, **OPTIONS)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for each in (params, with_torch, resumed):
        set_gradients(each, 1)
    optimizer.clipped_step(1.0), ours.clipped_step(1.0), torch_step(theirs, with_torch, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))
    assert_close(params, with_torch)


def test_parameters_without_gradient_stay(isa: str) -> None:
    params = parameters()
    before = [param.detach().clone() for param in params]
    set_gradients(params, 0)
    params[1].grad = None
    optimizer = AdamW(params, **OPTIONS)
    optimizer.clipped_step(1.0)
    assert [torch.equal(a, b) for a, b in zip(params, before, strict=True)] == [
        i == 1 for i in range(len(params))
    ]
    assert params[1] not in optimizer.state


def test_same_bits_for_any_number_of_threads(isa: str) -> None:
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        params = parameters()
        set_gradients(params, 0)
        AdamW(params, **OPTIONS).clipped_step(0.3)
        results.append(params)
    for params in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(params, results[0], strict=True))


def test_norm_is_the_one_before_clipping(isa: str) -> None:
    grads = [torch.full((20_000,), 3.0), torch.full((20_000,), 4.0)]
    zeros = [[torch.zeros(20_000) for _ in range(2)] for _ in range(3)]
    steps = [torch.zeros(()), torch.zeros(())]
    options = [0.0, 0.0], 1e-3, 0.9, 0.999, 1e-8, 1.0, 0.0
    norm = adamw.adamw_(zeros[0], grads, zeros[1], zeros[2], steps, [], *options)
    assert norm.item() == pytest.approx(5.0 * 20_000**0.5, rel=1e-6)
    assert (grads[0] == 3.0).all()


def test_a_gradient_that_is_not_finite_shows_in_every_weight(isa: str) -> None:
    params = parameters()
    set_gradients(params, 0)
    params[2].grad[17] = float("nan")
    AdamW(params, **OPTIONS).clipped_step(1.0)
    assert all(param.isnan().all() for param in params)


def test_without_clipping_a_norm_that_overflows_changes_no_other_weight(isa: str) -> None:
    ours, theirs = parameters(), parameters()
    for params in (ours, theirs):
        set_gradients(params, 0)
        params[2].grad.fill_(3e19)
    AdamW(ours, **OPTIONS).clipped_step(None)
    torch.optim.AdamW(theirs, **OPTIONS).step()
    assert bool(ours[2].isfinite().all())
    for i in range(len(ours)):
        if i != 2:
            torch.testing.assert_close(ours[i], theirs[i], rtol=1e-6, atol=1e-7)


def test_torch_does_what_the_kernel_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, fused in ((torch.float64, True), (torch.float32, False)):
        params = [nn.Parameter(param.detach().to(dtype)) for param in parameters()]
        theirs = copy.deepcopy(params)
        set_gradients(params, 0), set_gradients(theirs, 0)
        monkeypatch.setattr("gptfast.training.optimizer.adamw_", None)
        AdamW(params, fused_kernel=fused, **OPTIONS).clipped_step(0.5)
        torch_step(torch.optim.AdamW(theirs, fused=True, **OPTIONS), theirs, 0.5)
        assert all(torch.equal(a, b) for a, b in zip(params, theirs, strict=True))


@pytest.mark.parametrize("option", ("amsgrad", "maximize", "groups"))
def test_torch_does_what_other_options_ask_for(option: str) -> None:
    ours, theirs = parameters(), parameters()
    if option == "groups":
        options = OPTIONS
        args = [[{"params": p[:2], "lr": 1e-2}, {"params": p[2:]}] for p in (ours, theirs)]
    else:
        options, args = OPTIONS | {option: True}, [ours, theirs]
    optimizer = AdamW(args[0], **options)
    torch_optimizer = torch.optim.AdamW(args[1], fused=True, **options)
    for step in range(3):  # the gradients decrease, so amsgrad's maximum matters
        set_gradients(ours, step), set_gradients(theirs, step)
        for param in (*ours, *theirs):
            param.grad /= 10.0**step
        optimizer.clipped_step(None)
        torch_step(torch_optimizer, theirs, None)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.skipif(select.extension() is None, reason=f"{select.extension_error}")
def test_errors_name_argument_and_expected() -> None:
    w, step, three = [torch.zeros(4)], [torch.zeros(())], [torch.zeros(3)]
    options = 1e-3, 0.9, 0.999, 1e-8, 1.0, 0.0
    for wrong, message in (
        ((w, three, w, w, step, [], [0.0]), "grads must be contiguous float32"),
        ((w, w, w, w, step, three, [0.0]), "averages must be contiguous float32"),
        ((w, w, w, w, [torch.zeros(2)], [], [0.0]), "steps must be float32 tensors of one"),
        ((w, [], w, w, step, [], [0.0]), "grads, .* must be as many as weights"),
        ((w, w, w, w, step, [], []), "weight_decay must be as many as weights"),
        ((w, w, w, w, step, w * 2, [0.0]), "averages must be as many as weights, or none"),
    ):
        with pytest.raises(RuntimeError, match=f"adamw_: .*{message}"):
            adamw.adamw_(*wrong, *options)


def test_nothing_moves_where_an_argument_is_wrong() -> None:
    if select.extension() is None:
        pytest.skip(f"{select.extension_error}")
    weights, grads, means, squares, averages = (
        [torch.ones(4), torch.ones(6)] for _ in range(5)
    )  # fmt: skip
    steps = [torch.zeros(()), torch.zeros(2)]
    state = weights, grads, means, squares, steps, averages
    with pytest.raises(RuntimeError, match="steps must be float32 tensors of one"):
        adamw.adamw_(*state, [0.1, 0.1], 1e-3, 0.9, 0.999, 1e-8, 1.0, 0.9)
    assert steps[0] == 0.0
    assert all((x == 1.0).all() for x in (*weights, *grads, *means, *squares, *averages))


def test_no_parameters_are_refused_as_torch_refuses_them() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])
