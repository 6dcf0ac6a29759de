"""What the operators check of their arguments."""

import torch
from torch import Tensor

from gptfast.ops import select
from gptfast.ops.autograd import constant, transformed


def check_activation(op: str, name: str, x: Tensor, dims: int | None = None) -> None:
    """Checks that `x` is what the fused kernels take, with `dims` dimensions, else with any."""
    check_floating(op, name, x, dims)
    if x.dim() == 0:
        raise ValueError(f"{op}: {name} must have at least 1 dimension, got shape ()")
    select.require_fused(op, x.device.type, x.dtype)


def check_floating(op: str, name: str, x: Tensor, dims: int | None = None) -> None:
    """Checks that `x` is a tensor of floating-point numbers, of `dims` dimensions where given."""
    check_tensor(op, name, x)
    if not x.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {x.dtype}")
    check_tensor(op, name, x, dims)


def check_tensor(op: str, name: str, x: Tensor, dims: int | None = None) -> None:
    """Checks that `x` is a tensor, of `dims` dimensions where given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{op}: {name} must have {dims} dimensions, got shape {tuple(x.shape)}")


def check_like(op: str, name: str, x: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    """Checks an activation's shape, and that its dtype and device are those of `like`."""
    check_shape(op, name, x, shape)
    if x.dtype != like.dtype or x.device != like.device:
        raise TypeError(
            f"{op}: {name} must be {like.dtype} on {like.device}, got {x.dtype} on {x.device}"
        )


def check_param(op: str, name: str, x: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> None:
    """Checks an optional parameter: shape, contiguous, float32 or the activations' dtype."""
    if x is None:
        return
    check_shape(op, name, x, shape)
    if x.dtype not in (torch.float32, like.dtype):
        raise TypeError(f"{op}: {name} must be torch.float32 or {like.dtype}, got {x.dtype}")
    if x.device != like.device:
        raise TypeError(f"{op}: {name} must be on {like.device}, got {x.device}")
    if not x.is_contiguous() and not transformed():  # a slice that `vmap` takes becomes contiguous
        raise ValueError(f"{op}: {name} must be contiguous, got strides {x.stride()}")


def check_shape(op: str, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Checks that `x` is a tensor of this shape."""
    check_tensor(op, name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(x.shape)}")


def check_indices(
    op: str, name: str, x: Tensor, like: Tensor, shape: tuple[int, ...] | None = None
) -> None:
    """Checks that a tensor holds int64 indices where `like` is; the kernels check their range."""
    check_tensor(op, name, x)
    if x.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be torch.int64, got {x.dtype}")
    if x.device != like.device:
        raise TypeError(f"{op}: {name} must be on {like.device}, got {x.device}")
    if shape is not None:
        check_shape(op, name, x, shape)


def check_dropout(op: str, dropout_p: float) -> float:
    """Checks a dropout probability and returns it as a number."""
    dropout_p = constant(op, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}")
    return dropout_p


def check_choice(op: str, name: str, value: str, known: tuple[str, ...]) -> None:
    """Checks a named choice."""
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {known}, got {value!r}")
