"""AdamW with gradient clipping, by torch or by the kernels, which read memory in two passes."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gptfast.ops import select
from gptfast.ops.adamw import adamw_

if TYPE_CHECKING:
    from gptfast.ops.triton.adamw import Table

Tensors = list[Tensor]


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with `clipped_step`, which also clips the norm of the gradients.

    One operator call updates all parameters. The kernels support one parameter group of contiguous
    float32 tensors, without `amsgrad` and `maximize`; torch's step does everything else. All use
    torch's state, so a checkpoint of one can be loaded by the other, on any device.

    Args:
        params: Parameters, or torch's parameter groups, in which "params" must be a list.
        fused_kernel: False uses torch's step even where the kernels could run.
        options: Options of torch.optim.AdamW.
    """

    def __init__(
        self,
        params: list[nn.Parameter] | list[dict[str, Any]],
        fused_kernel: bool = True,
        **options: Any,
    ):
        tensors: list[Tensor] = []
        for each in params:
            tensors += each["params"] if isinstance(each, dict) else [each]
        device = tensors[0].device.type if tensors else "cpu"  # torch rejects an empty list
        super().__init__(params, fused=device in ("cpu", "cuda"), **options)
        plain = all(p.dtype == torch.float32 and p.is_contiguous() for p in tensors)
        self._kernel = fused_kernel and plain and not select.unavailable(device, torch.float32)

    @property
    def averages(self) -> Tensors:
        """The running means of the parameters; [] without `ema`."""
        return []

    @property
    def by_kernel(self) -> bool:
        """Whether the kernels do the step."""
        group = self.param_groups[0]
        alone = len(self.param_groups) == 1 and not (group["amsgrad"] or group["maximize"])
        return self._kernel and alone

    @torch.no_grad()
    def clipped_step(self, clip: float | None) -> None:
        """Clips the gradients to a norm of at most `clip` (None: no limit), then steps.

        Afterwards the values of the gradients are undefined: torch's path scales them in place.
        """
        if not self.by_kernel:
            if clip is not None:
                params = [p for group in self.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(params, clip)
            self.step()
            return
        weights, *others = self._tensors()
        adamw_(weights, *others, *self.numbers(clip))
        torch.autograd.graph.increment_version(weights)  # autograd does not see the kernels write

    def table(self, memory: Tensor | None) -> "Table":
        """Returns the table by which the GPU's kernels find what a step reads and writes."""
        from gptfast.ops.triton.adamw import Table

        return Table(*self._tensors(), memory=memory)

    def numbers(self, clip: float | None) -> tuple[float, ...]:
        """Returns lr, beta1, beta2, eps, weight_decay and clip, as they are now."""
        group = self.param_groups[0]
        options = group["lr"], *group["betas"], group["eps"], group["weight_decay"]
        return *options, math.inf if clip is None else clip

    def _tensors(self) -> tuple[Tensors, Tensors, Tensors, Tensors, Tensors]:
        """Returns weights, gradients, moments and step counts of all with a gradient."""
        params = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        states = [self._state_of(p) for p in params]
        grads = [p.grad.contiguous() for p in params]
        names = "exp_avg", "exp_avg_sq", "step"
        means, squares, steps = ([state[name] for state in states] for name in names)
        return params, grads, means, squares, steps

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state
