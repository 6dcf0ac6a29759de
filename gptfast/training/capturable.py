"""Whether a trainer's step can be a CUDA graph, and whether a graph still matches the step.

Python runs while a graph is captured, and not when it is replayed. So the rule is: a graph is made
for an unmodified GPT of plain layers without hooks, whose Python is known, and for AdamW by the
kernels. `obstacle` names what breaks this rule. A user's subclass, adapter or layer, or a wrapper
of torch.compile or DistributedDataParallel, trains without a graph.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils import _python_dispatch

from gptfast import plain
from gptfast.model import GPT
from gptfast.modules import Block
from gptfast.ops import select

if TYPE_CHECKING:
    from gptfast.training.trainer import Trainer

# Entries of a module's dictionary that its forward pass reads, besides parameters and modules.
OPTIONS = "eps", "gelu", "n_head", "padding_idx"
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def unsupported(device: str) -> str | None:
    """Returns why no step on this type of device can be a graph; None if it can."""
    if device != "cuda":
        return "CUDA graphs need a GPU"
    reasons = select.unavailable(device, torch.float32)
    return f"the kernels cannot run: {'; '.join(reasons)}" if reasons else None


def obstacle(trainer: "Trainer") -> str | None:
    """Returns why the step of a trainer on a GPU cannot be a graph as it is; None if it can."""
    gpt, config = trainer.gpt, trainer.config
    if config.graph == "off":
        return "graph is 'off'"
    if trainer.model is not gpt:
        return f"the model is inside a {type(trainer.model).__name__}"
    dtype = torch.bfloat16 if config.precision == "bf16" else gpt.main_weight.dtype
    by_torch = select.unavailable(trainer.device.type, dtype, gpt.config.head_dim)
    if gpt.backend == "reference" or by_torch:
        return "the model computes in plain torch"
    if not trainer.optimizer.by_kernel:
        return "the optimizer's kernels do not have its options"
    found = plain.first_replaced(plain.layers_of(gpt, _model, _block))
    if found is not None:
        return found
    for name, param in zip(trainer.names, trainer.parameters, strict=True):
        if param._backward_hooks or param._post_accumulate_grad_hooks:
            return f"{name} has hooks"
    return None


def observer() -> str | None:
    """Returns what observes Python's calls at the moment; a replay would hide them from it."""
    if torch_modules._has_any_global_hook():
        return "there are hooks on all modules"
    if _python_dispatch._get_current_dispatch_mode() is not None:
        return "a dispatch mode observes the operators"
    return "anomalies are looked for" if torch.is_anomaly_enabled() else None


def _model(module: nn.Module) -> str | None:
    found = plain.unmodified(module, GPT)
    return found or ("has a loss of its own" if "loss" in module.__dict__ else None)


def _moments_of(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> dict[str, Tensor] | None:
    """Returns what the optimizer keeps of a parameter; None before its first step."""
    return optimizer.state.get(param) or None


def _block(module: nn.Module) -> str | None:
    return plain.unmodified(module, Block)


class Watch:
    """The parts of a trainer that its graphs depend on, for a step that has no `obstacle`.

    Every step checks them, so they are in flat lists for speed.
    """

    def __init__(self, trainer: "Trainer") -> None:
        gpt, optimizer = trainer.gpt, trainer.optimizer
        dicts = [vars(module) for _, module, _ in plain.layers_of(gpt, _model, _block)] + [
            vars(gpt.h)
        ]
        self._dicts = dicts
        self._hooks = [own[name] for own in dicts for name in HOOKS]
        # The dictionaries themselves, because Python may reuse the id of a freed one.
        self._state = optimizer.state
        self._moments = [(param, _moments_of(optimizer, param)) for param in trainer.parameters]
        entries = [own[name] for own in dicts for name in ("_parameters", "_modules")]
        entries += [each for _, each in self._moments if each is not None]
        self._entries = [(each, name, value) for each in entries for name, value in each.items()]
        self._entries += [
            (own, name, own[name]) for own in dicts for name in OPTIONS if name in own
        ]
        self._params = list(gpt.parameters())
        self._facts = self._facts_of(trainer)
        self._addresses = [param.data_ptr() for param in self._params]

    def holds(self, trainer: "Trainer") -> bool:
        """Whether nothing that a graph depends on has changed, and there is still no `obstacle`."""
        if any(self._hooks) or self._facts_of(trainer) != self._facts:
            return False
        for each, name, value in self._entries:
            if each.get(name) is not value:
                return False
        if trainer.optimizer.state is not self._state:
            return False
        for param, moments in self._moments:
            if _moments_of(trainer.optimizer, param) is not moments:
                return False
        for own in self._dicts:
            if "forward" in own or "loss" in own:
                return False
        for param, address in zip(self._params, self._addresses, strict=True):
            if param.data_ptr() != address:
                return False
            if param._backward_hooks or param._post_accumulate_grad_hooks:
                return False
        return True

    def _facts_of(self, trainer: "Trainer") -> tuple[Any, ...]:
        gpt, config, optimizer = trainer.gpt, trainer.config, trainer.optimizer
        return (
            (gpt.config, gpt.backend, gpt.recompute, gpt.__class__, id(trainer.model), config),
            torch.backends.cuda.matmul.fp32_precision,
            (optimizer.by_kernel, optimizer.ema),
            [param.requires_grad for param in self._params],
        )
