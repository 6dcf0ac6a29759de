"""Clipping by the gradients' norm and the step of AdamW, over all parameters in two kernels.

    g *= min(1, clip / (|g| + 1e-6)),  m' = b1 m + (1 - b1) g,  v' = b2 v + (1 - b2) g^2
    w' = decay w - rate m' / (sqrt(v') inv_sqrt_correction + eps),
    decay = 1 - lr * weight decay, rate = lr / (1 - b1^t), inv_sqrt_correction = 1 / sqrt(1 - b2^t)
    average' = average + pull (w' - average),  pull = 1 - min(ema, (1 + t) / (10 + t))

The kernels find the parameters by a table of addresses in device memory, and read the options from
there too, so that a CUDA graph can replay them with other options. Parameters are in groups, each
with its weight decay. A program handles one chunk of one parameter. Nothing is added atomically:
each program of the second kernel adds up the norm's parts, in the same order.

Letters: P parameters.
"""

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.checks import dtype_name
from gptfast.ops.adamw import OPTIONS
from gptfast.ops.triton.launch import block_of, kernel

FIELDS = 8  # of a parameter in the table: six addresses, the number of elements, the group
BLOCK = 1024
MIN_CHUNK, MAX_CHUNKS = 2048, 4096  # elements; chunks, not counting the last of each parameter


@triton.jit
def _pointer(table, field: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(table + field).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(address, 16) if ALIGNED else address


@triton.jit
def _chunk(table, P, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's chunk: the parameter's number and entry, and the first element."""
    chunk = table + P * FIELDS + tl.program_id(0) * 2
    parameter = tl.load(chunk)
    return parameter, table + parameter * FIELDS, tl.multiple_of(tl.load(chunk + 1), BLOCK)


@kernel
@triton.jit(do_not_specialize=["P"])
def grad_norm_kernel(
    table, numbers, parts, rates, P, CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
    AVERAGED: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of squares of a chunk of gradients; a parameter's first chunk counts its step.

    rates (P, 3) receives the parameter's `rate`, `inv_sqrt_correction` and, AVERAGED, `pull`.
    """
    parameter, entry, start = _chunk(table, P, FIELDS, BLOCK)
    grad = _pointer(entry, 1, ALIGNED) + start
    count = tl.minimum(tl.load(entry + 6) - start, CHUNK).to(tl.int32)
    i = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    whole = count // BLOCK * BLOCK
    for j in tl.range(0, whole, BLOCK):
        g = tl.load(grad + j + i)
        squares += g * g
    g = tl.load(grad + whole + i, mask=whole + i < count, other=0.0)
    squares += g * g
    tl.store(parts + tl.program_id(0), tl.sum(squares, 0))
    if start == 0:
        step = _pointer(entry, 5, False)
        t = tl.load(step) + 1.0
        tl.store(step, t)
        lr, beta1, beta2 = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
        exponent = t.to(tl.float64)
        mean_correction = 1.0 - tl.exp2(exponent * tl.log2(beta1))
        square_correction = 1.0 - tl.exp2(exponent * tl.log2(beta2))
        own = rates + 3 * parameter
        tl.store(own, (lr / mean_correction).to(tl.float32))
        tl.store(own + 1, (1.0 / tl.sqrt(square_correction)).to(tl.float32))
        if AVERAGED:
            pull = tl.maximum(1.0 - tl.load(numbers + 5), 9.0 / (10.0 + exponent))
            tl.store(own + 2, pull.to(tl.float32))


@triton.jit
def _update(
    weight, grad, mean, square, average, i, mask, factor, beta1, beta2, eps, decay, rate,
    inv_sqrt_correction, pull, AVERAGED: tl.constexpr,
):  # fmt: skip
    g = tl.load(grad + i, mask=mask) * factor
    m, v = tl.load(mean + i, mask=mask), tl.load(square + i, mask=mask)
    w = tl.load(weight + i, mask=mask) * decay
    m = m + (g - m) * (1.0 - beta1)
    v = v * beta2 + g * g * (1.0 - beta2)
    w = w - tl.div_rn(rate * m, tl.sqrt_rn(v) * inv_sqrt_correction + eps)
    tl.store(mean + i, m, mask=mask)
    tl.store(square + i, v, mask=mask)
    tl.store(weight + i, w, mask=mask)
    if AVERAGED:
        a = tl.load(average + i, mask=mask)
        tl.store(average + i, a + (w - a) * pull, mask=mask)


@kernel
@triton.jit(do_not_specialize=["P", "parts_count"])
def adamw_kernel(
    table, numbers, parts, rates, norm, P, parts_count, CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr, AVERAGED: tl.constexpr, OPTIONS: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The update of a chunk of a parameter, of its moments and, AVERAGED, of its average."""
    parameter, entry, start = _chunk(table, P, FIELDS, BLOCK)
    i = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float64)
    for j in tl.range(0, parts_count, BLOCK):
        squares += tl.load(parts + j + i, mask=j + i < parts_count, other=0.0).to(tl.float64)
    size = tl.sqrt(tl.sum(squares, 0)).to(tl.float32)
    if tl.program_id(0) == 0:
        tl.store(norm, size)
    clip = tl.load(numbers + 4).to(tl.float32)
    factor = clip / (size + 1e-6)
    factor = tl.where(factor > 1.0, 1.0, factor)  # a NaN stays and shows in the weights
    factor = tl.where(clip == float("inf"), 1.0, factor)  # also if the norm overflows
    weight_decay = tl.load(numbers + OPTIONS + tl.load(entry + 7))
    decay = (1.0 - tl.load(numbers) * weight_decay).to(tl.float32)
    beta1, beta2 = tl.load(numbers + 1).to(tl.float32), tl.load(numbers + 2).to(tl.float32)
    eps = tl.load(numbers + 3).to(tl.float32)
    own = rates + 3 * parameter
    rate, inv_sqrt_correction = tl.load(own), tl.load(own + 1)
    pull = tl.load(own + 2) if AVERAGED else 0.0
    weight = _pointer(entry, 0, ALIGNED) + start
    grad = _pointer(entry, 1, ALIGNED) + start
    mean = _pointer(entry, 2, ALIGNED) + start
    square = _pointer(entry, 3, ALIGNED) + start
    average = _pointer(entry, 4, ALIGNED) + start
    count = tl.minimum(tl.load(entry + 6) - start, CHUNK).to(tl.int32)
    whole = count // BLOCK * BLOCK  # read without a mask, which would prevent vector loads
    for j in tl.range(0, whole, BLOCK):
        _update(
            weight, grad, mean, square, average, j + i, None, factor, beta1, beta2, eps, decay,
            rate, inv_sqrt_correction, pull, AVERAGED,
        )  # fmt: skip
    _update(
        weight, grad, mean, square, average, whole + i, whole + i < count, factor, beta1, beta2,
        eps, decay, rate, inv_sqrt_correction, pull, AVERAGED,
    )  # fmt: skip


@functools.lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...]) -> tuple[int, np.ndarray]:
    """Cuts parameters of these sizes into chunks.

    Returns:
        A chunk's elements, a power of 2 which the sizes fix; and (chunks, 2) int64, each chunk's
        parameter and first element. A parameter has at least one chunk.
    """
    chunk = block_of(-(-sum(sizes) // MAX_CHUNKS), MIN_CHUNK)
    counts = [max(1, -(-size // chunk)) for size in sizes]
    starts = np.concatenate([np.arange(count) * chunk for count in counts])
    return chunk, np.stack([np.repeat(np.arange(len(sizes)), counts), starts], 1)


class PointerTable:
    """The parameters of one step: their addresses, gradients, moments and averages.

    Args:
        weights: P contiguous float32 tensors, as are all the others.
        grads: Of the weights' sizes.
        means: Likewise, AdamW's `exp_avg`.
        squares: Likewise, `exp_avg_sq`.
        steps: P tensors of one element, the numbers of steps.
        averages: Of the weights' sizes, their running means; or none.
        groups: P numbers, each parameter's group.
        memory: The device memory for the table, from another table of as many parameters; None
            allocates it. A table that is made during the capture of a graph needs it, because
            memory that a capture allocates is shared with other tensors of the graph.
    """

    def __init__(
        self, weights: list[Tensor], grads: list[Tensor], means: list[Tensor],
        squares: list[Tensor], steps: list[Tensor], averages: list[Tensor], groups: list[int],
        memory: Tensor | None = None,
    ) -> None:  # fmt: skip
        if not weights:
            raise RuntimeError("adamw_: weights must be one tensor or more, got none")
        device = weights[0].get_device()
        columns = {"weights": weights, "grads": grads, "means": means, "squares": squares}
        if averages:
            columns["averages"] = averages
        counts = {name: len(x) for name, x in columns.items()}
        for name, count in {**counts, "steps": len(steps), "groups": len(groups)}.items():
            if count != len(weights):
                raise RuntimeError(
                    f"adamw_: {name} must be as many as weights, {len(weights)}, got {count}"
                )
        for name, tensors in columns.items():
            for i, (x, like) in enumerate(zip(tensors, weights, strict=True)):
                if not _fits(x, like.numel(), device):
                    raise RuntimeError(
                        f"adamw_: {name} must be contiguous float32 tensors of the weights' sizes, "
                        f"on one device, got {_described(x)} for weight {i}, {_described(like)}"
                    )
        for i, step in enumerate(steps):
            if not _fits(step, 1, device):
                raise RuntimeError(
                    "adamw_: steps must be float32 tensors of one element, on the weights' device, "
                    f"got {_described(step)} for weight {i}"
                )
        sizes = tuple(weight.numel() for weight in weights)
        self.chunk, chunks = _chunks(sizes)
        self.count, self.chunk_count = len(sizes), len(chunks)
        self.averaged = bool(averages)
        fields = weights, grads, means, squares, averages, steps
        each = [[x.data_ptr() for x in tensors] or [0] * self.count for tensors in fields]
        entries = np.array([*each, sizes, groups], dtype=np.int64).T  # (P, FIELDS)
        self.aligned = not (entries[:, :5] % 16).any()
        self.host = torch.from_numpy(np.concatenate([entries.ravel(), chunks.ravel()]))
        if memory is None:
            memory = torch.empty_like(self.host, device=weights[0].device)
        if memory.shape != self.host.shape:
            raise RuntimeError(
                "adamw_: memory must be that of a table of as many parameters, "
                f"{tuple(self.host.shape)} int64, got {_described(memory)}"
            )
        self.memory = memory
        self._grads = grads  # keeps their memory allocated until the update

    def upload(self) -> None:
        """Copies the table to the device."""
        pinned = self.host.pin_memory() if self.memory.is_cuda else self.host
        self.memory.copy_(pinned, non_blocking=True)

    def update(self, options: Tensor) -> Tensor:
        """Clips and updates by `options`, (OPTIONS + groups,) float64 on the device.

        First come the OPTIONS of all parameters, then each group's weight decay. Returns the norm
        before clipping, () float32. The table must be on the device by the time that the kernels
        run.
        """
        like = self._grads[0]
        norm, parts, rates = (
            like.new_empty(size) for size in ((), (self.chunk_count,), (self.count, 3))
        )
        constants = {
            "CHUNK": self.chunk, "ALIGNED": self.aligned, "AVERAGED": self.averaged,
            "FIELDS": FIELDS, "BLOCK": BLOCK,
        }  # fmt: skip
        grid = (self.chunk_count,)
        grad_norm_kernel[grid](self.memory, options, parts, rates, self.count, **constants)
        adamw_kernel[grid](
            self.memory, options, parts, rates, norm, self.count, self.chunk_count,
            OPTIONS=OPTIONS, **constants,
        )  # fmt: skip
        return norm


def _fits(x: Tensor, size: int, device: int) -> bool:
    """Whether a kernel that gets only x's address can read x as it expects."""
    alike = x.dtype == torch.float32 and x.numel() == size
    return alike and x.is_contiguous() and x.get_device() == device


def _described(x: Tensor) -> str:
    strided = "" if x.is_contiguous() else ", not contiguous"
    return f"{dtype_name(x.dtype)} {tuple(x.shape)} on {x.device}{strided}"


def adamw_(
    weights: list[Tensor], grads: list[Tensor], means: list[Tensor], squares: list[Tensor],
    steps: list[Tensor], averages: list[Tensor], weight_decay: list[float], lr: float, beta1: float,
    beta2: float, eps: float, clip: float, ema: float,
) -> Tensor:  # fmt: skip
    """gptfast::adamw_."""
    if len(weight_decay) != len(weights):
        raise RuntimeError(
            f"adamw_: weight_decay must be as many as weights, {len(weights)}, "
            f"got {len(weight_decay)}"
        )
    table = PointerTable(weights, grads, means, squares, steps, averages, [*range(len(weights))])
    table.upload()
    options = [lr, beta1, beta2, eps, clip, ema, *weight_decay]
    numbers = torch.tensor(options, dtype=torch.float64)
    device = weights[0].device
    if device.type == "cuda":
        numbers = numbers.pin_memory().to(device, non_blocking=True)
    return table.update(numbers)
