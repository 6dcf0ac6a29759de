"""Which modules are the plain layers that the kernels stand in for; any other is called instead.

A check gives None for a plain layer, else what it is, in words that follow its name. Every forward
pass asks for every layer, so what is plain is known in half a microsecond: a check reads instance
dictionaries, which nn.Module's own attribute access takes three times as long for. torch.compile
traces it too, and writes no number into a text.

Hooks for all modules (torch.nn.modules.module.register_module_forward_hook) see those that are
called and change nothing here: profilers and FLOP counters set them, to watch the kernels too.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import Embedding, LayerNorm, Linear, Parameter

from gptfast.ops.reference import LAYER_NORM_EPS

Check = Callable[[nn.Module], str | None]
Layer = tuple[str, nn.Module, Check]


def linear(module: nn.Module) -> str | None:
    """Why a module is no plain nn.Linear; None where it is one."""
    return untouched(module, Linear) or _weight(module)


def head(module: nn.Module) -> str | None:
    """Why a module is no plain nn.Linear without a bias; None where it is one."""
    return linear(module) or (None if module.bias is None else "has a bias")


def norm(module: nn.Module) -> str | None:
    """Why a module is no plain nn.LayerNorm over the last dimension; None where it is one."""
    found = untouched(module, LayerNorm)
    if found is not None:
        return found
    own = module.__dict__
    if own["eps"] != LAYER_NORM_EPS:
        return f"has another eps than {LAYER_NORM_EPS}"
    if len(own["normalized_shape"]) != 1:
        return "normalises over more than the last dimension"
    return _weight(module)


def embedding(module: nn.Module) -> str | None:
    """Why a module is no plain nn.Embedding; None where it is one."""
    found = untouched(module, Embedding)
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
    """Why a module is no plain nn.Embedding that trains every row; None where it is one."""
    found = embedding(module)
    if found is not None or module.__dict__["padding_idx"] is None:
        return found
    return "has a padding_idx"


def untouched(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why calling a module does not call `kind.forward` alone; None where it does."""
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
    """What a subclass of `kind` has in place of a member of it; None where that is nothing."""
    for own in type(module).__mro__[: type(module).__mro__.index(kind)]:
        for name in vars(own):
            if name in vars(kind) and not name.startswith("__"):
                return f"its class {own.__name__} has a {name} of its own"
    return None


def called(module: nn.Module) -> str | None:
    """Why it matters that a module is called, where no gradient is wanted; None where it does not.

    For those whose forward pass is known, as that of GPT and Block.
    """
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return "has forward hooks"
    return "has a forward of its own" if "forward" in own else None


def params(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a plain layer."""
    own = module.__dict__["_parameters"]
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    layer: Any = module
    return layer.weight, layer.bias


def first_oddity(layers: Iterable[Layer]) -> str | None:
    """The first of these layers that is not plain, its name and what it is; None where all are."""
    for name, module, check in layers:
        found = check(module)
        if found is not None:
            return f"{name} {found}"
    return None


def _weight(module: nn.Module) -> str | None:
    if type(module.__dict__["_parameters"].get("weight")) is Parameter:
        return None
    weight = module.weight
    # FSDP and functional_call put a Tensor in a parameter's place; the other two only trace.
    if type(weight) is Tensor or isinstance(weight, FakeTensor | FunctionalTensor):
        return None
    return "has no weight" if weight is None else f"has a weight that is a {type(weight).__name__}"
