"""Shared by all benchmarks: rows, their verification and timing.

A script describes its rows; `command.main` runs them. A row is verified before it is timed: of the
others, those that are wrong leave it.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptfast.testing import Op, assert_budget, check_results, error

Run = Callable[[], Any]  # a contender: does the work once
Results = Callable[[], list[Tensor]]  # a contender that returns its results: output, gradients

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = "gptfast"
# The largest difference from the float64 result, relative to its largest value, of a contender that
# does the same work; gptfast must also meet the error budget. In bfloat16, torch's LayerNorm sums
# its parameters' gradients in bfloat16 and is 15 % off at 4096 rows.
SAME_WORK = {"fp32": 1e-3, "bf16": 0.3}
MIN_ROUNDS, MIN_SLOW_ROUNDS, MAX_ROUNDS = 5, 3, 1000
WAKE_SECONDS = 0.02
WARM_UPS = 3  # steps before the capture of a CUDA graph
PEAK_SIZES = ((512, 512, 512), (1024, 1024, 1024), (4096, 512, 128), (2048, 768, 3072))
GPU_PEAK_SIZES = ((8192, 8192, 8192),)
PEAK_REPETITIONS = 10


@dataclass
class Case:
    """A row with its tensors: the contenders to time, and their verification."""

    contenders: dict[str, Run]  # gptfast comes first
    flops: float  # useful FLOPs: without masked scores and without recomputation in a backward
    # returns why the results of other contenders are wrong, by name; raises AssertionError if
    # gptfast's are, or if there is nothing to hold them to
    verify: Callable[[], dict[str, str]]
    compiles: tuple[str, ...] = ()  # contenders whose first call compiles
    other_dtype: tuple[str, ...] = ()  # contenders that compute in another dtype than the row's
    # seconds to wait after a contender's call until its spinning threads sleep, by name
    rests: Mapping[str, float] = field(default_factory=dict)
    # further measurements of gptfast by name, given its median in seconds
    details: Callable[[float], dict[str, float]] | None = None
    # after the verification: the largest relative error of each contender's results in the 2-norm
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A row of a script's table; `build` makes its tensors."""

    name: str
    dtype: str  # a key of DTYPES
    build: Callable[[], Case]
    quick: bool = False  # small enough for --quick
    alone: dict[str, Callable[[], Run]] = field(default_factory=dict)  # builder per contender

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}"


@dataclass(frozen=True)
class Timing:
    """The number of rounds, and the median seconds per contender."""

    rounds: int
    seconds: dict[str, float]


def random_tensors(*shapes: tuple[int, ...], dtype: str, scale: float = 1.0) -> list[Tensor]:
    """Makes normally distributed tensors of these shapes, from a fixed seed."""
    device = torch.get_default_device()
    generator = torch.Generator(device).manual_seed(1)
    made = (torch.randn(shape, generator=generator, device=device) * scale for shape in shapes)
    return [x.to(DTYPES[dtype]) for x in made]


def forward_backward(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor
) -> Results:
    """Makes a contender of a forward and a backward pass; returns output and gradients."""

    def run() -> list[Tensor]:
        out = forward()
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return run


def work(op: Op, inputs: Sequence[Tensor], grad: Tensor | None) -> Results:
    """Makes a contender that calls `op`: forward and, unless `grad` is None, backward."""
    if grad is None:

        def run() -> list[Tensor]:
            with torch.no_grad():
                return [op(*inputs)]

        return run
    leaves = [x.detach().requires_grad_(x.dtype.is_floating_point) for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]
    return forward_backward(lambda: op(*leaves), wanted, grad)


def wide(x: Tensor) -> Tensor:
    """Converts a floating-point tensor to float64; returns others unchanged."""
    return x.detach().double() if x.dtype.is_floating_point else x


def compare(
    contenders: dict[str, Results],
    oracle: Results,
    flops: float,
    dtype: str,
    *,
    checked: dict[str, Results] | None = None,
    part: Callable[[Tensor], Tensor] = lambda x: x,
    one_scale: bool = False,
    compiles: tuple[str, ...] = (),
) -> Case:
    """Makes the case of contenders that do the same work on the same tensors.

    Args:
        contenders: First gptfast, then others in torch; the first that is right defines the budget.
        oracle: The same work in float64.
        flops: See `Case`.
        dtype: See `Row`.
        checked: Contenders to verify instead, by the same names. With dropout they do the same work
            with equal masks, because the timed ones draw their own.
        part: Selects the part of each result that the oracle computes.
        one_scale: The rounding in the budget of every gradient is that of the largest gradient.
        compiles: See `Case`.
    """

    def verify() -> dict[str, str]:
        chosen = contenders if checked is None else checked
        running = [name for name in chosen if name in case.contenders]
        results = {name: [part(x) for x in chosen[name]()] for name in running}
        expected = oracle()
        wrong, right = {}, []
        for name in running:
            case.errors[name] = relative_error(results[name], expected)
            why = other_work(results[name], expected, dtype)
            if name != OURS and why:
                wrong[name] = why
            elif name != OURS:
                right.append(name)
        assert right, f"no other result is right, so there is no error to hold {OURS}'s to"
        scale = max(x.abs().max().item() for x in expected[1:]) if one_scale else None
        check_results(results[OURS], results[right[0]], expected, scale)
        return wrong

    case = Case(dict(contenders), flops, verify, compiles)
    return case


def relative_error(results: Sequence[Tensor], oracle: Sequence[Tensor]) -> float:
    """Returns the largest error of a result in the 2-norm, relative to the oracle's."""
    return max(
        float((x.double() - expected).norm() / expected.norm().clamp(min=1e-30))
        for x, expected in zip(results, oracle, strict=True)
    )


def other_work(results: Sequence[Tensor], oracle: Sequence[Tensor], dtype: str) -> str | None:
    """Returns how a contender's results in `dtype` differ from the oracle's; None: SAME_WORK."""
    for i, (x, expected) in enumerate(zip(results, oracle, strict=True)):
        bound = SAME_WORK[dtype] * expected.abs().max().item()
        if not error(x, expected) <= bound:  # also where it is NaN
            return f"does other work: result {i} is not the same"
    return None


def assert_same_work(
    name: str, results: Sequence[Tensor], oracle: Sequence[Tensor], dtype: str
) -> None:
    """Asserts that the results of a contender in `dtype` are the oracle's within SAME_WORK."""
    why = other_work(results, oracle, dtype)
    assert why is None, f"{name} {why}"


def drop_contenders_that_err(case: Case) -> dict[str, str]:
    """Verifies a case, removes other contenders whose results are wrong, and says why by name.

    Raises:
        AssertionError: The results of gptfast are wrong, or cannot be verified.
    """
    wrong = case.verify()
    for name in wrong:
        case.contenders.pop(name, None)
    return {name: f"not timed: {why}" for name, why in wrong.items()}


def compiled(op: Op, mode: str | None = None) -> Op:
    """Wraps `op` in torch.compile, which is first called when the result is."""

    @functools.cache
    def get() -> Op:
        return torch.compile(op, dynamic=False, mode=mode)

    return lambda *args, **options: get()(*args, **options)


def captured(step: Run) -> Callable[[], Run]:
    """Returns a function that captures `step` as a CUDA graph, once, and returns its replay."""

    @functools.cache
    def get() -> Run:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):  # allocate what a step keeps
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            step()
        return graph.replay

    return get


def plain_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight' by gptfast's operator alone; x (M, K), weight (N, K) -> (M, N)."""
    return torch.ops.gptfast.linear(x, None, None, weight, None, None)[0]


def measure(
    contenders: dict[str, Run], seconds: float, rests: Mapping[str, float] | None = None
) -> Timing:
    """Times the contenders in turn, each once a round, after a round that warms up.

    Args:
        contenders: By name.
        seconds: The intended total time of the rounds; see `count_rounds`.
        rests: Seconds of sleep after a call of a contender, by name; all threads are woken up
            before the next call.
    """
    names = list(contenders)
    first = [_seconds(contenders[name]) for name in names]
    rounds = count_rounds(seconds, sum(first))
    for _ in range(rounds // 10):
        for name in names:
            contenders[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        for name in ordered(names, round_):
            times[name].append(_seconds(contenders[name]))
            if rests and name in rests:
                time.sleep(rests[name])
                _wake_processors()
    return Timing(rounds, {name: statistics.median(times[name]) for name in names})


def _wake_processors() -> None:
    """Keeps all threads busy briefly, because the first loop after a sleep takes milliseconds."""
    x, start = torch.ones(1 << 20), time.perf_counter()
    while time.perf_counter() - start < WAKE_SECONDS:
        x.neg_()


def count_rounds(seconds: float, one_round: float) -> int:
    """Returns how many rounds fit: at least 5, or 3 if a single round exceeds the time."""
    least = MIN_SLOW_ROUNDS if one_round > seconds else MIN_ROUNDS
    return max(least, min(int(seconds / one_round), MAX_ROUNDS))


def ordered(names: Sequence[str], round_: int) -> list[str]:
    """Returns the order of a round: rotated every second round, reversed in odd rounds.

    The previous contender determines the contents of the caches; of three contenders, each follows
    either of the others equally often.
    """
    start = round_ // 2 % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if round_ % 2 else order


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(dtype: str, quick: bool = False) -> dict[str, Any]:
    """Measures the fastest matrix product that torch.mm or gptfast reaches here.

    Args:
        dtype: A key of DTYPES.
        quick: Measure only the smallest size.

    Returns:
        `gflops`, `by` (the name of the faster one) and `size`.

    Raises:
        AssertionError: The product of gptfast exceeds the error budget.
    """
    found: dict[str, Any] = {"gflops": 0.0}
    sizes = PEAK_SIZES if torch.get_default_device().type == "cpu" else GPU_PEAK_SIZES
    for M, K, N in sizes[:1] if quick else sizes:
        x, weight = random_tensors((M, K), (N, K), dtype=dtype)
        with torch.no_grad():
            own, actual = torch.mm(x, weight.t()), plain_linear(x, weight)
            assert_budget("matrix product", actual, own, wide(x) @ wide(weight).t(), 2.0)
            products: dict[str, Run] = {
                "torch.mm": functools.partial(torch.mm, x, weight.t()),
                OURS: functools.partial(plain_linear, x, weight),
            }
            for _ in range(PEAK_REPETITIONS):
                for name, run in products.items():
                    gflops = 2e-9 * M * K * N / _seconds(run)
                    if gflops > found["gflops"]:
                        found = {"gflops": gflops, "by": name, "size": f"{M}x{K}x{N}"}
    return found
