"""What the launchers share: autotuning, device limits, float32 precision, dropout arguments."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
# Bytes of shared memory per block: the smallest limit of the chips in benchmarks/gpu_static.py.
MIN_SHARED = 65536
INTERPRETED_PROGRAMS = 3  # `programs` in Triton's interpreter
# Options of a kernel with tl.device_assert, which Triton leaves out otherwise; the checks for
# overflow of integers, which Triton 3.6 adds along with it, stay out.
ASSERTING = {"debug": True, "sanitize_overflow": False}

Args = Mapping[str, Any]


def tuned(
    configs: Mapping[Any, list[triton.Config]],
    which: Callable[[Args], Any],
    shared: Callable[[Args], int],
    key: list[str],
) -> Any:
    """Decorates a kernel: autotunes its configuration once per `key` and dtypes; caches the result.

    No key contains the batch size, and kernels that compute rows of an activation are not
    specialised for the number of rows, so a row's bits do not depend on the other rows.

    Args:
        configs: The candidates per kind of call: configurations that do not spill registers on the
            chips of benchmarks/gpu_static.py, the one that fits every chip last.
        which: Returns the kind of a call from its arguments.
        shared: Returns the bytes of operands in shared memory from the arguments; configurations
            above the device's limit are not tried.
        key: Names of the arguments that the choice may depend on.
    """

    def fitting(_: list[triton.Config], args: dict[str, Any], **more: Any) -> list[triton.Config]:
        known, limit = {**args, **more}, shared_limit()
        mine = configs[which(known)]
        return [c for c in mine if shared({**known, **c.all_kwargs()}) <= limit] or mine[-1:]

    def wrap(kernel: Any) -> Any:
        every = [config for each in configs.values() for config in each]
        return triton.autotune(
            every[:1] if INTERPRETED else every,
            key=key,
            prune_configs_by={"early_config_prune": fitting},
            cache_results=True,
        )(kernel)

    return wrap


def config(warps: int, stages: int, **tile: int) -> triton.Config:
    """Makes a configuration; `tile` has the sizes of its tiles by name."""
    return triton.Config(tile, num_warps=warps, num_stages=stages)


def shared_limit() -> int:
    """Returns the limit of shared memory per block of the current device, in bytes."""
    if not torch.cuda.is_available():
        return MIN_SHARED
    return triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())[
        "max_shared_mem"
    ]


def processors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(device: torch.device) -> int:
    """Returns the number of programs of a kernel whose programs loop over tiles."""
    return processors(device) if device.type != "cuda" else 2 * processors(device)


def precision() -> str:
    """Returns tl.dot's precision for float32, as torch.backends.cuda.matmul.fp32_precision demands.

    On NVIDIA the default is three tf32 products, whose sum has float32's accuracy (Ootomo and
    Yokota, arXiv:2203.03341). AMD's matrix units multiply float32 directly; only gfx942 has tf32.
    """
    # torch.set_float32_matmul_precision sets it too, but its getter raises if both APIs were used.
    short = torch.backends.cuda.matmul.fp32_precision == "tf32"
    target = None if INTERPRETED else triton.runtime.driver.active.get_current_target()
    if target is not None and target.backend == "cuda":
        return "tf32" if short else "tf32x3"
    return "tf32" if short and target is not None and target.arch == "gfx942" else "ieee"


def dropout_args(p: float, seed: Tensor | None, stream: int, device: Any) -> dict[str, Any]:
    """Returns the arguments of `tiles.dropout_factors`; see gptfast.ops.random."""
    threshold = int(p * 65536 + 0.5) if seed is not None else 0
    return {
        "seed": None if seed is None else seed.to(device),
        "substream": stream & 0xFFFFFFFF,
        "threshold": threshold,
        "keep_scale": 65536 / (65536 - threshold) if threshold < 65536 else 0.0,
    }


NO_DROPOUT: dict[str, Any] = {"seed": None, "substream": 0, "threshold": 0, "keep_scale": 1.0}


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up. (triton.cdiv takes 4 us.)"""
    return -(-a // b)


def block_of(n: int, least: int = 16) -> int:
    """Returns the smallest power of 2 >= n and `least`; tl.dot needs at least 16."""
    return max(least, triton.next_power_of_2(n))


def absent(like: Tensor) -> Tensor:
    """Returns the empty tensor that stands for an absent result of an operator."""
    return like.new_empty(0, dtype=torch.float32)


def or_absent(like: Tensor, *results: Tensor | None) -> tuple[Tensor, ...]:
    """Returns an operator's results, each None replaced by an empty tensor of its own."""
    return tuple(absent(like) if each is None else each for each in results)


def wants(wanted: int, first: int, last: int | None = None) -> bool:
    """Whether any of the results `first` to `last` of a backward is wanted; see ops.autograd."""
    return any(wanted >> i & 1 for i in range(first, (first if last is None else last) + 1))
