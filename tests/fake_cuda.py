"""A CUDA device that is not there: finds tensors on the wrong device, on a machine without a GPU.

Tests run with fake tensors, which have a device, a shape and a dtype, but no numbers. torch checks
the devices of every operation, and `launches` those of every kernel. Whatever depends on numbers
is answered as a passing test would answer it.
"""

import contextlib
import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
CHIP = SimpleNamespace(multi_processor_count=132, major=9, minor=0)  # of an H100
# torch switches to the device of a tensor even where nothing will be computed.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""


@functools.cache
def load_guard() -> None:
    """Compiles and loads GUARD; skips the test where there is no compiler."""
    torch_at = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD)
        options = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{torch_at / 'include'}"]
        command = [os.environ.get("CXX", "c++"), *options, source]
        command += [f"-L{torch_at / 'lib'}", "-lc10", "-o", library]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip("there is no C++ compiler")
        ctypes.CDLL(str(library))


def same_device(*args: Any) -> None:
    """Raises RuntimeError if tensors lie on several devices; single numbers may lie anywhere."""
    tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.dim() > 0]
    found = {str(x.device) for x in tensors}
    if len(found) > 1:
        raise RuntimeError(f"tensors on several devices: {', '.join(sorted(found))}")


class Answers(TorchFunctionMode):
    """Answers what depends on numbers, and differentiates without running a backward pass.

    Autograd would ask the device for its streams.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Answers `function`, or calls it."""
        kwargs = kwargs or {}
        if function in (torch.equal, torch.allclose):
            same_device(*args)
            return True
        if function in (Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.__index__):
            return 0.0 if args[0].dtype.is_floating_point else 0
        if function is Tensor.__deepcopy__:  # torch would copy a storage that is not there
            copied = args[0].detach().clone()
            return nn.Parameter(copied) if isinstance(args[0], nn.Parameter) else copied
        if function is Tensor.tolist:
            return numbers(args[0])
        if function is Tensor.__bool__:
            return True
        if function is torch.autograd.grad:
            return self.grad(*args, **kwargs)
        if function is Tensor.backward:
            pytest.skip("there is no graph of fake tensors")
        result = function(*args, **kwargs)
        if function is torch.tensor and result.dim() == 0:
            result.constant = None  # whose numbers torch knows, it would move in earnest
        return result

    @staticmethod
    def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, **_: Any) -> tuple[Tensor, ...]:
        """Checks the devices of results and their gradients; returns what has the right shapes."""
        outs, grads = tree_leaves(outputs), tree_leaves(grad_outputs)
        for out, grad in zip(outs, grads, strict=False):
            if grad is not None and (out.device, out.shape) != (grad.device, grad.shape):
                raise RuntimeError(f"gradient on {grad.device} of a result on {out.device}")
        return tuple(torch.empty_like(x) for x in tree_leaves(inputs))


def launch(kernel: Any, *args: Any, **options: Any) -> None:
    """Stands for the launch of a Triton kernel: checks the devices of its tensors."""
    for x in tree_leaves((args, {k: v for k, v in options.items() if k != "grid"})):
        if isinstance(x, Tensor) and x.device != DEVICE:
            raise RuntimeError(f"{kernel} gets a tensor on {x.device}: {tuple(x.shape)}")


def numbers(x: Tensor) -> Any:
    """Stands for Tensor.tolist: zeros in the shape of x."""
    zero = 0.0 if x.dtype.is_floating_point else 0
    return [numbers(row) for row in x] if x.dim() else zero


def convert(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Stands for nn.Module._apply, which cannot change fake parameters in place."""
    made: dict[int, nn.Parameter] = {}
    for each in module.modules():
        for name, param in each._parameters.items():
            if param is not None:  # a tied parameter stays tied
                new = nn.Parameter(change(param.detach()), param.requires_grad)
                each._parameters[name] = made.setdefault(id(param), new)
        for name, buffer in each._buffers.items():
            each._buffers[name] = None if buffer is None else change(buffer)
    return module


class Generator(torch.Generator):
    """Stands for torch.Generator: a torch for the CPU has none of a GPU."""

    def __new__(cls, device: Any = None) -> "Generator":
        return super().__new__(cls)


def check_close(*args: Any, **_: Any) -> None:
    """Stands for torch.testing.assert_close."""
    same_device(*args)


@contextlib.contextmanager
def on_fake_cuda(kernels: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Makes tensors fake, and operators call their launchers, whose kernels do nothing."""
    from triton.runtime.interpreter import InterpretedFunction

    load_guard()
    fakes = {name: mock.MagicMock(side_effect=kernel) for name, kernel in kernels.items()}
    patches = [
        mock.patch.object(InterpretedFunction, "run", launch),
        mock.patch.object(torch.cuda, "device_of", lambda _: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_: CHIP),
        mock.patch.object(nn.Module, "_apply", convert),
        mock.patch.object(torch.testing, "assert_close", check_close),
        mock.patch.object(torch, "Generator", Generator),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(Answers())
        library = torch.library.Library("gptfast", "IMPL")
        for name in fakes:
            torch.library.register_fake(
                f"gptfast::{name}", kernels[name], lib=library, allow_override=True
            )
        yield
        library._destroy()
