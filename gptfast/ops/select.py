"""Loads the fused kernels, and reports why they cannot run where that is so."""

import importlib
from types import ModuleType

import torch

from gptfast.checks import dtype_name
from gptfast.errors import BackendError, ConfigError

FUSED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
MAX_HEAD_DIM = {"cuda": 256}  # the largest head_dim that a tile can hold


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("gptfast._C"), None
    except ImportError as error:
        return None, f"the compiled extension cannot be loaded ({error})"


_extension, extension_error = _load()


def extension() -> ModuleType | None:
    """Returns the compiled module, or None; `extension_error` then contains the reason."""
    return _extension


def triton_error() -> str | None:
    """Registers the kernels for CUDA and ROCm; returns None, or the reason why it cannot."""
    try:  # torch.compile can trace the import statement, but not importlib or functools.cache
        import gptfast.ops.triton  # noqa: F401
    except ImportError as error:
        return f"they need Triton, pip install 'gptfast-kernels[gpu]' ({error})"
    return None


def unavailable(device: str, dtype: torch.dtype, head_dim: int = 0) -> tuple[str, ...]:
    """Returns the reasons why the fused kernels cannot run with these arguments; () if they can."""
    if device not in FUSED_DTYPES:
        return (f"there are none for device type {device!r}",)
    reasons = []
    if dtype not in FUSED_DTYPES[device]:
        known = " and ".join(map(dtype_name, FUSED_DTYPES[device]))
        reasons.append(f"they compute in {known}, not {dtype_name(dtype)}")
    max_head_dim = MAX_HEAD_DIM.get(device, head_dim)
    if head_dim > max_head_dim:
        reasons.append(f"head_dim is at most {max_head_dim} there, not {head_dim}")
    error = extension_error if device == "cpu" else triton_error()
    if error is not None:
        reasons.append(error)
    return tuple(reasons)


def require_fused(
    op: str, device: str, dtype: torch.dtype, instead: str | None = None, head_dim: int = 0
) -> None:
    """Raises BackendError if the fused kernels cannot run, with all reasons and an alternative."""
    reasons = unavailable(device, dtype, head_dim)
    if reasons:
        raise BackendError(
            f"{op}: the fused kernels cannot run: {'; '.join(reasons)};"
            f" {instead or f'gptfast.ops.reference.{op}'} can"
        )


def usable_device(name: str | torch.device) -> torch.device:
    """Returns the device of this name. Raises ConfigError if torch cannot store data on it here."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device must be 'cpu' or 'cuda', got {name!r}") from None
    given = str(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {given!r}: torch finds no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"device {given!r}: torch finds {count} CUDA devices here")
    if device.type == "meta":
        raise ConfigError("device 'meta' keeps no numbers; 'cpu' and 'cuda' do")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError):  # depends on the device type
        raise ConfigError(f"device {given!r}: torch cannot use it here") from None
    return device
