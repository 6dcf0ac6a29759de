"""AdamW with gradient clipping and running means of the weights, by torch or by the kernels.

The kernels read memory in two passes.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from gptfast.ops import select
from gptfast.ops.adamw import OPTIONS, adamw_
from gptfast.training.sharding import clip_parts_, local

if TYPE_CHECKING:
    from gptfast.ops.triton.adamw import PointerTable

Tensors = list[Tensor]
ALIKE = "lr", "betas", "eps", "amsgrad", "maximize"  # in all groups, or the kernels cannot do it


def weight_groups(
    params: list[nn.Parameter], decayed: Literal["all", "matrices"]
) -> list[dict[str, Any]]:
    """Returns torch's parameter groups: one, or the matrices and what does not decay.

    Args:
        params: All that is trained.
        decayed: What decays: "all", or "matrices", parameters of at least two dimensions.
    """
    if decayed == "all":
        return [{"params": params}]
    matrices = [p for p in params if p.dim() >= 2]
    others = [p for p in params if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with `clipped_step`, which also clips the norm of the gradients.

    One operator call updates all parameters. The kernels support contiguous float32 tensors in
    groups that differ in `weight_decay` alone, without `amsgrad` and `maximize`; torch's step does
    everything else. All use torch's state, so a checkpoint of one can be loaded by the other, on
    any device.

    Where processes share out the parameters (DTensors), the kernels see this process's parts.

    With `ema`, the state of a parameter also has its "average", a running mean of the weight that
    starts as the initial weight. Step t makes it

        ema_t average + (1 - ema_t) weight,  ema_t = min(ema, (1 + t) / (10 + t)).

    Args:
        params: Parameters, or torch's parameter groups, in which "params" must be a list.
        fused_kernel: False uses torch's step even where the kernels could run.
        ema: The averages' `ema`, in (0, 1); None: there are none.
        options: Options of torch.optim.AdamW.
    """

    def __init__(
        self,
        params: list[nn.Parameter] | list[dict[str, Any]],
        fused_kernel: bool = True,
        ema: float | None = None,
        **options: Any,
    ):
        tensors: list[Tensor] = []
        for each in params:
            tensors += each["params"] if isinstance(each, dict) else [each]
        device = tensors[0].device.type if tensors else "cpu"  # torch rejects an empty list
        super().__init__(params, fused=device in ("cpu", "cuda"), **options)
        self.ema = ema
        plain = all(p.dtype == torch.float32 and p.is_contiguous() for p in tensors)
        self._kernel = fused_kernel and plain and not select.unavailable(device, torch.float32)
        self._groups = len(self.param_groups)
        self._shared = bool(tensors) and hasattr(tensors[0], "device_mesh")
        self._first: dict[Tensor, Tensor] = {}  # initial weights, during torch's first step
        if ema is not None:
            self.register_step_pre_hook(AdamW._before_torch)
            self.register_step_post_hook(AdamW._after_torch)

    @property
    def by_kernel(self) -> bool:
        """Whether the kernels do the step."""
        first, *others = self.param_groups
        if not self._kernel or first["amsgrad"] or first["maximize"]:
            return False
        known = len(self.param_groups) == self._groups  # an added group may have other tensors
        return known and all(each[name] == first[name] for each in others for name in ALIKE)

    @property
    def averages(self) -> Tensors:
        """The running means of the weights, in the order of the groups' parameters.

        Without `ema` there are none. A weight that has not moved is its own average.
        """
        if self.ema is None:
            return []
        return [self.state.get(p, {}).get("average", p.detach()) for p, _ in self._params()]

    @torch.no_grad()
    def clipped_step(self, clip: float | None) -> None:
        """Clips the gradients to a norm of at most `clip` (None: no limit), then steps.

        Afterwards the values of the gradients are undefined: torch's path scales them in place.
        """
        if self._shared and clip is not None:
            clip_parts_([p for p, _ in self._params()], clip)
            clip = None
        if not self.by_kernel:
            if clip is not None:
                nn.utils.clip_grad_norm_([p for p, _ in self._params()], clip)
            self.step()
            return
        *tensors, groups = self._tensors()
        numbers = self.numbers(clip)
        decay = [numbers[OPTIONS + group] for group in groups]
        adamw_(*tensors, decay, *numbers[:OPTIONS])
        weights, *_, averages = tensors
        # Autograd does not see the kernels write.
        torch.autograd.graph.increment_version([*weights, *averages])

    def table(self, memory: Tensor | None) -> "PointerTable":
        """Returns the table by which the GPU's kernels find what a step reads and writes."""
        from gptfast.ops.triton.adamw import PointerTable

        return PointerTable(*self._tensors(), memory=memory)

    def numbers(self, clip: float | None) -> tuple[float, ...]:
        """Returns lr, beta1, beta2, eps, clip, ema, and each group's weight decay, as they are."""
        first = self.param_groups[0]
        options = first["lr"], *first["betas"], first["eps"], math.inf if clip is None else clip
        decays = (group["weight_decay"] for group in self.param_groups)
        return *options, self.ema or 0.0, *decays

    def _params(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Yields all parameters, each with the number of its group."""
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                yield param, number

    def _tensors(self) -> tuple[Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, list[int]]:
        """Returns what a step reads and writes for all parameters that have a gradient.

        That is: weights, gradients, moments, step counts, averages (none without `ema`), groups.
        """
        found = [(p, group) for p, group in self._params() if p.grad is not None]
        params, groups = [p for p, _ in found], [group for _, group in found]
        states = [self._state_of(p) for p in params]
        grads = [local(p.grad).contiguous() for p in params if p.grad is not None]
        names = "exp_avg", "exp_avg_sq", "step"
        means, squares, steps = ([local(state[name]) for state in states] for name in names)
        averages = [] if self.ema is None else [local(state["average"]) for state in states]
        return [local(p) for p in params], grads, means, squares, steps, averages, groups

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        if self.ema is not None and "average" not in state:
            state["average"] = param.detach().clone()
        return state

    @torch.no_grad()
    def _before_torch(self, *unused: Any) -> None:
        """Keeps the weights from which averages start: torch's first step must find no state."""
        for p, _ in self._params():
            if p.grad is not None and "average" not in self.state.get(p, {}):
                self._first[p] = p.detach().clone()

    @torch.no_grad()
    def _after_torch(self, *unused: Any) -> None:
        """Moves the averages towards the weights that torch's step has made."""
        assert self.ema is not None
        for p, _ in self._params():
            if p.grad is None:
                continue
            state = self.state[p]
            if p in self._first:
                state["average"] = self._first.pop(p)
            pull = (9.0 / (10.0 + state["step"].to(p.dtype))).clamp(min=1.0 - self.ema)
            state["average"] += (p - state["average"]) * pull
