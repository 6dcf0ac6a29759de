"""Checks whether a module is a plain torch layer, which the fused kernels can replace.

A check returns None for a plain layer. Otherwise it returns the difference as the end of a sentence
that begins with the layer's name, and the module itself is called. Every forward pass checks every
layer, so a check must take about half a microsecond: it reads the instance's dictionary, because
nn.Module's attribute access takes three times as long. torch.compile traces the checks too and
cannot format numbers, so no message contains a module's numbers.

Global hooks (torch.nn.modules.module.register_module_forward_hook) do not make a layer count as
modified: profilers and FLOP counters set them, also to observe the kernels.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import Embedding, LayerNorm, Linear, Parameter

from gptfast.ops.reference import LAYER_NORM_EPS

if TYPE_CHECKING:
    from gptfast.model import GPT

Check = Callable[[nn.Module], str | None]
Layer = tuple[str, nn.Module, Check]


def linear(module: nn.Module) -> str | None:
    """Returns why a module is not a plain nn.Linear, or None if it is."""
    return unmodified(module, Linear) or _weight(module)


def head(module: nn.Module) -> str | None:
    """Returns why a module is not a plain nn.Linear without bias, or None if it is."""
    return linear(module) or (None if module.bias is None else "has a bias")


def norm(module: nn.Module) -> str | None:
    """Returns why a module is not a plain nn.LayerNorm of the last dimension, or None if it is."""
    found = unmodified(module, LayerNorm)
    if found is not None:
        return found
    own = module.__dict__
    if own["eps"] != LAYER_NORM_EPS:
        return f"has another eps than {LAYER_NORM_EPS}"
    if len(own["normalized_shape"]) != 1:
        return "normalises over more than the last dimension"
    return _weight(module)


def embedding(module: nn.Module) -> str | None:
    """Returns why a module is not a plain nn.Embedding, or None if it is."""
    found = unmodified(module, Embedding)
    if found is not None:
        return found
    own = module.__dict__
    if own["max_norm"] is not None:
        return "has a max_norm"
    for option in ("scale_grad_by_freq", "sparse"):
        if own[option]:
            return f"has {option}=True"
    return _weight(module)


def positions(module: nn.Module) -> str | None:
    """Returns why a module is not a plain nn.Embedding without padding_idx, or None if it is."""
    found = embedding(module)
    if found is not None or module.__dict__["padding_idx"] is None:
        return found
    return "has a padding_idx"


def unmodified(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Returns why calling a module differs from `kind.forward`, or None if it does not."""
    own = module.__dict__
    if type(module) is not kind:
        return f"is a {type(module).__module__}.{type(module).__qualname__}"
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return "has hooks"
    return "has a forward of its own" if "forward" in own else None


def overridden(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Returns which member of `kind` the module's class overrides, or None if it overrides none.

    Members that only display a module do not count.
    """
    for own in type(module).__mro__[: type(module).__mro__.index(kind)]:
        for name in vars(own):
            if name in vars(kind) and not name.startswith(("__", "_repr_")):
                return f"its class {own.__name__} has a {name} of its own"
    return None


def bypassable(module: nn.Module) -> str | None:
    """Returns why a module must be called in inference, or None if its parts can be used directly.

    For modules whose forward pass is known, such as GPT and Block.
    """
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return "has forward hooks"
    return "has a forward of its own" if "forward" in own else None


def parameter(module: nn.Module, name: str) -> Any:
    """Returns a plain layer's weight or bias; None where it has none."""
    own = module.__dict__["_parameters"]
    return own[name] if name in own else getattr(module, name, None)


def params(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Returns weight and bias of a plain layer."""
    return parameter(module, "weight"), parameter(module, "bias")


def layers_of(model: "GPT", of_model: Check, of_block: Check) -> Iterator[Layer]:
    """Yields the model, its blocks and all their layers, each with its check."""
    yield "the model", model, of_model
    yield from model.embedding_layers()
    for i, block in enumerate(model.blocks):
        yield f"h.{i}", block, of_block
        for name, module, check in block.layers():
            yield f"h.{i}.{name}", module, check
    yield from model.head_layers()


def first_replaced(layers: Iterable[Layer]) -> str | None:
    """Returns the name of the first layer that is not plain and why, or None if all are plain."""
    for name, module, check in layers:
        found = check(module)
        if found is not None:
            return f"{name} {found}"
    return None


def _weight(module: nn.Module) -> str | None:
    weight = parameter(module, "weight")
    if type(weight) is Parameter:
        return None
    # FSDP and functional_call replace the Parameter by a Tensor; the other two occur in tracing.
    if type(weight) is Tensor or isinstance(weight, FakeTensor | FunctionalTensor):
        return None
    return "has no weight" if weight is None else f"has a weight that is a {type(weight).__name__}"
