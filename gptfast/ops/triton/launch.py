"""How kernels are launched, and what their launchers share.

`kernel` and `tuned` make a `Kernel` of a function of `triton.jit`. The first launch goes through
Triton, which takes 50 to 100 us of Python each time; later launches that need the same compiled
code start it directly.
"""

import contextlib
import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.tools.tensor_descriptor import TensorDescriptor

from gptfast.ops.triton.recording import forget, size_of, tell
from gptfast.ops.triton.signature import LATER, Launch, Reader, bound

INTERPRETED = triton.knobs.runtime.interpret
# Bytes of shared memory per block: the smallest limit of the chips in benchmarks/gpu_static.py.
MIN_SHARED = 65536
INTERPRETED_PROGRAMS = 3  # `programs` in Triton's interpreter
# Options of a kernel with tl.device_assert, which Triton otherwise drops. The second one keeps out
# the checks for overflow of integers, which Triton 3.6 would add along with it.
ASSERTING = {"debug": True, "sanitize_overflow": False}
TRITON_RANGE = (3, 6), (3, 9)  # the versions that launch a compiled kernel as `Kernel` does

Args = Mapping[str, Any]
Grid = tuple[int, ...] | Callable[[Args], tuple[int, ...]]


def kernel(function: Any) -> "Kernel":
    """Decorates a function of `triton.jit` that is launched from Python."""
    return Kernel(function)


def tuned(
    configs: Mapping[Any, list[triton.Config]],
    which: Callable[[Args], Any],
    shared: Callable[[Args], int],
    key: list[str],
) -> Callable[[Any], "Kernel"]:
    """Decorates a function like `kernel`; tile sizes, warps and stages come from a table.

    A call takes the first configuration that fits the device, and times nothing, so that two
    processes, a resumed run, or the ranks of a parallel run compute the same bits.

    No key contains the batch size, and kernels that compute rows of an activation are not
    specialised for the number of rows, so a row's bits do not depend on the other rows.

    Args:
        configs: The configurations per kind of call: only configurations that do not spill
            registers on the chips of benchmarks/gpu_static.py, the one that fits every chip last.
        which: Returns the kind of a call from its arguments. It may use the numbers in `key`, the
            dtypes of tensors, and the constants.
        shared: Returns the bytes of operands in shared memory from the same arguments and a
            configuration; a call skips configurations above the device's limit.
        key: Names of the numbers that the choice may depend on.
    """
    return lambda function: Kernel(function, Choice(configs, which, shared, key))


def config(warps: int, stages: int, **tile: int) -> triton.Config:
    """Makes a configuration; `tile` has the sizes of its tiles by name."""
    return triton.Config(tile, num_warps=warps, num_stages=stages)


class Choice:
    """How the configuration of a call is chosen; see `tuned`."""

    def __init__(
        self,
        configs: Mapping[Any, list[triton.Config]],
        which: Callable[[Args], Any],
        shared: Callable[[Args], int],
        key: list[str],
    ) -> None:
        self.configs, self.key = configs, key
        self._which, self._shared = which, shared

    def choose(self, args: Args) -> triton.Config:
        """Returns the first configuration for a call that fits the device, or else the last."""
        mine, limit = self.configs[self._which(args)], shared_limit()
        fits = (each for each in mine if self._shared({**args, **each.all_kwargs()}) <= limit)
        return next(fits, mine[-1])


class Kernel:
    """A kernel, launched by `kernel[grid](*args, **constants_and_options)`.

    grid is the numbers of programs, or a function that returns them from the constants by name.
    """

    def __init__(self, function: Any, choice: Choice | None = None) -> None:
        self.function, self.choice = function, choice
        self.name, self.__doc__ = function.__name__, function.__doc__
        every = [] if choice is None else [x for each in choice.configs.values() for x in each]
        self._configs = every[:1] if INTERPRETED else every
        parameters = inspect.signature(function.fn).parameters.values()
        self._names = [each.name for each in parameters]
        self._constants = {each.name for each in parameters if "constexpr" in str(each.annotation)}
        later = {name for each in every for name in each.kwargs}
        self._bound = bound(self._launch, parameters, later)
        self._readers: dict[Any, Reader] = {}
        self._lock = threading.Lock()

    @property
    def configs(self) -> list[triton.Config]:
        """All configurations; if it is set to a single one, that is taken for every call."""
        return self._configs

    @configs.setter
    def configs(self, configs: list[triton.Config]) -> None:
        self._configs, self._readers = configs, {}
        forget()

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return functools.partial(self._bound, grid)

    def chosen(self, args: Args) -> dict[str, Any]:
        """Returns constants and options of the configuration that such a call takes."""
        if self.choice is None:
            return {}
        if len(self._configs) == 1:
            return self._configs[0].all_kwargs()
        # Numbers that are not in `key` may change without a new choice.
        may = {*self._constants, *self.choice.key}
        known = {x: args[x] for x in args if x in may or not isinstance(args[x], int | float)}
        return self.choice.choose(known).all_kwargs()

    def _launch(
        self, grid: Grid, classes: tuple[Any, ...], values: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        if _watch is not None and not _watch(self, self._by_name(values) | options):
            return
        if options:
            classes += tuple(options.items())
        reader = self._readers.get(classes)
        if reader is not None and not _hooked():
            device = reader.current_device()
            key, words = reader.read(device, *values)
            found = reader.launches.get(key)
            if found is not None:
                launcher, function, packed, constants, _ = found
                x, y, z = size_of(grid, constants)
                stream = reader.current_stream(device)
                launcher(x, y, z, stream, function, packed, None, None, None, *words)
                tell(found, grid, values)
                return
        with self._lock, _disable_current_modes():  # a recording must not see the compiler
            found = self._launch_by_triton(grid, classes, values, options)
        tell(found, grid, values)

    def _launch_by_triton(
        self, grid: Grid, classes: tuple[Any, ...], values: tuple[Any, ...], options: dict[str, Any]
    ) -> Launch | None:
        """Launches through Triton; returns the launch that it resolved, and keeps it for `_launch`.

        None: the next call must go through Triton again.
        """
        args = self._by_name(values)
        chosen = self.chosen(args)
        constants = {name: x for name, x in args.items() if name in self._constants} | chosen
        size = grid(constants) if callable(grid) else grid
        compiled = self.function[size](**args, **options, **chosen)
        if slow_launches() is not None:
            return None
        if classes not in self._readers:
            numbers = [] if self.choice is None else self.choice.key
            self._readers[classes] = Reader(self.function.params, values, numbers)
        reader = self._readers[classes]
        key, _ = reader.read(reader.current_device(), *values)
        found = Launch(
            compiled.run, compiled.function, compiled.packed_metadata, constants, compiled
        )
        reader.launches[key] = found
        return found

    def _by_name(self, values: tuple[Any, ...]) -> dict[str, Any]:
        pairs = zip(self._names, values, strict=True)
        return {name: x for name, x in pairs if x is not LATER}


def slow_launches() -> str | None:
    """Returns why every launch goes through Triton, or None where only the first one does.

    On AMD, compiled code also depends on the sizes of tensors, and it has not run yet.
    """
    if INTERPRETED:
        return "Triton's interpreter runs the kernels"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not TRITON_RANGE[0] <= version <= TRITON_RANGE[1]:
        oldest, newest = (".".join(map(str, each)) for each in TRITON_RANGE)
        return f"Triton is {triton.__version__}, not {oldest} to {newest}"
    if target()[0] != "cuda":
        return "the GPU is not NVIDIA's"
    return None


def _hooked() -> bool:
    """Whether a profiler has hooks on launches, which only Triton calls."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", True) or getattr(leave, "calls", True))


Watch = Callable[[Kernel, Args], bool]
_watch: Watch | None = None


def observed() -> bool:
    """Whether `watched` or a profiler must see every launch."""
    return _watch is not None or _hooked()


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Calls `watch(kernel, args and options)` before each launch; it returns whether to launch."""
    global _watch
    before, _watch = _watch, watch
    try:
        yield
    finally:
        _watch = before


@contextlib.contextmanager
def counted(run: bool = True) -> Iterator[Counter[str]]:
    """Counts the launches by the kernels' names.

    Args:
        run: Whether to launch the kernels, too.
    """
    counts: Counter[str] = Counter()

    def count(each: Kernel, _: Args) -> bool:
        counts[each.name] += 1
        return run

    with watched(count):
        yield counts


def shared_limit() -> int:
    """Returns the limit of shared memory per block of the current device, in bytes."""
    return _shared_limit(torch.cuda.current_device()) if torch.cuda.is_available() else MIN_SHARED


@functools.cache
def _shared_limit(device: int) -> int:
    found = triton.runtime.driver.active.utils.get_device_properties(device)
    limit: int = found["max_shared_mem"]
    return limit


@functools.cache
def processors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(device: torch.device) -> int:
    """Returns the number of programs of a kernel whose programs loop over tiles."""
    return processors(device) if device.type != "cuda" else 2 * processors(device)


def precision(dtype: torch.dtype = torch.float32) -> str:
    """Returns tl.dot's precision for operands of a dtype; others than float32 have only one.

    float32 is multiplied as torch.backends.cuda.matmul.fp32_precision demands. On NVIDIA the
    default is three tf32 products, whose sum has float32's accuracy (Ootomo and Yokota,
    arXiv:2203.03341). AMD's matrix units multiply float32 directly; only gfx942 has tf32.
    """
    if dtype != torch.float32:
        return "ieee"
    # torch.set_float32_matmul_precision sets it too, but its getter raises if both APIs were used.
    short = torch.backends.cuda.matmul.fp32_precision == "tf32"
    backend, arch = ("", "") if INTERPRETED else target()
    if backend == "cuda":
        return "tf32" if short else "tf32x3"
    return "tf32" if short and arch == "gfx942" else "ieee"


def copies_tiles() -> bool:
    """Whether kernels load blocks of a tensor by descriptors: on NVIDIA's chips sm_90 to sm_11x.

    Their matrix instructions read what a descriptor has copied. Those of sm_120 read registers, and
    half as much shared memory holds no tiles for both.
    """
    if INTERPRETED:
        return False
    backend, arch = target()
    return bool(backend == "cuda" and 90 <= arch < 120)


def target() -> tuple[str, Any]:
    """Returns the current device's backend and architecture: ("cuda", 90), ("hip", "gfx942")."""
    driver = triton.runtime.driver.active
    return _target(driver, driver.get_current_device())


@functools.lru_cache(16)
def _target(driver: Any, _: Any) -> tuple[str, Any]:
    """Returns the target of a device, and keeps it: asking the driver takes 1 us."""
    found = driver.get_current_target()
    return found.backend, found.arch


def dropout_args(p: float, seed: Tensor | None, stream: int, device: Any) -> dict[str, Any]:
    """Returns the arguments of `tiles.dropout_factors`; see gptfast.ops.random."""
    threshold = int(p * 65536 + 0.5)
    if seed is None or threshold == 0:
        return NO_DROPOUT
    return {
        "seed": seed.to(device),
        "substream": stream & 0xFFFFFFFF,
        "threshold": threshold,
        "keep_scale": 65536 / (65536 - threshold) if threshold < 65536 else 0.0,
    }


NO_DROPOUT: dict[str, Any] = {"seed": None, "substream": 0, "threshold": 0, "keep_scale": 1.0}


def descriptor(x: Tensor, *block: int) -> TensorDescriptor:
    """Describes a tensor so that the GPU can load blocks of this shape; see `copies_tiles`.

    It equals TensorDescriptor(x, x.shape, x.stride(), block) without the assertions, which take
    3 us: the address and all strides but the last must be multiples of 16 bytes, the last one 1.
    """
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = x, [*x.shape], [*x.stride()], [*block]
    return made


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up. (triton.cdiv takes 4 us.)"""
    return -(-a // b)


def block_of(n: int, least: int = 16) -> int:
    """Returns the smallest power of 2 >= n and `least`, itself one; tl.dot needs at least 16."""
    return max(least, 1 << (n - 1).bit_length())


def absent(like: Tensor) -> Tensor:
    """Returns the empty tensor that stands for an absent result of an operator."""
    return like.new_empty(0, dtype=torch.float32)


def or_absent(like: Tensor, *results: Tensor | None) -> tuple[Tensor, ...]:
    """Returns an operator's results, each None replaced by an empty tensor of its own."""
    return tuple(absent(like) if each is None else each for each in results)


def wants(wanted: int, first: int, last: int | None = None) -> bool:
    """Whether any of the results `first` to `last` of a backward is wanted; see ops.autograd."""
    count = 1 if last is None else last - first + 1
    return wanted >> first & (1 << count) - 1 != 0
