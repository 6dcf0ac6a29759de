"""Replays, per signature, the launches that an operator's launcher recorded.

A launcher chooses tiles and grids, makes views and descriptors, and passes thirty arguments to each
kernel, which takes 100 us of Python or more. Except for the addresses, all of it is the same for
tensors of one signature. So the second call of a signature is recorded (`recording`), and later
calls repeat its steps by a plan, straight-line Python (`plan_code`). The plan of attention's
forward:

    stream = current_stream(0)
    t3 = empty((2, 64, 4, 32), (8192, 128, 32, 1), bfloat16)
    t3_at = t3.data_ptr()
    t4 = empty((2, 4, 2, 64), (512, 128, 64, 1), float32)
    t4_at = t4.data_ptr()
    m0, m1, = maps0(k_at), maps1(v_at),
    if m0 is None or m1 is None: m0, m1, = fill(k_at, v_at)
    start(8, 1, 1, stream, function, .., q_at, k_at, v_at, t3_at, t4_at, m0, .., m1, .., 4, 64, ..)
    return (t3, t4, )

Tensor maps are kept by address, because torch's allocator returns the same addresses again.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from gptfast.ops.triton import launch
from gptfast.ops.triton.plan_code import write
from gptfast.ops.triton.recording import FORGETTING, Recording, Unplannable

MAX_SIGNATURES = 1024  # of an operator; then all are forgotten

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def current_stream() -> Callable[[int], int]:
    """Returns the function that returns the current stream of a device."""
    found: Callable[[int], int] = triton.runtime.driver.active.get_current_stream
    return found


def planned(
    launcher: Callable[..., Any], launchers: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """Wraps an operator's launcher so that a plan runs it where possible.

    The launcher runs on the device of its first argument. A public function, which checks its
    arguments and calls launchers, can be wrapped too, for calls without gradients.

    The wrapped function may depend only on the signature of a call. The signature
    consists of each tensor's shape, strides, dtype, device, and address modulo 16, of torch's
    precision of float32 products, and of the values of all other arguments.

    Args:
        launcher: The function to wrap. Its annotations say which arguments are tensors; the first
            one must be.
        launchers: All launchers by the operators' names.
    """
    return Planned(launcher, launchers).call


class Planned:
    """The plans of a launcher by signature, and `call`, the function that finds them."""

    def __init__(
        self, launcher: Callable[..., Any], launchers: Mapping[str, Callable[..., Any]]
    ) -> None:
        self.launcher, self._launchers = launcher, launchers
        self.plans: dict[Any, Callable[..., Any]] = {}
        # For each signature seen: None if its next call is recorded, else why there is no plan.
        self.seen: dict[Any, str | None] = {}
        parameters = inspect.signature(launcher).parameters.values()
        self._keywords = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
        self._defaults = {x.name: x.default for x in parameters if x.default is not x.empty}
        self.names = [each.name for each in parameters]
        kinds = {each.name: each.annotation for each in parameters}
        self._optional = [name for name in kinds if kinds[name] == Tensor | None]
        self.tensors = [x for x in kinds if kinds[x] is Tensor or x in self._optional]
        self.call = self._caller()
        FORGETTING.append(self.forget)

    def forget(self) -> None:
        """Forgets all plans."""
        self.plans.clear()
        self.seen.clear()

    def _caller(self) -> Callable[..., Any]:
        """Makes the function that reads a signature: a few lines of Python without a loop."""
        first, lines, key = self.names[0], [], []
        for name in self.names:
            if name not in self.tensors:
                key.append(name)
                continue
            at, own = f"{name}.data_ptr()", f"{name}.dtype, {name}.shape, {name}.stride()"
            own += f", {name}.get_device(), {name}_at & 15"
            if name in self._optional:
                own, at = (f"None if {name} is None else {x}" for x in (f"({own})", at))
            lines.append(f"    {name}_at = {at}")
            key.append(own)
        key.append(f"precision() if {first}.dtype is float32 else None")
        names = ", ".join(self.names)
        addresses = ", ".join(f"{name}_at" for name in self.tensors)
        lines = [
            "try:",
            *lines,
            f"    key = ({', '.join(key)})",
            "except AttributeError:",  # an argument is no tensor
            f"    return run(({names},))",
            "plan = plans.get(key)",
            f"if plan is None or {first}.get_device() != current_device() or observed():",
            f"    return unplanned(key, ({names},))",
            f"return plan({names}, {addresses})",
        ]
        parameters = [
            f"{name}=defaults['{name}']" if name in self._defaults else name for name in self.names
        ]
        if self._keywords:
            parameters.insert(len(self.names) - len(self._keywords), "*")
        scope: dict[str, Any] = {
            "plans": self.plans, "unplanned": self._unplanned, "current_device": current_device,
            "observed": launch.observed, "precision": launch.precision, "float32": torch.float32,
            "run": self._run, "defaults": self._defaults,
        }  # fmt: skip
        own = self.launcher.__name__
        exec("\n    ".join([f"def {own}({', '.join(parameters)}):", *lines]), scope)
        made: Callable[..., Any] = scope[own]
        made.__doc__ = self.launcher.__doc__
        return made

    def _run(self, args: tuple[Any, ...]) -> Any:
        """Calls the launcher with the values of all its arguments."""
        count = len(self.names) - len(self._keywords)
        return self.launcher(*args[:count], **dict(zip(self._keywords, args[count:], strict=True)))

    def _unplanned(self, key: Any, args: tuple[Any, ...]) -> Any:
        """Calls the launcher, and records it if the signature was seen before."""
        device = args[0].get_device()
        if device != current_device():
            if device < 0:
                return self._run(args)  # raises the error
            with torch.cuda.device(device):
                return self._unplanned(key, args)
        modes = torch._C._len_torch_dispatch_stack()
        if launch.observed() or modes or launch.slow_launches() is not None:
            return self._run(args)
        if key in self.plans:
            addresses = (x if x is None else x.data_ptr() for x in self._tensors_of(args))
            return self.plans[key](*args, *addresses)
        if self.seen.get(key, "new") is None:
            return self._recorded(key, args)
        if len(self.seen) >= MAX_SIGNATURES:
            self.forget()
        self.seen.setdefault(key, None)
        return self._run(args)

    def _tensors_of(self, args: tuple[Any, ...]) -> list[Tensor | None]:
        return [x for name, x in zip(self.names, args, strict=True) if name in self.tensors]

    def _recorded(self, key: Any, args: tuple[Any, ...]) -> Any:
        stream = current_stream()
        own_stream = lambda: stream(args[0].get_device())  # noqa: E731
        recording = Recording(args, self._launchers, own_stream)
        with recording.running():
            result = self._run(recording.args)
        if recording.undecided:
            return result  # a later call of the signature is recorded
        try:
            if recording.refused is not None:
                raise Unplannable(recording.refused)
            self.plans[key] = write(recording, result, self.names, self.tensors, stream)
        except Unplannable as error:
            self.seen[key] = str(error)
        return result
