"""The operators in autograd, torch.func and torch.utils.flop_counter against the reference."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

from gptfast import GPT, BackendError, GPTConfig, ops
from gptfast.ops import reference, select

if select.extension() is None:
    pytest.skip(f"{select.extension_error}", allow_module_level=True)

GENERATOR = torch.Generator().manual_seed(0)


def R(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


IDX = torch.randint(5, (2, 6), generator=GENERATOR)
WEIGHTS = torch.arange(12.0).view(2, 6)
Call = Callable[..., Tensor]


def loss_case(**options: Any) -> tuple[Call, list[Tensor]]:
    def call(o: ModuleType, x: Tensor, weight: Tensor, ln_w: Tensor, ln_b: Tensor) -> Tensor:
        return o.linear_cross_entropy(x, weight, IDX, ln_w=ln_w, ln_b=ln_b, **options)

    return call, [R(2, 6, 8), R(5, 8), R(8), R(8)]


CASES: dict[str, tuple[Call, list[Tensor]]] = {
    "causal_attention": (
        lambda o, q, k, v: o.causal_attention(q, k, v, dropout_p=0.3, seed=3),
        [R(1, 2, 6, 4), R(1, 2, 6, 4), R(1, 2, 6, 4)],
    ),
    "layer_norm_linear": (
        lambda o, *inputs: o.layer_norm_linear(*inputs), [R(2, 6, 8), R(8), R(8), R(5, 8), R(5)],
    ),
    "linear_residual": (
        lambda o, *inputs: o.linear_residual(*inputs),
        [R(2, 6, 8), R(5, 8), R(5), R(2, 6, 5)],
    ),
    "layer_norm_attention": (
        lambda o, *inputs: o.layer_norm_attention(*inputs, n_head=2),
        [R(2, 6, 8), R(8), R(8), R(24, 8), R(24), R(8, 8), R(8)],
    ),
    "layer_norm_ffn": (
        lambda o, *inputs: o.layer_norm_ffn(*inputs, dropout_p=0.3, seed=3),
        [R(2, 6, 8), R(8), R(8), R(12, 8), R(12), R(8, 12), R(8)],
    ),
    "linear_cross_entropy mean": loss_case(),
    "linear_cross_entropy sum": loss_case(
        reduction="sum", token_weights=WEIGHTS, label_smoothing=0.1
    ),
    "linear_cross_entropy none": loss_case(
        reduction="none", token_weights=WEIGHTS, label_smoothing=0.1
    ),
    "embedding": (lambda o, *tables: o.embedding(IDX, *tables), [R(5, 8), R(7, 8)]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    """Makes warnings errors: torch warns if an operator lacks a rule for a transform."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def transforms(call: Call, inputs: list[Tensor], n: int) -> dict[str, Callable[[ModuleType], Any]]:
    """Transforms of an operator by torch.func, with respect to its input n."""
    before, own, after = inputs[:n], inputs[n], inputs[n + 1 :]

    def result(o: ModuleType, x: Tensor) -> Tensor:
        return call(o, *before, x, *after)

    def total(o: ModuleType, x: Tensor) -> Tensor:
        return result(o, x).square().sum()

    two, columns = torch.stack([own, own / 2]), torch.stack([own, own / 2], -1)
    return {
        "grad": lambda o: grad(lambda x: total(o, x))(own),
        "vjp": lambda o: vjp(lambda x: result(o, x), own)[1](torch.ones_like(result(o, own))),
        "jacrev": lambda o: jacrev(lambda x: result(o, x))(own),
        "vmap": lambda o: vmap(lambda x: result(o, x))(two),
        "vmap over the last": lambda o: vmap(lambda x: result(o, x), in_dims=-1)(columns),
        "vmap of grad": lambda o: vmap(grad(lambda x: total(o, x)))(two),
        "grad of vmap": lambda o: grad(lambda x: vmap(lambda y: total(o, y))(x).sum())(two),
    }


@pytest.mark.parametrize("name", CASES)
def test_transforms_of_torch_func(name: str) -> None:
    call, inputs = CASES[name]
    for n in range(len(inputs)):
        for transform, of in transforms(call, inputs, n).items():
            expected = of(reference)
            torch.testing.assert_close(
                of(ops), expected, rtol=1e-3, atol=1e-3, msg=lambda m, t=transform: f"{t}: {m}"
            )


def test_vmap_over_no_slice_at_all() -> None:
    call, inputs = CASES["layer_norm_linear"]
    out = vmap(lambda x: call(ops, x, *inputs[1:]))(inputs[0].new_empty(0, 2, 6, 8))
    assert out.shape == (0, 2, 6, 5)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_and_forward_mode_name_the_reference(name: str) -> None:
    call, inputs = CASES[name]
    op = name.split()[0]
    # The residual's gradient is the incoming gradient, which can be differentiated.
    for n in range(3 if op == "linear_residual" else len(inputs)):

        def total(x: Tensor, n: int = n) -> Tensor:
            return call(ops, *inputs[:n], x, *inputs[n + 1 :]).square().sum()

        own = inputs[n]

        def dual(x: Tensor, own: Tensor = own) -> Tensor:
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(total(forward_ad.make_dual(x, own))).tangent

        for refused in (
            lambda x: jvp(total, (x,), (x,)),
            jacfwd(total),
            grad(lambda x: grad(total)(x).square().sum()),
            hessian(total),
            dual,
        ):
            with pytest.raises(BackendError, match=rf"{op}: .* gptfast.ops.reference.{op} "):
                refused(own)


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_of_gradients_is_refused_by_autograd(name: str) -> None:
    call, inputs = CASES[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    # The incoming gradient of a sum is constant; only the leaves require a gradient.
    grads = torch.autograd.grad(call(ops, *leaves).sum(), leaves, create_graph=True)
    for found in grads[:3] if name == "linear_residual" else grads:
        with pytest.raises(BackendError, match=f"{name.split()[0]}: .*second derivatives"):
            torch.autograd.grad(found.square().sum(), leaves, retain_graph=True)


def small_model(backend: Any, dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=6, vocab_size=5, n_embd=8, dropout=dropout), backend)


def test_transforms_of_a_model() -> None:
    found = []
    for backend in ("fused", "reference"):
        model = small_model(backend)
        params = {name: p.detach() for name, p in model.named_parameters()}

        def loss(
            params: dict[str, Tensor], idx: Tensor, targets: Tensor, model: GPT = model
        ) -> Tensor:
            logits = functional_call(model, params, idx[None])[0]
            return torch.nn.functional.cross_entropy(logits, targets)

        per_text = vmap(grad(loss), in_dims=(None, 0, 0))(params, IDX, IDX)
        found.append((per_text, jacrev(loss)(params, IDX[0], IDX[1])))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_a_penalty_on_gradients_is_refused_by_the_kernels_and_right_in_the_reference() -> None:
    def penalty(model: GPT) -> Tensor:
        params = list(model.parameters())
        grads = torch.autograd.grad(model.loss(IDX, IDX), params, create_graph=True)
        return sum((g.square().sum() for g in grads), torch.zeros(()))

    with pytest.raises(BackendError, match="backend='reference'"):
        penalty(small_model("fused")).backward()
    model = small_model("reference").double()
    penalty(model).backward()
    weight, eps = model.h[0].mlp.c_fc.weight, 1e-5
    own = weight.grad[3, 2].item()
    with torch.no_grad():
        weight[3, 2] += eps
    higher = penalty(model).item()
    with torch.no_grad():
        weight[3, 2] -= 2 * eps
    assert own == pytest.approx((higher - penalty(model).item()) / (2 * eps), rel=1e-4)


@pytest.mark.parametrize("option", ("scale", "dropout_p"))
def test_numbers_with_a_gradient_are_refused(option: str) -> None:
    q, value = R(1, 1, 4, 8), torch.tensor(0.5)
    plain = ops.causal_attention(q, q, q, seed=1, **{option: 0.5})
    assert torch.equal(ops.causal_attention(q, q, q, seed=1, **{option: value}), plain)
    message = f"causal_attention: {option} must be a number, got a tensor that may need a gradient"
    for call in (
        lambda: ops.causal_attention(q, q, q, seed=1, **{option: value.requires_grad_()}),
        lambda: jvp(
            lambda x: ops.causal_attention(q, q, q, seed=1, **{option: x}), (value.detach(),),
            (value.detach(),),
        ),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=message):
            call()


def test_a_changed_gradient_does_not_change_the_next_one() -> None:
    for name, (call, inputs) in CASES.items():
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = call(ops, *leaves)
        total = out if out.dim() == 0 else out.square().sum()
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        kept = [each.clone() for each in first]
        for each in first:
            each.mul_(3.0).add_(1.0)
        again = torch.autograd.grad(total, leaves)
        assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True)), name


def count(backend: Any, frozen: tuple[str, ...]) -> int:
    model = small_model(backend)
    for name, param in model.named_parameters():
        param.requires_grad_(not any(part in name for part in frozen))
    with FlopCounterMode(display=False) as counter:
        model.loss(IDX, IDX).backward()
    return counter.get_total_flops()


def test_formulas_are_there_whoever_asked_for_the_counter_before() -> None:
    script = """
import importlib.util
import torch, gptfast
importlib.util.find_spec("torch.utils.flop_counter")
from torch.utils.flop_counter import FlopCounterMode
model = gptfast.GPT(gptfast.GPTConfig(block_size=6, vocab_size=5, n_embd=8))
with FlopCounterMode(display=False) as counter:
    model(torch.ones(1, 6, dtype=torch.int64))
print(counter.get_total_flops())
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert int(process.stdout) > 0, process.stderr


@pytest.mark.parametrize(
    "frozen",
    ((), ("lm_head",), ("c_attn", "c_fc"), ("c_proj",), ("wte", "wpe"), ("h.0", "wte", "wpe"),
     ("h.", "wte", "wpe", "ln_f")),
)  # fmt: skip
def test_operations_are_counted_as_those_of_the_reference(frozen: tuple[str, ...]) -> None:
    """Also with frozen weights, whose gradients the kernels do not compute."""
    whole, counted = count("fused", ()), count("fused", frozen)
    assert counted == count("reference", frozen)
    assert counted < whole or frozen in ((), ("wte", "wpe"))
