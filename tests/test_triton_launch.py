"""How Triton's kernels are launched: by the right compiled code, and how many of them in a step."""

import ast
import contextlib
import dataclasses
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from launches import launched_by
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from gptfast import GPT, GPTConfig, ops
from gptfast.ops import library, select
from gptfast.training.graph import Cuda

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from gptfast.ops import triton as kernels  # noqa: E402
from gptfast.ops.triton import launch, recording, rows  # noqa: E402

SOURCES = [*Path(kernels.__file__).parent.glob("*.py")]


def probe(x, y, n, m, p, K: int, MODE: triton.language.constexpr, BM: triton.language.constexpr):  # type: ignore[no-untyped-def]
    """Nothing is compiled of it."""


class Recorder:
    """A driver and a compiler that note what would be launched, and for what it was compiled."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.compiled: list[Any] = []
        self.stream = 7

    def compile(self, source: Any, target: Any, options: Any) -> Any:
        """Stands for triton.compile."""
        made = source.signature, source.constants, source.attrs, sorted(options.items(), key=str)
        self.compiled.append(made)

        def run(*args: Any) -> None:
            self.launched.append(args)

        return SimpleNamespace(
            run=run, function=str(made), packed_metadata="packed",
            metadata=SimpleNamespace(target=target), launch_metadata=lambda *_: None,
        )  # fmt: skip

    def driver(self, backend: str = "cuda") -> Any:
        """A driver of one device."""
        arch: Any = 90 if backend == "cuda" else "gfx942"
        return Mock(
            get_current_target=lambda: GPUTarget(backend, arch, 32 if backend == "cuda" else 64),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: self.stream,
        )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Kernels are compiled and launched by this Recorder."""
    found = Recorder()
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "shared_limit", lambda: 1000)
    monkeypatch.setattr(triton.runtime.driver, "_active", found.driver())
    monkeypatch.setattr(triton.compiler, "compile", found.compile)
    return found


def compiled_probe(choice: launch.Choice | None = None) -> launch.Kernel:
    return launch.Kernel(JITFunction(probe, do_not_specialize=["m"]), choice)


ALIGNED, SHIFTED = torch.zeros(64), torch.zeros(65)[1:]
DESCRIBED = [
    TensorDescriptor(torch.zeros(8, 32, dtype=dtype), [8, 32], [32, 1], [4, columns])
    for dtype, columns in ((torch.float16, 16), (torch.float16, 32), (torch.float32, 16))
]
POINTERS = (
    *DESCRIBED,
    None, ALIGNED, SHIFTED, ALIGNED.bfloat16(), torch.zeros(65, dtype=torch.bfloat16)[1:],
    torch.nn.Parameter(ALIGNED), torch.zeros(64, dtype=torch.int64), torch.zeros(0),
)  # fmt: skip
NUMBERS = (
    0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31) - 1, 2**62, 2**63,
    True, False, None, 1.0, 0.5,
)  # fmt: skip
CONSTANTS = (1, True, 1.0, 16, "a", None)


def test_a_kept_launch_is_the_one_that_triton_makes(recorder: Recorder) -> None:
    kernel, draw = compiled_probe(), random.Random(3)
    for _ in range(1500):
        args = (
            draw.choice(POINTERS), draw.choice(POINTERS), draw.choice(NUMBERS),
            draw.choice(NUMBERS), draw.choice((0.5, 1.0, None)), draw.choice((1, 8, 16)),
        )  # fmt: skip
        constants = {"MODE": draw.choice(CONSTANTS), "BM": 16}
        options = draw.choice(({}, {"num_warps": 8}, {"num_warps": 8, "num_stages": 1}))
        kernel[lambda meta: (meta["BM"], 2)](*args, **constants, **options)
        before = len(recorder.compiled)
        kernel[lambda meta: (meta["BM"], 2)](*args, **constants, **options)
        kernel.function[16, 2](*args, **constants, **options)
        direct, by_triton = recorder.launched[-2:]
        assert direct[6:9] == (None,) * 3 and by_triton[7] is not None  # the metadata and the hooks
        assert len(recorder.compiled) == before and direct[:6] == by_triton[:6]
        for own, whole in zip(direct[9:], by_triton[9:], strict=True):
            assert own == whole.data_ptr() if isinstance(whole, Tensor) else own is whole
    assert len(recorder.compiled) > 300


@pytest.mark.cuda
def test_torch_draws_random_numbers_after_a_capture_that_failed() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    device, number = torch.device("cuda"), torch.ones((), device="cuda")
    with pytest.raises(RuntimeError, match="captur"):
        Cuda(device).capture(lambda: torch.tensor(number.item()))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert bool(torch.rand(3, device="cuda").isfinite().all())
    assert Cuda(device).capture(lambda: number + 1)().item() == 2.0


@pytest.mark.cuda
def test_kept_launches_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    monkeypatch.setattr(rows.layer_norm_kernel, "_readers", {})
    weight, streams = torch.ones(48, device="cuda"), (torch.cuda.Stream(), torch.cuda.Stream())
    for round in range(3):
        if round:
            never = Mock(side_effect=AssertionError("through Triton"))
            monkeypatch.setattr(launch.Kernel, "_launch_by_triton", never)
        for dtype, shift, stream in itertools.product(
            (torch.float32, torch.bfloat16), (0, 1), streams
        ):
            x = torch.randn(7 * 48 + 1, device="cuda").to(dtype)[shift:][: 7 * 48].view(7, 48)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)  # what runs on another stream comes too early
                x *= 3
                y, mean, _ = rows.layer_norm(x, weight, None)
            stream.synchronize()
            expected = torch.nn.functional.layer_norm(x.float(), (48,))
            torch.testing.assert_close(y.float(), expected, atol=2e-2, rtol=2e-2)
            torch.testing.assert_close(mean, x.float().mean(1))


@pytest.mark.cuda
def test_plans_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")

    def call(shape: tuple[int, ...], shift: int, grad: bool) -> list[Tensor]:
        """Attention of new tensors, which lie where others have been, `shift` elements further."""
        count = math.prod(shape)
        torch.manual_seed(count + shift)
        memory = torch.randn(3, count + 64, device="cuda").bfloat16()
        q, k, v = (x[shift : shift + count].view(shape).requires_grad_(grad) for x in memory)
        out = ops.causal_attention(q, k, v)
        return [out, *(torch.autograd.grad(out, (q, k, v), torch.ones_like(out)) if grad else ())]

    shapes = ((2, 4, 64, 32), (4, 4, 32, 32), (2, 2, 64, 64))
    cases = [*itertools.product(shapes, (0, 1, 8), (False, True))]
    recording.forget()
    expected = [call(*case) for case in cases]
    for round in range(4):
        if round == 2:  # the second round was recorded
            never = Mock(side_effect=AssertionError("not by plan"))
            monkeypatch.setattr(launch, "tell", never)
        for case, want in zip(cases, expected, strict=True):
            assert all(map(torch.equal, call(*case), want))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what runs on another stream comes too early
        x = torch.randn(2, 4, 64, 32, device="cuda").bfloat16()
        out = ops.causal_attention(x, x, x)
    stream.synchronize()
    assert torch.equal(ops.causal_attention(x, x, x), out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.causal_attention(x, x, x)
    recording.forget()  # a graph keeps a copy of what was launched
    graph.replay()
    assert torch.equal(captured, out)


def test_numbers_of_a_kind_share_a_kept_launch(recorder: Recorder) -> None:
    kernel = compiled_probe()
    for n, m in itertools.product(range(160, 1600, 160), range(5, 50)):
        kernel[1,](ALIGNED, None, n, m, 0.5, 8, MODE="a", BM=16)
    (reader,) = kernel._readers.values()
    assert len(reader.launches) == 1 and len(recorder.launched) == 9 * 45
    assert recorder.launched[-1][9:] == (ALIGNED.data_ptr(), None, 1440, 49, 0.5, 8, "a", 16)


def test_a_launch_takes_the_stream_and_the_grid_of_its_call(recorder: Recorder) -> None:
    kernel = compiled_probe()
    for stream, grid in ((7, (5,)), (8, (6, 2)), (9, (7, 1, 3))):
        recorder.stream = stream
        kernel[grid](ALIGNED, None, 1, 1, 0.5, 8, MODE=1, BM=16)
        assert recorder.launched[-1][:4] == (*grid, 1, 1)[:3] + (stream,)


def test_what_triton_must_see_goes_through_it(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_triton(kernel: launch.Kernel) -> bool:
        for _ in range(2):
            kernel[1,](ALIGNED, None, 1, 1, 0.5, 8, MODE=1, BM=16)
        return recorder.launched[-1][7] is not None

    assert not by_triton(compiled_probe())
    hooks, hook = triton.knobs.runtime.launch_enter_hook, Mock()
    hooks.add(hook)
    assert by_triton(compiled_probe())
    hooks.remove(hook)
    monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", hook)
    assert by_triton(compiled_probe())
    monkeypatch.undo()


@pytest.mark.parametrize(("version", "backend"), (("3.5.1", "cuda"), ("99.0", "cuda"), ("", "hip")))
def test_an_unknown_triton_launches_by_itself(
    version: str, backend: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", version or triton.__version__)
    monkeypatch.setattr(triton.runtime.driver, "_active", recorder.driver(backend))
    kernel = compiled_probe()
    for _ in range(2):
        kernel[1,](ALIGNED, None, 1, 1, 0.5, 8, MODE=1, BM=16)
    assert recorder.launched[-1][7] is not None and not kernel._readers
    assert launch.slow_launches()


def table(*configs: Any) -> launch.Choice:
    return launch.Choice(
        {"a": list(configs)}, lambda args: args["MODE"], lambda args: args["BM"] * args["K"], ["K"]
    )


def tiles(kernel: launch.Kernel, recorder: Recorder, K: int = 1) -> int:
    """Launches a kernel and returns the BM of its configuration."""
    kernel[lambda meta: (meta["BM"],)](ALIGNED, None, 1, 1, 0.5, K, MODE="a")
    return int(recorder.launched[-1][0])


def test_the_first_configuration_that_fits_is_taken(recorder: Recorder) -> None:
    first, second = launch.config(4, 3, BM=64), launch.config(4, 2, BM=32)
    kernel = compiled_probe(table(first, second))
    for _ in range(2):  # numbers of the key do not share a launch
        assert [tiles(kernel, recorder, K) for K in (2, 20, 200)] == [64, 32, 32]
    assert [kernel.chosen({"MODE": "a", "K": K})["BM"] for K in (2, 20)] == [64, 32]
    assert compiled_probe().chosen({}) == {}
    kernel.configs = [second]
    assert tiles(kernel, recorder, 2) == 32
    unseen = compiled_probe(
        launch.Choice({"a": [first, second]}, lambda args: args["n"], lambda args: 0, ["K"])
    )
    with pytest.raises(KeyError, match="n"):  # a number that is not in the key
        tiles(unseen, recorder)


def test_every_kernel_is_launched_by_way_of_launch() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    names = {
        node.func.value.id
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
    }  # fmt: skip
    decorated = {
        node.name: [ast.unparse(each).partition("(")[0] for each in node.decorator_list]
        for node in nodes
        if isinstance(node, ast.FunctionDef)
    }
    launched = {name: decorated[name][0] for name in names if decorated.get(name)}
    assert len(launched) > 10 and set(launched.values()) == {"kernel", "tuned"}
    host = ("triton.cdiv", "triton.next_power_of_2")  # 4 us each
    used = [each for path in SOURCES for each in host if f"{each}(" in path.read_text()]
    assert used == []


def test_a_descriptor_is_the_one_that_triton_makes() -> None:
    x = torch.zeros(4, 8, 32, dtype=torch.float16)[:, ::2]
    whole = TensorDescriptor(x, [*x.shape], [*x.stride()], [1, 4, 16])
    made = launch.descriptor(x, 1, 4, 16)
    names = [each.name for each in dataclasses.fields(whole)]
    assert [getattr(made, name) for name in names[1:]] == [
        getattr(whole, name) for name in names[1:]
    ]
    assert made.base is x and type(made) is TensorDescriptor


def test_launches_are_counted() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = torch.randn(5, 16, device=device), torch.ones(16, device=device)
    with launch.counted() as counts:
        y, _, _ = rows.layer_norm(x, weight, None)
        rows.layer_norm(x, weight, None)
    assert counts == {"layer_norm_kernel": 2}
    assert torch.allclose(y, torch.nn.functional.layer_norm(x, (16,)), atol=1e-5)
    with launch.counted(run=False) as counts:
        rows.layer_norm(torch.empty(5, 16, device="meta"), weight, None)
    assert counts == {"layer_norm_kernel": 1}


class Subclass(Tensor):
    pass


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
        return function(*args, **(kw or {}))


def test_an_operator_goes_through_torch_where_anything_watches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []
    x = torch.ones(1, 1, 1, 1)

    def watch(y: Tensor) -> Tensor:
        seen.append(library.unobserved((y, x, 1, 2.0, None, "erf", True, torch.float32)))
        return y.clone()

    watch(x)
    watch(torch.nn.Parameter(x))
    assert seen == [True, True]
    watch(x.as_subclass(Subclass))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for mode in (Mode(), fake, torch.device("cpu"), profile(), forward_ad.dual_level()):
        with mode:
            watch(x)
    torch.vmap(watch)(x)
    torch.func.grad(lambda y: watch(y).sum())(x)
    torch.jit.trace(watch, x, check_trace=False)
    assert not any(seen[2:]) and len(seen) == 11
    called = Mock(return_value=(x, x))
    monkeypatch.setitem(library.KERNELS, ("attention", False), called)
    monkeypatch.setattr(select, "extension_error", None)
    assert ops.causal_attention(x, x, x).data_ptr() == x.data_ptr()
    called.assert_called_once_with(x, x, x, 1.0, 0.0, None, 0)


class LaunchesOfTorch(TorchDispatchMode):
    """Runs operators' launchers on tensors without data, and counts what torch would launch.

    Each of its operators counts as one kernel; some launch more.
    """

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operator."""
        name = function.name().partition("::")[2].partition(".")[0]
        with self:
            if function.namespace == "gptfast":
                return kernels.KERNELS[name](*args, **(kwargs or {}))
            result = function.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        if launched_by(function) is not None:
            self.counts[f"aten.{name}"] += 1
        return function(*args, **(kwargs or {}))


SMALL = GPTConfig(vocab_size=65, block_size=64)
GPT2 = GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0)


@contextlib.contextmanager
def bfloat16_without_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets models without data run the fused operators as under autocast to bfloat16."""
    monkeypatch.setitem(select.FUSED_DTYPES, "meta", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with torch.device("meta"):
        yield


def one_launch(
    a: Tensor, b: Tensor, dtype: Any = None, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """Stands for ops.triton.matmul, which takes more than a kernel where there is no GPU."""
    made = a.new_empty(a.shape[0], b.shape[1], dtype=dtype) if out is None else out
    return made.zero_()


@pytest.mark.parametrize(
    ("config", "batch", "own", "of_torch"),
    ((SMALL, 64, 46, 23), (GPT2, 16, 233, 114)),
    ids=("small", "gpt2"),
)
def test_launches_of_forward_and_backward(
    config: GPTConfig, batch: int, own: int, of_torch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in vars(kernels).values():
        if hasattr(module, "matmul"):
            monkeypatch.setattr(module, "matmul", one_launch)
    with bfloat16_without_data(monkeypatch), launch.counted(run=False) as counts:
        model = GPT(config, backend="fused")
        idx = torch.empty(batch, config.block_size, dtype=torch.int64)
        seed = torch.empty((), dtype=torch.int64) if config.dropout else None
        counts.clear()
        with LaunchesOfTorch(counts):
            loss = model.loss(idx, idx, seed=seed)
            loss.backward()
    by_torch = sum(n for name, n in counts.items() if name.startswith("aten."))
    assert sum(counts.values()) - by_torch <= own and by_torch <= of_torch, dict(counts)
