"""Plans: a recorded call does again what the launcher does, for other tensors of the signature.

Triton's interpreter runs the kernels; what starts them stands for Triton's function in C, and is
given addresses alone.
"""

import contextlib
import ctypes
import itertools
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

triton = pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from gptfast import ops  # noqa: E402
from gptfast.ops import library, select  # noqa: E402
from gptfast.ops import triton as kernels  # noqa: E402
from gptfast.ops.triton import launch, plan_code, plans, recording, rows  # noqa: E402
from gptfast.ops.triton.matmul import matmul  # noqa: E402
from gptfast.ops.triton.signature import Launch  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("the interpreter runs the kernels", allow_module_level=True)


def bytes_of(x: Tensor) -> int:
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size() if x.numel() else 0


def at(address: int, count: int, dtype: torch.dtype) -> Tensor:
    """The memory at an address, as a tensor of one dimension."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_byte * count).from_address(address), dtype=dtype)


class PyCUtensorMap:
    """Stands for CUDA's tensor map."""

    made = 0

    def __init__(self, x: TensorDescriptor) -> None:
        type(self).made += 1
        self.at, self.shape, self.strides = x.base.data_ptr(), tuple(x.shape), tuple(x.strides)
        self.block = x.block_shape


class Launcher:
    """Stands for Triton's launcher of one compiled kernel: `launch` is its function in C."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, kernel: launch.Kernel, values: Any, options: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, options
        self.types = [
            (bytes_of(x), x.dtype) if isinstance(x, Tensor)
            else x.base.dtype if isinstance(x, TensorDescriptor) else None
            for x in values
        ]  # fmt: skip
        self.launch: Any = Mock(side_effect=self.start)

    def __call__(self, *args: Any) -> None:
        """What Triton does in Python: it makes tensor maps of descriptors."""
        made = [PyCUtensorMap(x) if isinstance(x, TensorDescriptor) else x for x in args[9:]]
        self.launch(*args[:6], tuple(made))

    def start(
        self, x: int, y: int, z: int, stream: int, function: str, packed: str, values: Any
    ) -> None:
        """Runs the kernel by what the function in C gets."""
        assert (stream, function, packed) == (7, self.kernel.name, "packed")
        args = []
        for value, known in zip(values, self.types, strict=True):
            if isinstance(known, tuple):
                assert isinstance(value, int)
                value = at(value, *known)
            elif isinstance(value, PyCUtensorMap):
                assert value.at % 16 == 0 and known is not None
                count = 1 + sum(
                    (n - 1) * s for n, s in zip(value.shape, value.strides, strict=True)
                )
                base = at(value.at, count * known.itemsize, known)
                value = TensorDescriptor(base, [*value.shape], [*value.strides], [*value.block])
            args.append(value)
        pairs = zip(self.kernel._names, args, strict=True)
        given = {name: value for name, value in pairs if value is not launch.LATER}
        with _disable_current_modes():  # the interpreter calls torch's operators
            self.kernel.function[(x, y, z)](**{**given, **self.options})


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter's launches be kept, as those of compiled kernels are."""
    by_triton = launch.Kernel._launch_by_triton

    def kept(self: Any, grid: Any, classes: Any, values: Any, options: Any) -> Launch:
        with mock.patch.object(launch, "slow_launches", lambda: "interpreted"):
            by_triton(self, grid, classes, values, options)
        args = self._by_name(values)
        every = options | self.chosen(args)
        launcher = Launcher(self, values, every)
        return Launch(launcher, self.name, "packed", args | every, launcher)

    monkeypatch.setattr(launch.Kernel, "_launch_by_triton", kept)
    monkeypatch.setattr(launch, "slow_launches", lambda: None)
    monkeypatch.setattr(plans, "current_stream", lambda: lambda device: 7)
    monkeypatch.setattr(plans, "current_device", lambda: -1)
    monkeypatch.setattr(recording, "FORGETTING", [])
    monkeypatch.setattr(plans, "FORGETTING", recording.FORGETTING)


def normal(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unlike(call: Any, factor: float) -> list[Any]:
    """Other numbers in tensors like those of a call."""
    others = []
    for x in call:
        if isinstance(x, Tensor) and x.is_floating_point():
            x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x * factor)
        elif isinstance(x, Tensor) and x.numel() > 1:
            x = x.flip(-1).clone()
        others.append(x)
    return others


B, T, C, H, D, V = 1, 3, 16, 1, 16, 16
SEED = torch.tensor(5)


def calls() -> dict[str, list[Any]]:
    """Arguments for each operator; those of backwards are what forwards return."""
    x, dy = normal(B, T, C), normal(B, T, C, seed=1)
    ln = [normal(C, seed=2) + 1, normal(C, seed=3)]
    w1, b1 = normal(4 * C, C, seed=4) / 8, normal(4 * C, seed=5)
    w2, b2 = normal(C, 4 * C, seed=6) / 8, normal(C, seed=7)
    ffn = [x, *ln, w1, b1, w2, b2]
    w_qkv, b_qkv, w_proj = normal(3 * C, C, seed=8) / 8, normal(3 * C), normal(C, C) / 8
    block = [x, *ln, w_qkv, b_qkv, w_proj, b2]
    q, k, v = (normal(B, H, T, D, seed=i) for i in range(3))
    dropout = [0.2, SEED, 3]
    made = kernels.KERNELS
    found: dict[str, list[Any]] = {
        "attention": [q, k, v, 0.25, *dropout],
        "self_attention": [*block, H, 0.3, 5, *dropout, True],
        "linear": [x, *ln, w1, b1, None],
        "ffn": [*ffn, "erf", *dropout, True],
        "linear_cross_entropy": [
            x, *ln, normal(V, C, dtype=torch.float32), torch.arange(B * T).view(B, T) % V, None,
            -100, "mean", 0.0, 0b1111,
        ],
        "embedding": [
            torch.arange(B * T).view(B, T) % V, normal(V, C, dtype=torch.float32),
            normal(T, C, dtype=torch.float32), *dropout, torch.float16,
        ],
    }  # fmt: skip
    kept = {name: made[name](*args) for name, args in found.items()}
    out, lse = kept["attention"]
    found["attention_backward"] = [dy.view(B, T, H, D), q, k, v, out, lse, 0.25, *dropout]
    found["self_attention_backward"] = [
        dy,
        *block,
        *kept["self_attention"][1:],
        H,
        0.3,
        5,
        *dropout,
        0b1111111,
    ]
    _, mean, rstd = kept["linear"]
    found["linear_backward"] = [normal(B, T, 4 * C), x, *ln, mean, rstd, w1, b1, 0b11111]
    found["ffn_backward"] = [dy, *ffn, *kept["ffn"][1:], "erf", *dropout, 0b1111111]
    idx, wte, wpe, *_ = found["embedding"]
    found["embedding_backward"] = [dy, idx, wte, wpe, -1, *dropout, 0b11]
    assert {*found, "adamw_"} == {*made}
    return found


CALLS: dict[str, list[Any]] = {}


def call_of(name: str) -> list[Any]:
    if not CALLS:
        CALLS.update(calls())
    return CALLS[name]


def assert_same(got: Any, expected: Any) -> None:
    for one, other in zip(recording.leaves(got), recording.leaves(expected), strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert torch.isfinite(one).all() and torch.equal(one, other)


@pytest.mark.parametrize("name", [name for name in kernels.KERNELS if name != "adamw_"])
def test_a_plan_does_what_the_launcher_does(name: str) -> None:
    planned = plans.Planned(kernels.KERNELS[name], kernels.KERNELS)
    args = call_of(name)
    expected = kernels.KERNELS[name](*args)
    for _ in range(2):  # the second is recorded
        assert_same(planned.call(*args), expected)
    assert [*planned.seen.values()] == [None] and len(planned.plans) == 1
    planned.launcher = Mock(side_effect=AssertionError("not by plan"))
    others = unlike(args, 0.75)
    assert_same(planned.call(*others), kernels.KERNELS[name](*others))


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, twice: bool) -> tuple[Tensor, Tensor]:
    """A launcher: a kernel, products of torch's, views, and what lives only in between."""
    n, mean, _ = rows.layer_norm(x.contiguous(), weight, bias)
    inner, _, _ = rows.layer_norm(n[1:] if twice else n, weight, None)
    return matmul(inner, inner.t()), mean[:0]


def by_plan(planned: plans.Planned, *args: Any) -> bool:
    """Calls, checks the result, and returns whether the launcher was not asked."""
    launcher = planned.launcher
    planned.launcher = asked = Mock(side_effect=launcher)
    result = planned.call(*args)
    planned.launcher = launcher
    if not asked.called:
        assert_same(result, launcher(*args))
    return not asked.called


X, WEIGHT, BIAS = normal(6, 32), normal(32, seed=1), normal(32, seed=2)


def shifted(x: Tensor) -> Tensor:
    """The same numbers at another address modulo 16."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return flat.view(x.shape).copy_(x)


def test_a_signature_has_all_that_a_launcher_looks_at() -> None:
    planned = plans.Planned(norm, kernels.KERNELS)
    float32 = [x.float() for x in (X, WEIGHT, BIAS)]
    signatures: list[tuple[Any, ...]] = [
        (X, WEIGHT, BIAS, False), (X, WEIGHT, BIAS, True), (X, WEIGHT, None, True),
        (normal(7, 32), WEIGHT, BIAS, True), (X.t().contiguous().t(), WEIGHT, BIAS, True),
        (shifted(X), WEIGHT, BIAS, True), (X, shifted(WEIGHT), BIAS, True),
        (X, WEIGHT, float32[2], True), (*float32, True),
    ]  # fmt: skip
    for round, args in itertools.product(range(3), signatures):
        assert by_plan(planned, *args) == (round == 2)
    assert len(planned.plans) == len(signatures)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if before == "ieee" else "ieee"
    try:
        assert by_plan(planned, X, WEIGHT, BIAS, True)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_one_tensor_as_two_arguments_is_no_signature() -> None:
    q, k, v = (normal(1, 2, 4, 16, seed=i) for i in range(3))
    planned = plans.Planned(kernels.KERNELS["attention"], kernels.KERNELS)
    for args in ((q, q, q), (q, q, q), (q, k, v), (q, k, q), (v, k, k)):
        last = by_plan(planned, *args, 0.25, 0.0, None, 0)
    assert last and len(planned.plans) == 1


def test_a_tensor_map_is_that_of_the_address() -> None:
    planned = plans.Planned(kernels.KERNELS["attention"], kernels.KERNELS)
    memory = normal(4, 1, 2, 8, 16)
    options = 0.25, 0.0, None, 0
    for _ in range(2):
        planned.call(memory[0], memory[1], memory[2], *options)
    made = PyCUtensorMap.made
    for i, j in ((0, 1), (1, 0), (0, 1), (1, 0), (0, 1)):
        assert_same(
            planned.call(memory[3], memory[i], memory[j], *options),
            planned.launcher(memory[3], memory[i], memory[j], *options),
        )
    assert PyCUtensorMap.made - made == 2 * 2  # for keys and values that are new at an address
    # Tensors of another shape at the same addresses have plans, and so maps, of their own.
    other = memory.view(4, 1, 2, 16, 8)
    for _ in range(3):
        planned.call(memory[3], memory[0], memory[1], *options)
        by_plan(planned, other[3], other[0], other[1], *options)
    assert by_plan(planned, memory[3], memory[0], memory[1], *options)


def test_kept_tensor_maps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MAX_MAPS", 3)
    planned = plans.Planned(kernels.KERNELS["attention"], kernels.KERNELS)
    memory = normal(6, 1, 1, 4, 16)
    for i in range(5):
        for k in (memory[i], memory[i + 1]):
            assert by_plan(planned, memory[0], k, k, 0.25, 0.0, None, 0) == (i > 0)


def item(x: Tensor) -> Tensor:
    return x.new_empty(int(x[0].item()))


def of_two(x: Tensor) -> Tensor:
    top, _ = x.max(0)
    return top


def no_tensor(x: Tensor) -> Any:
    return x.new_empty(0), x.shape


def bits(x: Tensor) -> Tensor:
    return torch.empty_like(x).view(torch.int32).fill_(0)


def hidden(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy()) + 1


def normed(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return rows.layer_norm(x, weight, None)


def test_what_a_plan_cannot_do_goes_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(4, 4)
    for launcher, reason in (
        (item, "numbers"), (of_two, "several results"), (no_tensor, "something else"),
        (bits, "another dtype"), (hidden, "another way"),
    ):  # fmt: skip
        planned = plans.Planned(launcher, kernels.KERNELS)
        for _ in range(4):
            planned.call(x[:, 0] if launcher is item else x)
        assert not planned.plans and reason in str([*planned.seen.values()])
    streams = itertools.count()
    monkeypatch.setattr(plans, "current_stream", lambda: lambda device: next(streams))
    planned = plans.Planned(normed, kernels.KERNELS)
    assert planned.tensors == ["x", "weight"]
    for _ in range(3):
        assert not by_plan(planned, X, WEIGHT)
    assert "streams" in str(planned.seen)


def test_a_call_runs_on_the_device_of_its_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    current, seen = [-1], []

    @contextlib.contextmanager
    def on(device: int) -> Iterator[None]:
        before, current[0] = current[0], device
        yield
        current[0] = before

    def launcher(x: Tensor) -> Tensor:
        seen.append(current[0])
        return x.new_empty(0)

    monkeypatch.setattr(plans, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    planned = plans.Planned(launcher, {})
    current[0] = 2
    planned.call(X)  # is not on a GPU
    monkeypatch.setattr(Tensor, "get_device", lambda x: 1)
    for _ in range(3):  # the third goes by plan
        planned.call(X)
    assert seen == [2, 1, 1] and current == [2]


def test_a_launch_that_is_not_kept_has_no_plan_until_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    by_triton = launch.Kernel._launch_by_triton
    planned = plans.Planned(normed, kernels.KERNELS)
    with monkeypatch.context() as slow:
        not_kept = lambda *args: by_triton(*args) and None  # noqa: E731
        slow.setattr(launch.Kernel, "_launch_by_triton", not_kept)
        for _ in range(3):
            assert not by_plan(planned, X, WEIGHT)
    assert not by_plan(planned, X, WEIGHT)  # recorded, now that its launch is kept
    assert by_plan(planned, X, WEIGHT)


def test_threads_make_tensor_maps_of_their_own_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = launch.descriptor(normal(16, 64), 16, 64)
    recorded = recording.Recording((tile.base,), {}, lambda: 7)
    values = [recorded._place(tile)]
    launcher = Launcher(rows.layer_norm_kernel, [tile], {})
    kept = Launch(launcher, "norm", "packed", {}, launcher)
    launched = recording.Launched(kept, (1, 1, 1), values)
    made = launched._made

    def made_slowly() -> Any:
        time.sleep(0.002)  # another thread comes between an address and its map
        return made()

    monkeypatch.setattr(launched, "_made", made_slowly)
    addresses = range(16, 16 * 21, 16)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda at: [each.at for each in launched.fill(at)], addresses)
        assert [*found] == [[at] for at in addresses]
    assert {at: each.at for at, each in launched.maps[0].items()} == {at: at for at in addresses}


def test_who_watches_launches_sees_those_of_plans() -> None:
    planned = plans.Planned(norm, kernels.KERNELS)
    args = X, WEIGHT, BIAS, True
    for _ in range(3):
        planned.call(*args)
    with launch.counted() as counts:
        planned.call(*args)
    assert counts == {"layer_norm_kernel": 2}
    hooks, hook = triton.knobs.runtime.launch_enter_hook, Mock()
    hooks.add(hook)
    assert not by_plan(planned, *args)
    hooks.remove(hook)
    assert by_plan(planned, *args)


def test_plans_are_forgotten_with_a_kernels_configurations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = kernels.attention.forward_kernel
    planned = plans.Planned(kernels.KERNELS["attention"], kernels.KERNELS)
    q = normal(1, 1, 4, 16)
    args = q, q, q, 0.25, 0.0, None, 0
    for _ in range(3):
        planned.call(*args)
    monkeypatch.setattr(kernel, "configs", kernel.configs)
    assert not planned.plans and not planned.seen
    monkeypatch.setattr(plans, "MAX_SIGNATURES", 3)
    for T in range(1, 9):
        x = normal(1, 1, T, 16)
        for _ in range(2):
            planned.call(x, x, x, *args[3:])
        assert 0 < len(planned.plans) <= len(planned.seen) <= 3


def test_intermediate_results_end_with_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def read(code: str, scope: Any) -> None:
        lines.append(code)
        exec(code, scope)

    args = call_of("ffn_backward")
    expected = kernels.KERNELS["ffn_backward"](*args)
    monkeypatch.setattr(plan_code, "exec", read, raising=False)
    for most in (2**20, 0):
        monkeypatch.setattr(plan_code, "SCRATCH_BYTES", most)
        planned = plans.Planned(kernels.KERNELS["ffn_backward"], kernels.KERNELS)
        for _ in range(3):
            assert_same(planned.call(*args), expected)
    small, large = lines
    assert small.count("empty(") < large.count("empty(") and "scratch" not in large
    body, _, returned = large.partition("return")
    for name in re.findall(r"(\w+) = empty", body):
        ended = re.search(rf"\n    del .*\b{name}\b", body)
        assert (ended is None) == bool(re.search(rf"\b{name}\b", returned))
        assert ended is None or f"{name}" not in body[ended.end() :].split()


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, plans.Planned]]:
    """Lets the public functions take plans on the CPU; the plans by the functions' names."""
    monkeypatch.setitem(select.FUSED_DTYPES, "cpu", (torch.float32, torch.float16))
    monkeypatch.setattr(select, "extension_error", None)
    implemented = torch.library.Library("gptfast", "IMPL")
    for name, kernel in kernels.KERNELS.items():
        implemented.impl(name, kernel, "CPU", allow_override=True)
    made = {}
    for name, function in library.PUBLIC.items():
        made[name] = plans.Planned(function, kernels.KERNELS)
        monkeypatch.setitem(library.INSTEAD, (name, False), made[name].call)
    yield made
    implemented._destroy()


def test_public_functions_go_by_plan_without_gradients(public: dict[str, plans.Planned]) -> None:
    x, *params = call_of("ffn")[:7]
    block, (q, k, v) = call_of("self_attention")[:7], call_of("attention")[:3]
    loss, (idx, wte, wpe) = call_of("linear_cross_entropy")[:5], call_of("embedding")[:3]
    dropout = {"dropout_p": 0.2, "seed": 3}
    own: list[tuple[str, Any, dict[str, Any]]] = [
        ("causal_attention", (q, k, v), {}),
        ("causal_attention", (q, k, v), {"scale": 0.3, **dropout}),
        ("layer_norm_ffn", (x, *params), {"gelu": "tanh"}),
        ("layer_norm_attention", block, {"n_head": H, **dropout}),
        ("layer_norm_linear", (x, *params[:4]), {}),
        ("linear_residual", (x, params[4].view(4 * C, C)[:C], None, x), {}),
        ("embedding", (idx, wte, wpe), {"dtype": torch.float16}),
        ("linear_cross_entropy", (loss[0], loss[3], loss[4]), {}),
    ]
    assert {name for name, *_ in own} == {*public}
    for name, args, options in own:
        function, planned = getattr(ops, name), public[name]
        expected = function(*args, **options)
        function(*args, **options)
        asked = Mock(side_effect=planned.launcher)
        planned.launcher = asked
        assert_same(function(*args, **options), expected)
        assert not asked.called, planned.seen
        needing = [y.clone().requires_grad_() if y is args[-1] and y.is_floating_point() else y
                   for y in args]  # fmt: skip
        with_gradient = any(isinstance(y, Tensor) and y.requires_grad for y in needing)
        assert function(*needing, **options).requires_grad == with_gradient
        with torch.no_grad():
            assert not function(*needing, **options).requires_grad
        planned.launcher = asked.side_effect


def test_a_wrong_call_of_a_public_function_has_its_own_error(
    public: dict[str, plans.Planned],
) -> None:
    q, k, v = call_of("attention")[:3]
    for _ in range(3):
        ops.causal_attention(q, k, v)
    for args, options, error, words in (
        ((q, None, v), {}, TypeError, "k must be a tensor, got NoneType"),
        ((q, k, v[:, :, :2]), {}, ValueError, "v must have shape"),
        ((q, k, v), {"dropout_p": 2.0}, ValueError, "dropout_p must be in"),
        ((q, k, v), {"scale": torch.ones((), requires_grad=True)}, TypeError, "scale"),
        ((q, k), {}, TypeError, "causal_attention.* missing 1 required positional argument"),
        ((q, k, v), {"nothing": 1}, TypeError, "causal_attention.* unexpected keyword"),
    ):
        for _ in range(3):
            with pytest.raises(error, match=words):
                ops.causal_attention(*args, **options)
    assert len(public["causal_attention"].plans) == 1


class Maps:
    """Stands for the part of Triton's driver that makes tensor maps, by its names so far."""

    def __init__(self) -> None:
        self.fill_tma_descriptor = self.fill_tma_descriptor_tiled = self.fill

    def fill(self, address: int, *args: Any) -> PyCUtensorMap:
        """Makes the map of a descriptor at an address."""
        made = PyCUtensorMap.__new__(PyCUtensorMap)
        made.at, made.shape = address, tuple(args[4])
        return made


def test_the_arguments_of_tritons_function_in_c_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    signature = {"x": "*fp16", "a": "tensordesc<fp16[4, 16]>", "n": "i32", "K": "constexpr",
                 "b": "tensordesc<fp16[8, 16]>"}  # fmt: skip
    meta = [
        {"swizzle": 1, "elem_size": 2, "elem_type": 6, "block_size": [rows, 16],
         "fp4_padded": False} for rows in (4, 8)
    ]  # fmt: skip
    start = Mock()
    run: Any = object.__new__(driver.CudaLauncher)
    vars(run).update(
        launch=driver.wrap_handle_tensordesc(start, signature, meta), num_ctas=1,
        global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
        profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=True,
        gsan_enabled=False, arg_annotations=["annotations"], kernel_signature=b"signature",
    )  # fmt: skip
    monkeypatch.setattr(triton.runtime.driver, "_active", Mock(utils=Maps()))
    x, memory = torch.zeros(8), torch.zeros(3, 32, 16, dtype=torch.float16)

    def described(i: int) -> TensorDescriptor:
        return launch.descriptor(memory[i], 4, 16)

    def place(i: int) -> TensorDescriptor:
        made = described(i)
        made.base = recording.Place(None, memory[i].data_ptr())
        return made

    kept, grid = Launch(run, 11, (4, 1, 9), {}, None), (5, 6, 7)
    seen = recording.Launched(kept, grid, [recording.Place(), place(0), 3, 4, place(1)])
    assert seen.start is start
    words = x.data_ptr(), described(0), 3, 4, described(1)
    run(*grid, 99, 11, (4, 1, 9), None, None, None, *words)
    places = iter((99, x.data_ptr()))

    def actual(each: Any) -> Any:
        return next(places) if isinstance(each, recording.Place) else vars_of_map(each)

    assert recording.changed(seen.args, actual) == recording.changed(
        start.call_args.args, vars_of_map
    )
    found = seen.fill(memory[2].data_ptr(), memory[0].data_ptr())
    assert [each.at for each in found] == [memory[2].data_ptr(), memory[0].data_ptr()]
    assert [list(each) for each in seen.maps] == [[each.at] for each in found]
    run.profile_scratch_size = 8
    with pytest.raises(recording.Unplannable, match="scratch"):
        recording.Launched(kept, grid, [])


def vars_of_map(x: Any) -> Any:
    return (x.at, x.shape) if isinstance(x, PyCUtensorMap) else x
