"""Training steps by Trainer.step, against torch's model: eager, captured, and compiled."""

import functools
from collections.abc import Iterator
from dataclasses import replace

import bench_train
import torch
from bench_train import GPT2, SHAPES, Shape
from common import Case, Row

from gpu.measure import DEVICE

TIMING = "calls"
VERIFIED_BATCH = 2  # of GPT-2, whose logits and scores in float64 are large
BATCHES = (
    *(shape for shape in SHAPES if shape.model.block_size < GPT2.block_size),
    *(replace(shape, batch=16) for shape in SHAPES if shape.model.block_size == GPT2.block_size),
)


def case(shape: Shape, dtype: str) -> Case:
    """Makes the case of one model."""
    found = bench_train.step(shape, dtype)
    if shape.model.block_size == GPT2.block_size:
        found.verify = functools.partial(
            bench_train.verify, replace(shape, batch=VERIFIED_BATCH), dtype
        )
    tokens = shape.batch * shape.model.block_size
    found.details = lambda seconds: {"tokens/s": tokens / seconds}
    return found


def rows(full: bool) -> Iterator[Row]:
    """Yields the rows."""
    for shape in BATCHES:
        for dtype in ("bf16", "fp32") if full else ("bf16",):
            name = f"{shape.name}, {shape.batch}x{shape.model.block_size}"
            with torch.device(DEVICE):  # decides which contenders there are
                alone = bench_train.makers(shape, dtype)
            yield Row(name, dtype, functools.partial(case, shape, dtype), alone=alone)
