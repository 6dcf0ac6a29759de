"""How the kernels are launched: which configurations there are, and what a launch is told."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
# Bytes of shared memory that a block may have; the smallest of the chips that are checked.
LEAST_SHARED = 65536
INTERPRETED_PROGRAMS = 3  # of a kernel whose programs take several tiles, in the interpreter

Args = Mapping[str, Any]


def tuned(
    configs: Mapping[Any, list[triton.Config]],
    which: Callable[[Args], Any],
    shared: Callable[[Args], int],
    key: list[str],
) -> Any:
    """Has a kernel's configuration chosen by time, once per `key` and dtypes, and remembered.

    A key never has the batch in it, nor is a kernel that makes rows of an activation compiled for a
    number of them: a row's bits are the same whatever else there is.

    Args:
        configs: The candidates of each kind of call: those that stay in registers on the chips of
            benchmarks/gpu_static.py, the one that fits everywhere last.
        which: The kind, given the arguments.
        shared: Bytes of the operands that are in shared memory at once, given the arguments; what
            a chip cannot hold is left out before.
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
    """A configuration: the sides of its tiles by name."""
    return triton.Config(tile, num_warps=warps, num_stages=stages)


def shared_limit() -> int:
    """Bytes of shared memory that a block of the current device may have."""
    if not torch.cuda.is_available():
        return LEAST_SHARED
    return triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())[
        "max_shared_mem"
    ]


def programs(device: torch.device) -> int:
    """How many programs a kernel has whose programs take several tiles each."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def precision() -> str:
    """How float32 is multiplied: as torch.backends.cuda.matmul.fp32_precision says.

    By default as three products of tf32, whose sum has float32's digits (Ootomo and Yokota,
    arXiv:2203.03341); AMD's units multiply float32 itself, and only gfx942's multiply tf32.
    """
    # torch.set_float32_matmul_precision sets it, too, but cannot be asked where both were used.
    short = torch.backends.cuda.matmul.fp32_precision == "tf32"
    target = None if INTERPRETED else triton.runtime.driver.active.get_current_target()
    if target is not None and target.backend == "cuda":
        return "tf32" if short else "tf32x3"
    return "tf32" if short and target is not None and target.arch == "gfx942" else "ieee"


def dropout_args(p: float, seed: Tensor | None, stream: int, device: Any) -> dict[str, Any]:
    """What `tiles.dropout_factors` is told, as gptfast.ops.random.dropout_factors has it."""
    threshold = int(p * 65536 + 0.5) if seed is not None else 0
    return {
        "seed": None if seed is None else seed.to(device),
        "substream": stream & 0xFFFFFFFF,
        "threshold": threshold,
        "keep_scale": 65536 / (65536 - threshold) if threshold < 65536 else 0.0,
    }


def block_of(n: int, least: int = 16) -> int:
    """The smallest power of 2 that holds n, and that a product of tiles takes."""
    return max(least, triton.next_power_of_2(n))


def absent(like: Tensor) -> Tensor:
    """What an operator returns for a tensor that there is not."""
    return like.new_empty(0, dtype=torch.float32)


def wants(wanted: int, first: int, last: int | None = None) -> bool:
    """Whether result number `first` (to `last`) of a backward is wanted; see ops.autograd."""
    return any(wanted >> i & 1 for i in range(first, (first if last is None else last) + 1))
