"""Training steps by Trainer.step, against torch's model: captured, eager, and compiled."""

import functools
from collections.abc import Iterator
from dataclasses import replace

import bench_train
import torch
from bench_train import COMPILED, COURSE_FP32, GPT2, REDUCED, Shape
from common import Case, Row

from gpu.measure import DEVICE

TIMING = "calls"
VERIFIED_BATCH = 2  # of GPT-2, whose logits and scores in float64 are large


def is_large(shape: Shape) -> bool:
    """Whether the model is GPT-2."""
    return shape.model.block_size == GPT2.block_size


SHAPES = tuple(
    replace(shape, batch=16) if is_large(shape) else shape for shape in bench_train.SHAPES
)


def case(shape: Shape, dtype: str) -> Case:
    """Makes the case of one model; its contenders are made alone, see `rows`."""
    verified = replace(shape, batch=VERIFIED_BATCH) if is_large(shape) else shape
    tokens = shape.batch * shape.model.block_size
    return Case(
        {},
        shape.flops,
        functools.partial(bench_train.verify, verified, dtype),
        other_dtype=(COURSE_FP32,),
        details=lambda seconds: {"tokens/s": tokens / seconds},
    )


def rows(full: bool) -> Iterator[Row]:
    """Yields the rows."""
    for shape in SHAPES:
        slow = (COMPILED, REDUCED, "SDPA") if is_large(shape) else (COMPILED, REDUCED)
        for dtype in ("bf16", "fp32") if full else ("bf16",):
            name = f"{shape.name}, {shape.batch}x{shape.model.block_size}"
            with torch.device(DEVICE):  # decides which contenders there are
                makers = bench_train.makers(shape, dtype)
            own = {each: make for each, make in makers.items() if full or each not in slow}
            yield Row(name, dtype, functools.partial(case, shape, dtype), alone=own)
