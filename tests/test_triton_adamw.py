"""The Triton kernels of clipping and AdamW against torch, in the interpreter without a GPU."""

import copy
from collections.abc import Iterator

import pytest
import torch
from test_optimizer import (
    EMA,
    OPTIONS,
    assert_close,
    check_steps,
    in_groups,
    set_gradients,
    torch_step,
)
from torch import Tensor, nn

from gptfast.ops.adamw import adamw_
from gptfast.training.optimizer import AdamW, weight_groups

pytest.importorskip("triton")
from gptfast.ops.triton import KERNELS, adamw  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPES = ((3,), (5, 7), (5_000,), (13, 300), (1,))


@pytest.fixture(autouse=True, params=("interpreter", pytest.param("cuda", marks=pytest.mark.cuda)))
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the kernels on CPU tensors in the interpreter, or on a GPU."""
    if (request.param == "cuda") != CUDA:
        pytest.skip("Triton compiles on this machine" if CUDA else "torch finds no CUDA device")
    if CUDA:
        yield "cuda"
        return
    library = torch.library.Library("gptfast", "IMPL")
    library.impl("adamw_", KERNELS["adamw_"], "CPU", allow_override=True)
    yield "interpreter"
    library._destroy()


def own_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """Sets those of `set_gradients`, which draws them on the CPU."""
    on_cpu = [nn.Parameter(torch.empty(param.shape, dtype=param.dtype)) for param in params]
    set_gradients(on_cpu, step)
    for param, drawn in zip(params, on_cpu, strict=True):
        assert drawn.grad is not None
        param.grad = drawn.grad.to(DEVICE)


def optimizer_of(params: list[nn.Parameter]) -> AdamW:
    optimizer = AdamW(params, **OPTIONS)
    optimizer._kernel = True  # also without the extension
    return optimizer


def test_groups_and_averages_keep_to_the_budget() -> None:
    ours = in_groups(own_parameters())
    optimizer = AdamW(weight_groups(ours, "matrices"), ema=EMA, **OPTIONS)
    optimizer._kernel = True
    assert optimizer.by_kernel and len(optimizer.param_groups) == 2
    check_steps(ours, optimizer, 0.5, 4, give_gradients, "matrices")


@pytest.mark.parametrize("clip", (None, 0.5))
def test_steps_keep_to_the_budget(clip: float | None) -> None:
    ours = own_parameters()
    optimizer = optimizer_of(ours)
    check_steps(ours, optimizer, clip, 4, give_gradients)
    assert [optimizer.state[param]["step"].item() for param in ours] == [4.0] * len(ours)


def test_state_goes_to_torch_and_back() -> None:
    params = own_parameters()
    optimizer = optimizer_of(params)
    give_gradients(params, 0)
    optimizer.clipped_step(1.0)
    with_torch, resumed = copy.deepcopy(params), copy.deepcopy(params)
    theirs, ours = torch.optim.AdamW(with_torch, **OPTIONS), optimizer_of(resumed)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for each in (params, with_torch, resumed):
        give_gradients(each, 1)
    optimizer.clipped_step(1.0), ours.clipped_step(1.0), torch_step(theirs, with_torch, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))
    assert_close(params, with_torch)


def tensors(count: int, generator: torch.Generator) -> tuple[list[Tensor], ...]:
    """Weights, gradients, moments, averages, of a length that no block divides, and steps."""
    found = [[torch.rand(count, generator=generator).to(DEVICE)] for _ in range(5)]
    return *found, [torch.tensor(3.0, device=DEVICE)]


@pytest.mark.parametrize("count", (1, 2049, 5000))
def test_gradients_at_any_address_give_the_same_bits(count: int) -> None:
    """A tensor may start at any multiple of 4 bytes; the kernel then reads single numbers."""
    weights, grads, means, squares, averages, steps = tensors(
        count, torch.Generator().manual_seed(1)
    )
    buffer = torch.full((count + 2,), torch.nan, device=DEVICE)
    buffer[1:-1] = grads[0]
    found = []
    for grad in (grads, [buffer[1:-1]]):
        own = copy.deepcopy((weights, grad, means, squares, steps, averages))
        own = own[0], grad, *own[2:]
        norm = adamw_(*own, [0.1], 1e-2, 0.9, 0.99, 1e-8, 0.5, 0.9)
        assert adamw.PointerTable(*own, [0]).aligned == (grad is grads)
        found.append([norm, own[0][0], own[2][0], own[3][0], own[5][0], own[4][0]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][1].isfinite().all() and found[0][-1] == 4.0


def test_the_norm_is_the_one_before_clipping() -> None:
    grads = [torch.full((9000,), 3.0, device=DEVICE), torch.full((9000,), 4.0, device=DEVICE)]
    zeros = [[torch.zeros(9000, device=DEVICE) for _ in range(2)] for _ in range(3)]
    steps = [torch.zeros((), device=DEVICE) for _ in range(2)]
    state = zeros[0], grads, zeros[1], zeros[2], steps, []
    norm = adamw_(*state, [0.0, 0.0], 1e-3, 0.9, 0.999, 1e-8, 1.0, 0.0)
    assert norm.item() == pytest.approx(5.0 * 9000**0.5, rel=1e-6)
    assert (grads[0] == 3.0).all()


def test_a_gradient_that_is_not_finite_shows_in_every_weight() -> None:
    params = own_parameters()
    give_gradients(params, 0)
    params[2].grad[17] = torch.nan
    optimizer_of(params).clipped_step(1.0)
    assert all(param.isnan().all() for param in params)


def test_without_clipping_a_norm_that_overflows_changes_no_other_weight() -> None:
    ours, theirs = own_parameters(), own_parameters()
    for params in (ours, theirs):
        give_gradients(params, 0)
        params[2].grad.fill_(3e19)
    optimizer_of(ours).clipped_step(None)
    torch.optim.AdamW(theirs, **OPTIONS).step()
    assert bool(ours[2].isfinite().all())
    for i in range(len(ours)):
        if i != 2:
            torch.testing.assert_close(ours[i], theirs[i], rtol=1e-5, atol=1e-6)


def test_chunks_cover_every_element_once() -> None:
    for sizes in ((3, 0, 5), (2048,), (2049, 1), (50257 * 768, 1024 * 768, 768, 3), (1,) * 5000):
        chunk, chunks = adamw._chunks(sizes)
        assert chunk % adamw.BLOCK == 0 and chunk & chunk - 1 == 0
        assert len(chunks) <= adamw.MAX_CHUNKS + len(sizes)
        covered = [0] * len(sizes)
        for parameter, start in chunks.tolist():
            assert start == covered[parameter] and start % chunk == 0
            covered[parameter] += chunk
        for size, end in zip(sizes, covered, strict=True):
            assert max(1, size) <= end < max(1, size) + chunk


def test_wrong_tensors_are_refused_by_name() -> None:
    w, options = [torch.zeros(4, device=DEVICE)], ([0.0], 1e-3, 0.9, 0.999, 1e-8, 1.0, 0.0)
    step = [torch.zeros((), device=DEVICE)]
    three, eight = (torch.zeros(n, device=DEVICE) for n in (3, 8))
    elsewhere = [torch.zeros(4)] if CUDA else []
    for wrong in (three, w[0].double(), eight[::2], *elsewhere):
        with pytest.raises(RuntimeError, match="adamw_: grads must be contiguous float32"):
            adamw_(w, [wrong], w, w, step, [], *options)
    with pytest.raises(RuntimeError, match="adamw_: steps must be float32 tensors of one"):
        adamw_(w, w, w, w, [torch.zeros(2, device=DEVICE)], [], *options)
    with pytest.raises(RuntimeError, match="adamw_: averages must be contiguous float32"):
        adamw_(w, w, w, w, step, [three], *options)
    with pytest.raises(RuntimeError, match="adamw_: weight_decay must be as many .* 1, got 0"):
        adamw_(w, w, w, w, step, [], [], *options[1:])
