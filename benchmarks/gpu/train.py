"""Training steps by Trainer.step, against torch's model: captured, eager, and compiled."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import bench_train
import torch
from bench_train import COMPILED, COURSE_FP32, GPT2, REDUCED, Shape
from common import Case, Row

from gpu.measure import DEVICE, WARM_CALLS

TIMING = "calls"
VERIFIED_BATCH = 2  # of GPT-2, whose logits and scores in float64 are large


def is_large(shape: Shape) -> bool:
    """Whether the model is GPT-2."""
    return shape.model.block_size == GPT2.block_size


SHAPES = tuple(
    replace(shape, batch=16) if is_large(shape) else shape for shape in bench_train.SHAPES
)


def verify_graph(shape: Shape, dtype: str) -> None:
    """Asserts that steps by a CUDA graph, which are timed, have the bits of steps without one."""
    trainers = []
    graphs: tuple[Literal["auto", "off"], ...] = "auto", "off"
    for graph in graphs:
        torch.manual_seed(0)
        trainers.append(bench_train.our_trainer(shape, dtype, graph))
    by_graph, plainly = trainers
    x, y = bench_train.batch_of(shape)
    with torch.device("cpu"):  # no other default than a user has
        for _ in range(WARM_CALLS):
            assert torch.equal(by_graph.step(x, y), plainly.step(x, y)), "losses by a graph differ"
    obstacle = by_graph.graphs.obstacle(by_graph)
    assert obstacle is None, f"steps run without a CUDA graph: {obstacle}"
    for name, a, b in zip(by_graph.names, by_graph.parameters, plainly.parameters, strict=True):
        assert torch.equal(a, b), f"steps by a graph give {name} other bits"


def verify(shape: Shape, dtype: str) -> dict[str, str]:
    """Compares the models, see bench_train.py, and gptfast's steps with and without a graph."""
    wrong = bench_train.verify(shape, dtype)
    verify_graph(shape, dtype)
    return wrong


def case(shape: Shape, dtype: str) -> Case:
    """Makes the case of one model; its contenders are made alone, see `rows`."""
    verified = replace(shape, batch=VERIFIED_BATCH) if is_large(shape) else shape
    tokens = shape.batch * shape.model.block_size
    return Case(
        {},
        shape.flops,
        functools.partial(verify, verified, dtype),
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
