"""A whole training step (forward, backward, clip 1.0, AdamW): gptfast against torch's models.

The course's model runs in float32 in the bfloat16 rows too, because that is how the course uses it.
Letters: B batch, T time, C n_embd, H heads, V vocab_size, L layers.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import peers
import torch
from command import main
from common import DTYPES, OURS, Case, Row, Run, assert_same_work, captured, compiled, other_work
from torch import Tensor, nn

from gptfast import GPT, GPTConfig, TrainConfig, Trainer
from gptfast.config import Precision
from gptfast.formats.course import own_name
from gptfast.presets import PRESETS
from gptfast.testing import GRADIENT_FACTOR, RESULT_FACTOR, Op, assert_budget, error
from gptfast.training.watching.machine import flops_per_token

# LR is tiny so that the model does not learn its batch: its gradients would become denormals, which
# some processors multiply slowly.
LR, CLIP = 1e-9, 1.0
COMPILED = "SDPA, torch.compile"
CAPTURED, REDUCED = "SDPA, captured", "SDPA, reduce-overhead"  # with CUDA graphs
COURSE, COURSE_FP32 = "course", "course fp32"  # COURSE_FP32 in rows of another dtype


@dataclass(frozen=True)
class Shape:
    """A model and the batch size of a step."""

    name: str
    model: GPTConfig
    batch: int
    course: bool = True  # whether the course's model can have this shape

    @property
    def flops(self) -> float:
        """The useful FLOPs of a step."""
        return self.batch * self.model.block_size * flops_per_token(self.model)


SMALL = GPTConfig(block_size=256, vocab_size=66, n_layer=6, n_head=6, n_embd=384)
GPT2 = GPTConfig(
    block_size=1024,
    vocab_size=50257,
    n_layer=12,
    n_head=12,
    n_embd=768,
    dropout=0.0,
    tie_weights=True,
    padding_idx=None,
    init="gpt2",
)
SHAPES = (
    Shape("abc", replace(PRESETS["abc"].model, vocab_size=5), 64),
    Shape("shakespeare", replace(PRESETS["shakespeare"].model, vocab_size=66), 64),
    Shape("small", SMALL, 16),
    Shape("gpt2", GPT2, 1, course=False),
    Shape("gpt2, dropout 0.2", replace(GPT2, dropout=0.2), 1, course=False),
)


def batch_of(shape: Shape) -> tuple[Tensor, Tensor]:
    """Returns random inputs and targets, (B, T) each."""
    generator = torch.Generator().manual_seed(3)
    size = (shape.batch, shape.model.block_size + 1)
    idx = torch.randint(1, shape.model.vocab_size, size, generator=generator, device="cpu")
    idx = idx.to(torch.get_default_device())
    return idx[:, :-1], idx[:, 1:]


def our_trainer(shape: Shape, dtype: str, graph: Literal["auto", "off"] = "auto") -> Trainer:
    """Makes gptfast's trainer."""
    precision: Precision = "bf16" if dtype == "bf16" else "fp32"
    train = TrainConfig(lr=LR, clip=CLIP, precision=precision, batch_size=shape.batch, graph=graph)
    model = GPT(shape.model, backend="fused")
    with torch.device("cpu"):  # no other default than a user has
        return Trainer(model, train)


def our_step(shape: Shape, dtype: str) -> Run:
    """Makes gptfast's contender: a step of its trainer."""
    trainer, (x, y) = our_trainer(shape, dtype), batch_of(shape)
    return lambda: trainer.step(x, y)


def torch_step(
    shape: Shape,
    dtype: str,
    make: Callable[[GPTConfig], nn.Module],
    loss_of: Op = peers.loss,
    in_graph: bool = False,
) -> Run:
    """Makes the contender that does the same step with a torch model, activations in `dtype`.

    Args:
        shape: The model and its batch.
        dtype: See `Row`.
        make: Makes the model.
        loss_of: Computes the loss from model, inputs and targets.
        in_graph: The step is one CUDA graph.
    """
    x, y = batch_of(shape)
    model = make(shape.model)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True, capturable=in_graph)

    def step() -> Tensor:
        # A graph must cast the weights anew each time, so autocast may not keep what it has cast.
        with autocast(x.device, dtype, cache_enabled=not in_graph):
            loss = loss_of(model, x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    if not in_graph:
        return step
    graph = captured(step)
    return lambda: graph()()


def autocast(device: torch.device, dtype: str, **options: bool) -> torch.autocast:
    """Lowers torch's activations to bfloat16 in rows of that dtype."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16", **options)


def makers(shape: Shape, dtype: str) -> dict[str, Callable[[], Run]]:
    """Returns a builder of each contender."""
    found: dict[str, Callable[[], Run]] = {
        OURS: lambda: our_step(shape, dtype),
        "SDPA": lambda: torch_step(shape, dtype, peers.SdpaGPT),
        COMPILED: lambda: torch_step(shape, dtype, peers.SdpaGPT, compiled(peers.loss)),
    }
    if torch.get_default_device().type == "cuda":
        found[CAPTURED] = lambda: torch_step(shape, dtype, peers.SdpaGPT, in_graph=True)
        found[REDUCED] = lambda: torch_step(
            shape, dtype, peers.SdpaGPT, compiled(peers.loss, "reduce-overhead")
        )
    if shape.course:
        found[course_name(dtype)] = lambda: torch_step(shape, "fp32", peers.CourseGPT)
    return found


def course_name(dtype: str) -> str:
    """Returns the name of the course's model in rows of this dtype."""
    return COURSE if dtype == "fp32" else COURSE_FP32


def loss_and_gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """Returns the loss, and the gradient of every parameter."""
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def course_results(model: nn.Module, x: Tensor, y: Tensor, names: list[str]) -> list[Tensor]:
    """Returns loss and gradients of the course's model, in the order of gptfast's names."""
    loss, *grads = loss_and_gradients(peers.loss(model, x, y), model)
    by_name = {
        own_name(name): grad
        for (name, _), grad in zip(model.named_parameters(), grads, strict=True)
    }
    return [loss, *(by_name[name] for name in names)]


def verify(shape: Shape, dtype: str) -> dict[str, str]:
    """Compares loss and gradients of the models, with equal weights; see `Case.verify`.

    The error budget is that of the SDPA model in the row's dtype (under autocast for bfloat16).
    torch draws other dropout masks, so dropout is off here; with dropout, `verify_dropout` compares
    gptfast with the reference, which draws the same masks.
    """
    sizes = replace(shape.model, dropout=0.0)
    torch.manual_seed(0)
    ours, sdpa, (x, y) = GPT(sizes, backend="fused"), peers.SdpaGPT(sizes), batch_of(shape)
    if shape.course:
        course = peers.CourseGPT(sizes)
        ours.load_state_dict({own_name(name): w for name, w in course.state_dict().items()})
    sdpa.load_state_dict(ours.state_dict())
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in sdpa.named_parameters()], "parameters in another order"
    with autocast(x.device, dtype):
        actual = loss_and_gradients(ours.loss(x, y), ours)
        own_losses = peers.token_losses(sdpa, x, y)
    own = loss_and_gradients(own_losses.mean(), sdpa)
    sdpa.double()
    losses = peers.token_losses(sdpa, x, y)
    oracle = loss_and_gradients(losses.mean(), sdpa)
    assert_same_work("SDPA", own, oracle, dtype)
    wrong = {}
    if shape.course:
        why = other_work(course_results(course, x, y, names), oracle, "fp32")
        wrong = {course_name(dtype): why} if why else {}
    # Errors of tokens can cancel in the mean by chance, so torch's error is the mean of theirs.
    own_error = (own_losses.detach().double() - losses.detach()).abs().mean().item()
    budget = RESULT_FACTOR * (own_error + torch.finfo(torch.float32).eps * oracle[0].item())
    assert error(actual[0], oracle[0]) <= budget, f"loss: error above {budget:.3g}"
    for name, a, t, o in zip(names, actual[1:], own[1:], oracle[1:], strict=True):
        assert_budget(f"gradient of {name}", a, t, o, GRADIENT_FACTOR)
    if shape.model.dropout > 0.0:
        verify_dropout(shape, dtype)
    return wrong


def verify_dropout(shape: Shape, dtype: str) -> None:
    """Compares loss and gradients with the reference in float64, with equal dropout masks."""
    torch.manual_seed(0)
    ours, reference, (x, y) = (
        GPT(shape.model, backend="fused"), GPT(shape.model, backend="reference"), batch_of(shape)
    )  # fmt: skip
    reference.load_state_dict(ours.state_dict())
    reference.double()
    found = []
    for model, kind in ((ours, dtype), (reference, "fp32")):
        torch.manual_seed(1)
        with autocast(x.device, kind):
            loss = model.loss(x, y)
        found.append(loss_and_gradients(loss, model))
    assert_same_work(OURS, found[0], found[1], dtype)


def step(shape: Shape, dtype: str) -> Case:
    """Makes the case of one model in one dtype."""
    contenders = {name: make() for name, make in makers(shape, dtype).items()}
    return Case(
        contenders,
        shape.flops,
        functools.partial(verify, shape, dtype),
        compiles=tuple(name for name in (COMPILED, REDUCED) if name in contenders),
        other_dtype=(COURSE_FP32,),
    )


def rows() -> Iterator[Row]:
    """Yields all rows of the script."""
    for shape in SHAPES:
        for dtype in DTYPES:
            build = functools.partial(step, shape, dtype)
            quick = shape.name == "abc"
            yield Row(shape.name, dtype, build, quick, makers(shape, dtype))


def run(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit code."""
    return main("train", __doc__ or "", rows(), argv, with_memory=True)


if __name__ == "__main__":
    sys.exit(run())
