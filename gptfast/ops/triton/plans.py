"""Calls of operators by plan: what a launcher did for a signature, done again without asking how.

A launcher chooses tiles and grids, makes views and descriptors, and passes thirty arguments to each
kernel, which takes 100 us of Python or more. But for the addresses, all of it is the same for
tensors of one signature. So the second call of a signature is recorded (`recording`), and later
calls run what it did as straight-line Python (`plan_code`). The plan of attention's forward:

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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptfast.ops.triton import launch
from gptfast.ops.triton.plan_code import write
from gptfast.ops.triton.recording import Recording, Unplannable

MAX_SIGNATURES = 4096  # of an operator; then all are forgotten

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def planned(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps an operator's launcher: it runs on the device of its first argument, by plan if it can.

    The launcher's annotations say which arguments are tensors; the first one is. What it does may
    depend on the signature of a call, and on nothing else. The signature consists of each tensor's
    shape, strides, dtype, device, and address modulo 16, of torch's precision of float32 products,
    and of the values of all other arguments.
    """
    return Planned(launcher).call


class Planned:
    """The plans of an operator by signature, and `call`, the function that looks for them."""

    def __init__(self, launcher: Callable[..., Any]) -> None:
        self.launcher = launcher
        self.plans: dict[Any, Callable[..., Any]] = {}
        # Of a signature that was seen: None, to be recorded, or why there is no plan.
        self.seen: dict[Any, str | None] = {}
        kinds = inspect.signature(launcher).parameters
        self.names = list(kinds)
        self.optional = [name for name in kinds if kinds[name].annotation == Tensor | None]
        self.tensors = [
            name for name in kinds if kinds[name].annotation is Tensor or name in self.optional
        ]
        self.call = self._caller()
        launch.FORGETTING.append(self.forget)

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
            own = (
                f"{name}.dtype, {name}.shape, {name}.stride(), {name}.get_device(), {name}_at & 15"
            )
            at = f"{name}.data_ptr()"
            if name in self.optional:
                own, at = (f"None if {name} is None else {x}" for x in (f"({own})", at))
            lines.append(f"{name}_at = {at}")
            key.append(own)
        key.append(f"precision() if {first}.dtype is float32 else None")
        names = ", ".join(self.names)
        addresses = ", ".join(f"{name}_at" for name in self.tensors)
        lines += [
            f"key = ({', '.join(key)})",
            "plan = plans.get(key)",
            f"if plan is None or {first}.get_device() != current_device() or observed():",
            f"    return unplanned(key, ({names},))",
            f"return plan({names}, {addresses})",
        ]
        scope: dict[str, Any] = {
            "plans": self.plans, "unplanned": self._unplanned, "current_device": current_device,
            "observed": launch.observed, "precision": launch.precision, "float32": torch.float32,
        }  # fmt: skip
        exec("\n    ".join([f"def call({names}):", *lines]), scope)
        made: Callable[..., Any] = scope["call"]
        made.__doc__ = self.launcher.__doc__
        return made

    def _unplanned(self, key: Any, args: tuple[Any, ...]) -> Any:
        """Calls the launcher, and records it if the signature was seen before."""
        if args[0].get_device() != current_device():
            with torch.cuda.device_of(args[0]):
                return self.call(*args)
        modes = torch._C._len_torch_dispatch_stack()
        if launch.observed() or modes or launch.slow_launches() is not None:
            return self.launcher(*args)
        if self.seen.get(key, "new") is None:
            return self._recorded(key, args)
        if len(self.seen) >= MAX_SIGNATURES:
            self.forget()
        self.seen.setdefault(key, None)
        return self.launcher(*args)

    def _recorded(self, key: Any, args: tuple[Any, ...]) -> Any:
        stream = launch.current_stream()
        recording = Recording(args, lambda: stream(args[0].get_device()))
        with launch.recorded(recording), recording:
            result = self.launcher(*recording.args)
        try:
            if recording.refused is not None:
                raise Unplannable(recording.refused)
            self.plans[key] = write(recording, result, self.names, self.tensors, stream)
        except Unplannable as error:
            self.seen[key] = str(error)
        return result
