"""Writes a recording as Python: a function that does what the launcher did; see `plans`."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptfast.ops.triton.recording import (
    Launched,
    Place,
    Recording,
    Step,
    Unplannable,
    View,
    is_map,
    leaves,
)

# Their functions in Python take a third of the time of a call by torch.ops.
DIRECT = {
    torch.ops.aten.addmm.out: torch.addmm,
    torch.ops.aten.addmm.dtype_out: torch.addmm,
}
SCRATCH_BYTES = 2**20  # intermediate results of at most so much in all share one allocation
ALIGNMENT = 512  # of memory that torch reserves, in bytes

_guards = torch._C._dynamo.guards
# The code of torch.compile calls these. They do without torch's dispatcher.
_empty_strided_cuda = getattr(_guards, "_empty_strided_cuda", None)
_reinterpret_tensor = getattr(_guards, "_reinterpret_tensor", None)


def _empty(device: torch.device) -> Callable[..., Tensor]:
    """Returns a function of shape, stride and dtype that reserves memory on the current device."""
    if device.type == "cuda" and _empty_strided_cuda is not None:
        found: Callable[..., Tensor] = _empty_strided_cuda
        return found
    return lambda *geometry: torch.empty_strided(*geometry[:2], dtype=geometry[2], device=device)


def _part(x: Tensor, shape: Any, stride: Any, offset: int) -> Tensor:
    """Returns a tensor of x's memory, by strides, from element `offset` of x on."""
    return x.detach().as_strided(shape, stride, x.storage_offset() + offset)


def write(
    recording: Recording, result: Any, names: list[str], tensors: list[str], stream: Any
) -> Callable[..., Any]:
    """Returns the plan of what was recorded.

    Args:
        recording: What the launcher did.
        result: What it returned.
        names: The names of the launcher's arguments.
        tensors: The names of those that are or may be tensors.
        stream: Returns the current stream of the device with an index.

    Returns:
        A function of the launcher's arguments and of the addresses of `tensors`.

    Raises:
        Unplannable: A plan cannot repeat the recording.
    """
    writer = _Writer(recording, recording.views(result), names)
    lines = writer.written()
    if any(step.launch for step in recording.steps):
        # Numbers are constants of a plan, so it does not read its argument `stream`.
        writer.scope["current_stream"] = stream
        lines.insert(0, f"stream = current_stream({recording.device.index})")
    parameters = ", ".join([*names, *(f"{name}_at" for name in tensors)])
    exec("\n    ".join([f"def plan({parameters}):", *lines]), writer.scope)
    plan: Callable[..., Any] = writer.scope["plan"]
    return plan


class _Writer:
    """The lines of a plan, and the objects that they name."""

    def __init__(self, recording: Recording, result: Any, names: list[str]) -> None:
        self.roots, self.steps, self.result = recording.roots, recording.steps, result
        self.scope: dict[str, Any] = {
            "empty": _empty(recording.device),
            "part": _reinterpret_tensor or _part,
        }
        self._lines: list[str] = []
        pairs = zip(names, recording.args, strict=True)
        given = [name for name, x in pairs if isinstance(x, Tensor)]
        made = (f"t{i}" for i in range(len(given), len(self.roots)))
        self._names = [*given, *made]
        self._parts: dict[View, str] = {}
        self._of_root: dict[int, list[str]] = defaultdict(list)  # variables that hold its memory
        self._find_uses()
        self._find_places()

    def _find_uses(self) -> None:
        """Finds for each root the views that must be tensors, and the last step that uses it."""
        self._wanted: dict[int, list[View]] = defaultdict(list)
        self._read: set[int] = set()  # roots of which the address is used
        self._last: dict[int, int] = {}
        for view in leaves(self.result):
            if view is not None and view.elements():
                self._wanted[view.root].append(view)
                self._last[view.root] = len(self.steps)
        for i, step in enumerate(self.steps):
            launched = () if step.launch is None else (step.launch.args, step.launch.described)
            for x in leaves([step.args, [*step.kwargs.values()], *launched]):
                view = x.view if isinstance(x, Place) else x
                if not isinstance(view, View):
                    continue
                if isinstance(x, Place):
                    self._read.add(view.root)
                else:
                    self._wanted[view.root].append(view)
                self._last[view.root] = max(i, self._last.get(view.root, 0))

    def _find_places(self) -> None:
        """Finds the roots that lie in the scratch memory, and the shapes that the others have."""
        self._made = [root.whole for root in self.roots]
        inner = []
        for i, root in enumerate(self.roots):
            if root.kind != "reserved":
                continue
            whole = root.whole
            for view in self._wanted[i]:  # a tensor is made in the shape in which it is wanted
                all_of_it = view.elements() == view.span() == whole.span() and view.offset == 0
                if all_of_it and view.dtype == whole.dtype:
                    self._made[i] = view
                    break
            if i in self._last and not self._wanted[i]:
                inner.append((i, whole.span() * whole.dtype.itemsize))
        self._places: dict[int, int] = {}
        self._scratch = 0
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for _, size in inner]
        if len(inner) > 1 and sum(padded) <= SCRATCH_BYTES:
            for (i, _), size in zip(inner, padded, strict=True):
                self._places[i] = self._scratch
                self._scratch += size

    def written(self) -> list[str]:
        """Returns the lines of the plan."""
        if self._scratch:
            self._lines.append(
                f"scratch = empty(({self._scratch},), (1,), {self._of(torch.uint8)})"
            )
            self._lines.append("scratch_at = scratch.data_ptr()")
        for i, step in enumerate(self.steps):
            if step.launch is not None:
                self._launch(step.launch)
            elif step.function is not None:
                self._call(step)
            elif step.made is not None:
                self._reserve(step.made)
            done = (root for root, last in self._last.items() if last == i)
            ended = [name for root in done for name in self._of_root[root]]
            if ended:
                self._lines.append(f"del {', '.join(ended)}")
        self._lines.append(f"return {self._of(self.result, self._returned)}")
        return self._lines

    def _of(self, x: Any, leaf: Callable[[Any], str] | None = None) -> str:
        """Returns the Python of a View, a Place, a tuple or list that has some, or a constant."""
        own = leaf or self._leaf
        if type(x) in (tuple, list) and (leaf or any(map(_changes, leaves(x)))):
            inside = "".join(f"{self._of(each, leaf)}, " for each in x)
            return f"({inside})" if type(x) is tuple else f"[{inside}]"
        return own(x)

    def _leaf(self, x: Any) -> str:
        if isinstance(x, View):
            return self._tensor(x)
        if isinstance(x, Place):
            return self._address(x)
        if is_map(x):
            return next(self._maps)
        if all(map(_is_literal, leaves(x))):
            return repr(x)
        name = str(x)[6:] if isinstance(x, torch.dtype) else f"c{len(self.scope)}"
        self.scope[name] = x
        return name

    def _returned(self, view: View | None) -> str:
        if view is None:
            return "None"
        if view.elements():
            return self._tensor(view)
        return f"empty({view.shape}, {view.stride}, {self._of(view.dtype)})"

    def _address(self, place: Place) -> str:
        view = place.view
        if view is None:
            return "stream"
        name, offset = self._names[view.root], view.offset
        if view.root in self._places:
            name, offset = "scratch", offset + self._places[view.root]
        constant = self.roots[view.root].tensor
        if constant is not None:
            self.scope |= {name: constant, f"{name}_at": constant.data_ptr()}
        return f"{name}_at + {offset}" if offset else f"{name}_at"

    def _tensor(self, view: View) -> str:
        """Returns the variable of a tensor; first writes the line that makes it."""
        made, name = self._made[view.root], self._names[view.root]
        if self.roots[view.root].kind == "constant":
            self.scope[name] = self.roots[view.root].tensor
        if view == made:
            return name
        if view not in self._parts:
            if view.dtype != made.dtype or view.offset % view.dtype.itemsize:
                raise Unplannable("it reads a tensor as one of another dtype")
            self._parts[view] = part = f"v{len(self._parts)}"
            offset = view.offset // view.dtype.itemsize
            self._lines.append(f"{part} = part({name}, {view.shape}, {view.stride}, {offset})")
            self._of_root[view.root].append(part)
        return self._parts[view]

    def _make(self, root: int, how: str) -> None:
        """Writes the line that makes a root."""
        name = self._names[root]
        self._lines.append(f"{name} = {how}")
        self._of_root[root].append(name)
        if root in self._read:
            self._lines.append(f"{name}_at = {name}.data_ptr()")

    def _reserve(self, root: int) -> None:
        if root in self._last and root not in self._places:
            view = self._made[root]
            self._make(root, f"empty({view.shape}, {view.stride}, {self._of(view.dtype)})")

    def _call(self, step: Step) -> None:
        args = [self._of(x) for x in step.args]
        args += [f"{name}={self._of(x)}" for name, x in step.kwargs.items()]
        how = f"{self._of(DIRECT.get(step.function, step.function))}({', '.join(args)})"
        if step.made is None or step.made not in self._last:
            self._lines.append(how)
        else:
            self._make(step.made, how)

    def _launch(self, launched: Launched) -> None:
        maps: list[str] = []
        if any(map(is_map, leaves(launched.args))):
            number = len(self.scope)
            maps = [f"m{number}_{i}" for i in range(len(launched.maps))]
            kept = [self._of(each.get) for each in launched.maps]
            at = [self._address(place) for place in launched.described]
            found = (f"{get}({each})" for get, each in zip(kept, at, strict=True))
            self._lines.append(f"{', '.join(maps)}, = {', '.join(found)},")
            missing = " or ".join(f"{name} is None" for name in maps)
            fill = f"{self._of(launched.fill)}({', '.join(at)})"
            self._lines.append(f"if {missing}: {', '.join(maps)}, = {fill}")
        self._maps = iter(maps)
        args = ", ".join(self._of(x) for x in launched.args)
        self.scope[f"kept{len(self.scope)}"] = launched.launch  # holds the compiled kernel
        self._lines.append(f"{self._of(launched.start)}({args})")


def _is_literal(x: Any) -> bool:
    return x is None or type(x) in (bool, int, str) or (type(x) is float and math.isfinite(x))


def _changes(x: Any) -> bool:
    return isinstance(x, View | Place) or is_map(x)
