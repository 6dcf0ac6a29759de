"""Records what an operator's launcher does: reservations, torch's operators, and launches."""

import contextlib
import copy
import math
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary
from triton.tools.tensor_descriptor import TensorDescriptor

from gptfast.ops.triton.signature import Launch

aten = torch.ops.aten
RESERVING = {
    aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default,
    aten.empty_strided.default, aten.new_empty_strided.default,
}  # fmt: skip
UNKNOWN = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
MAX_MAPS = 256  # tensor maps kept per descriptor


_active: dict[int, "Recording"] = {}  # by the thread that records
FORGETTING: list[Callable[[], None]] = []  # drop what was recorded


def tell(launch: Launch | None, grid: Any, values: tuple[Any, ...]) -> None:
    """Adds a launch to this thread's recording, if one is active.

    Args:
        launch: The compiled kernel; None if the next call may launch another one.
        grid: As a kernel's launch takes it.
        values: The kernel's arguments.
    """
    recording = _active.get(threading.get_ident()) if _active else None
    if recording is not None:
        size = () if launch is None else size_of(grid, launch.constants)
        recording.launched(launch, size, values)


def size_of(grid: Any, constants: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the three sizes of a grid."""
    return (*(grid(constants) if callable(grid) else grid), 1, 1)[:3]


def forget() -> None:
    """Forgets what was recorded: a constant that launchers read has changed."""
    for each in FORGETTING:
        each()


class Unplannable(Exception):
    """A launcher did something that a plan cannot repeat."""


class View(NamedTuple):
    """A tensor that a launcher used: the memory of root number `root`, from byte `offset` on."""

    root: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def elements(self) -> int:
        """Returns the number of its elements."""
        return math.prod(self.shape)

    def span(self) -> int:
        """Returns the number of elements of memory from its first to its last one."""
        steps = zip(self.shape, self.stride, strict=True)
        return 1 + sum((n - 1) * step for n, step in steps) if self.elements() else 0


class Root(NamedTuple):
    """A tensor that is no view of another: an argument, a constant, or made by the launcher."""

    kind: str  # "argument", "constant", "reserved", or "result" of one of torch's operators
    whole: View
    tensor: Tensor | None = None  # of a constant


class Step(NamedTuple):
    """What a launcher did: it called one of torch's operators, launched, or reserved memory.

    The arguments have a View for each tensor.
    """

    made: int | None = None  # the root that was reserved, or is the operator's result
    function: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    launch: "Launched | None" = None


class Place:
    """Stands for an address among a kernel's arguments, or for the tensor of a descriptor.

    `view` is the tensor that has the address; None stands for the stream.
    """

    def __init__(self, view: View | None = None, at: int = 0) -> None:
        self.view, self.at = view, at

    def data_ptr(self) -> int:
        """Returns the address, as Triton asks for it when it makes a tensor map."""
        return self.at


class Launched:
    """A launch: the function in C that starts the kernel, and what it is given.

    Triton's launcher prepares these arguments in Python each time: it drops or adds some, and turns
    tensor descriptors into tensor maps. To see them, we run the launcher once with a Python
    function in place of the one in C. `args` then has a Place for each address and the stream.
    """

    def __init__(self, launch: Launch, grid: tuple[int, ...], values: list[Any]) -> None:
        run: Any = launch.launcher
        if run.global_scratch_size or run.profile_scratch_size:
            raise Unplannable("a kernel needs scratch memory")
        self.launch, self._grid, self._values = launch, grid, values
        self.described: list[Place] = [x.base for x in values if isinstance(x, TensorDescriptor)]
        self.maps: list[dict[int, Any]] = [{} for _ in self.described]
        self._lock = threading.Lock()
        self._run, self.start, see = copy.copy(run), run.launch, self._see
        if isinstance(run.launch, types.FunctionType):
            closure: Any = run.launch.__closure__
            names, cells = run.launch.__code__.co_freevars, [*closure]
            if "launcher" not in names:
                raise Unplannable("Triton launches in a way that is not known")
            which = names.index("launcher")
            self.start, cells[which] = cells[which].cell_contents, types.CellType(see)
            code, scope = run.launch.__code__, run.launch.__globals__
            see = types.FunctionType(code, scope, closure=tuple(cells))
        self._run.launch = see
        self.args: tuple[Any, ...] = self._made()
        if sum(map(is_map, leaves(self.args))) not in (0, len(self.described)):
            raise Unplannable("a descriptor takes several tensor maps")

    def _see(self, *args: Any) -> None:
        self._seen = args

    def _made(self) -> tuple[Any, ...]:
        kept = self.launch
        base = Place(), kept.function, kept.packed, None, None, None
        self._run(*self._grid, *base, *self._values)
        return self._seen

    def fill(self, *addresses: int) -> list[Any]:
        """Returns tensor maps for descriptors of tensors at these addresses, and keeps them.

        A map depends on the address alone; the rest is the same in all calls of a plan.
        """
        with self._lock:  # all threads share the places
            for place, at in zip(self.described, addresses, strict=True):
                place.at = at
            made = [x for x in leaves(self._made()) if is_map(x)]
            for kept, at, each in zip(self.maps, addresses, made, strict=True):
                if len(kept) >= MAX_MAPS:
                    kept.clear()
                kept[at] = each
        return made


def is_map(x: Any) -> bool:
    """Whether an argument of a launch is a tensor map, CUDA's form of a descriptor."""
    return type(x).__name__ == "PyCUtensorMap"


def leaves(tree: Any) -> Iterator[Any]:
    """Goes through nested tuples and lists, or a single object."""
    if type(tree) in (tuple, list):
        for x in tree:
            yield from leaves(x)
    else:
        yield tree


def changed(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Returns nested tuples and lists with each leaf changed."""
    if type(tree) in (tuple, list):
        return type(tree)(changed(x, change) for x in tree)
    return change(tree)


class Recording(TorchDispatchMode):
    """Records a launcher that is called with `args`; `tell` adds its launches.

    Args:
        args: The arguments of a call.
        launchers: The launchers of gptfast's own operators, by name.
        current_stream: Returns the current stream of the device.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        launchers: Mapping[str, Callable[..., Any]],
        current_stream: Callable[[], int],
    ) -> None:
        super().__init__()
        self._launchers = launchers
        self.roots: list[Root] = []
        self.steps: list[Step] = []
        self.refused: str | None = None  # why there will be no plan
        self.undecided = False  # whether a configuration is still to be chosen: no plan yet
        self._views: Any = WeakTensorKeyDictionary()
        self._current_stream, self._stream = current_stream, current_stream()
        # An object for each argument, because one tensor may be several of them.
        self.args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        self._memory = set()
        for x in self.args:
            if isinstance(x, Tensor):
                self._add("argument", x)
                self._memory.add(x.untyped_storage().data_ptr())
        self.device = args[0].device

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Calls one of torch's operators, and notes it."""
        kwargs = kwargs or {}
        if function.namespace == "gptfast":
            with self:
                return self._launchers[function.name().removeprefix("gptfast::")](*args)
        if torch.is_inference_mode_enabled():  # then composed operators come here, too
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = function(*args, **kwargs)
        if self._current_stream() != self._stream:
            self.refused = "it uses several streams"
        if function is aten._local_scalar_dense.default or not UNKNOWN.isdisjoint(function.tags):
            self.refused = f"{function} depends on numbers"
        elif function.is_view:
            self._note_views(args[0], result)
        elif function in RESERVING and result.device == self.device:
            self.steps.append(Step(self._add("reserved", result)))
        else:
            self._note_call(function, args, kwargs, result)
        return result

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Records what this thread does."""
        thread = threading.get_ident()
        _active[thread] = self
        try:
            with self:
                yield
        finally:
            del _active[thread]

    def _note_views(self, x: Tensor, result: Any) -> None:
        base = self.view(x)
        for each in leaves(result):
            moved = each.storage_offset() * each.element_size()
            moved -= x.storage_offset() * x.element_size()
            self._views[each] = View(base.root, base.offset + moved, *_geometry(each))

    def _note_call(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = [x for x in leaves([args, *kwargs.values()]) if isinstance(x, Tensor)]
        new = [x for x in leaves(result) if all(x is not each for each in given)]
        if len(new) > 1 or not all(isinstance(x, Tensor) for x in new):
            self.refused = f"{function} has several results"
            return
        seen = changed(args, self._view), {k: changed(x, self._view) for k, x in kwargs.items()}
        self.steps.append(Step(self._add("result", new[0]) if new else None, function, *seen))

    def launched(self, launch: Launch | None, grid: tuple[int, ...], values: Any) -> None:
        """Notes a launch; see `tell`."""
        if launch is None:
            self.undecided = True
        elif self._current_stream() != self._stream:
            self.refused = "it uses several streams"
        else:
            try:
                self.steps.append(Step(launch=Launched(launch, grid, [*map(self._place, values)])))
            except Unplannable as error:
                self.refused = str(error)

    def _place(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return Place(self.view(x), x.data_ptr())
        if isinstance(x, TensorDescriptor):
            x = copy.copy(x)
            x.base = self._place(x.base)
        return x

    def _add(self, kind: str, x: Tensor) -> int:
        self._views[x] = view = View(len(self.roots), 0, *_geometry(x))
        self.roots.append(Root(kind, view, x if kind == "constant" else None))
        return view.root

    def view(self, x: Tensor) -> View:
        """Returns where a tensor is; a tensor of unknown origin counts as a constant."""
        if x not in self._views:
            if x.untyped_storage().data_ptr() in self._memory:
                self.refused = "it has an argument by another way than torch's operators"
            self._add("constant", x)
        found: View = self._views[x]
        return found

    def _view(self, x: Any) -> Any:
        return self.view(x) if isinstance(x, Tensor) else x

    def views(self, result: Any) -> Any:
        """Returns a launcher's result with a View for each tensor."""
        if not all(x is None or isinstance(x, Tensor) for x in leaves(result)):
            raise Unplannable("it returns something else than tensors")
        return changed(result, self._view)


def _geometry(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tuple(x.shape), x.stride(), x.dtype
