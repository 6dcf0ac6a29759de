"""Small benchmarks of the kernels against torch; `make bench` times what the tests only verify.

Each group times the same work by torch and by gptfast, after comparing their results.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from course import CourseGPT
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional as F

from gptfast import GPT, TrainConfig, Trainer, generate, ops
from gptfast.config import abc, shakespeare
from gptfast.ops import select

if select.extension() is None:
    pytest.skip(f"{select.extension_error}", allow_module_level=True)

Work = Callable[[], Tensor]


def forward_backward(work: Work, leaves: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    out = work()
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b.double()).abs().max() <= tolerance * max(b.abs().max().item(), 1.0)


@pytest.mark.parametrize("who", ("torch", "gptfast"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("shape", ((64, 2, 64, 64), (16, 6, 256, 64)), ids=("T64", "T256"))
def test_attention(
    benchmark: BenchmarkFixture, shape: tuple[int, ...], dtype: torch.dtype, who: str
) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    grad = torch.randn(shape).to(dtype)

    def ours() -> list[Tensor]:
        return forward_backward(lambda: ops.causal_attention(*leaves), leaves, grad)

    def theirs() -> list[Tensor]:
        sdpa = F.scaled_dot_product_attention
        return forward_backward(lambda: sdpa(*leaves, is_causal=True), leaves, grad)

    assert_same(ours(), theirs(), dtype)
    benchmark.group = f"attention forward and backward, {shape}, {dtype}"
    benchmark(ours if who == "gptfast" else theirs)


@pytest.mark.parametrize("who", ("torch", "gptfast"))
def test_multihead_attention(benchmark: BenchmarkFixture, who: str) -> None:
    """The whole sub-block x + attention(LN(x)), projections included."""
    torch.manual_seed(0)
    norm, module = nn.LayerNorm(128), nn.MultiheadAttention(128, 2, batch_first=True)
    x, grad = torch.randn(64, 64, 128, requires_grad=True), torch.randn(64, 64, 128)
    mask = torch.ones(64, 64, dtype=torch.bool).triu(1)
    leaves = [x, *norm.parameters(), *module.parameters()]

    def their_block() -> Tensor:
        y = norm(x)
        return x + module(y, y, y, attn_mask=mask, need_weights=False)[0]

    def our_block() -> Tensor:
        projection = module.in_proj_weight, module.in_proj_bias
        y = ops.causal_attention_packed(
            ops.layer_norm_linear(x, norm.weight, norm.bias, *projection), 2
        )
        return ops.linear_residual(y, module.out_proj.weight, module.out_proj.bias, x)

    def theirs() -> list[Tensor]:
        return forward_backward(their_block, leaves, grad)

    def ours() -> list[Tensor]:
        return forward_backward(our_block, leaves, grad)

    assert_same(ours(), theirs(), torch.float32)
    benchmark.group = "x + nn.MultiheadAttention(LN(x)) forward and backward, (64, 64, 128), fp32"
    benchmark(ours if who == "gptfast" else theirs)


@pytest.mark.parametrize("who", ("course", "reference", "gptfast", "gptfast bf16"))
@pytest.mark.parametrize("make", (abc, shakespeare))
def test_training_step(benchmark: BenchmarkFixture, make: Callable, who: str) -> None:
    torch.manual_seed(0)
    config = make()
    idx = torch.randint(1, config.vocab_size, (64, config.block_size + 1))
    x, y = idx[:, :-1], idx[:, 1:]
    course = CourseGPT(config)
    model = GPT.from_course_state_dict(course.state_dict(), config.n_head)
    with torch.no_grad():
        ours = model.eval().loss(x, y)
        theirs = F.cross_entropy(course.eval()(x).flatten(0, 1), y.flatten())
    assert torch.allclose(ours, theirs, atol=1e-4)
    model.train(), course.train()
    benchmark.group = (
        f"training step, block {config.block_size}, batch 64, dropout {config.dropout}"
    )
    if who == "course":
        optimizer = torch.optim.AdamW(course.parameters(), lr=1e-3, fused=True)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(course(x).flatten(0, 1), y.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(course.parameters(), 1.0)
            optimizer.step()
            return loss

        benchmark(step)
        return
    model.backend = "reference" if who == "reference" else "fused"
    precision = "bf16" if who.endswith("bf16") else "fp32"
    trainer = Trainer(model, TrainConfig(lr=1e-3, clip=1.0, precision=precision, batch_size=64))
    benchmark(lambda: trainer.step(x, y))


@pytest.mark.parametrize("who", ("uncached reference", "gptfast"))
@pytest.mark.parametrize("prompts", (1, 16))
def test_generation(benchmark: BenchmarkFixture, prompts: int, who: str) -> None:
    torch.manual_seed(0)
    model = GPT(shakespeare())

    def run() -> list[list[int]]:
        results = generate(model, [[1]] * prompts, max_new_tokens=63, temperature=0.0)
        return [result.tokens for result in results]

    expected = run()
    model.backend = "reference" if who == "uncached reference" else "fused"
    assert run() == expected
    benchmark.group = f"63 greedy tokens for {prompts} prompts, block 64, C 128, L 2"
    benchmark(run)
