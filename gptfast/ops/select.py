"""Which backend can run: loads the compiled extension, and says why where there is none."""

import importlib
import importlib.util
from types import ModuleType

import torch

from gptfast.errors import BackendError

FUSED_DTYPES = (torch.float32, torch.bfloat16)


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("gptfast._C"), None
    except ImportError as error:
        return None, f"the compiled extension cannot be loaded ({error})"


_extension, extension_error = _load()


def extension() -> ModuleType | None:
    """The compiled module, or None; `extension_error` then says why."""
    return _extension


def unavailable(device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Why the fused kernels cannot run on this device type and dtype; empty when they can."""
    reasons = []
    if dtype not in FUSED_DTYPES:
        reasons.append(
            f"they compute in float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        )
    if device != "cpu":
        reasons.append(f"there are none for device type {device!r}")
    elif extension_error is not None:
        reasons.append(extension_error)
    return tuple(reasons)


def require_fused(op: str, device: str, dtype: torch.dtype, instead: str | None = None) -> None:
    """Raises BackendError with every reason, and what can run, where the fused kernels cannot."""
    reasons = unavailable(device, dtype)
    if reasons:
        raise BackendError(
            f"{op}: the fused kernels cannot run: {'; '.join(reasons)};"
            f" {instead or f'gptfast.ops.reference.{op}'} can"
        )
