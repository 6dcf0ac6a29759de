"""AdamW with gradient clipping, by torch or by the kernel, which reads memory in two passes."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from gptfast.ops import select
from gptfast.ops.adamw import adamw_


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with `clipped_step`, which also clips the norm of the gradients.

    On the CPU, one operator call updates all parameters. The kernel supports one parameter group of
    contiguous float32 tensors, without `amsgrad` and `maximize`; torch's step does everything else.
    Both use torch's state, so a checkpoint of one can be loaded by the other.

    Args:
        params: Parameters, or torch's parameter groups, in which "params" must be a list.
        fused_kernel: False uses torch's step even where the kernel could run.
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
        unavailable = device != "cpu" or select.unavailable(device, torch.float32)
        self._kernel = fused_kernel and plain and not unavailable  # on a GPU torch's is fused

    @torch.no_grad()
    def clipped_step(self, clip: float | None) -> None:
        """Clips the gradients to a norm of at most `clip` (None: no limit), then steps.

        Afterwards the values of the gradients are undefined: torch's path scales them in place.
        """
        group = self.param_groups[0]
        alone = len(self.param_groups) == 1 and not (group["amsgrad"] or group["maximize"])
        if not (self._kernel and alone):
            if clip is not None:
                params = [p for group in self.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(params, clip)
            self.step()
            return
        params = [p for p in group["params"] if p.grad is not None]
        states = [self._state_of(p) for p in params]
        means, squares, steps = (
            [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        lr, (beta1, beta2) = group["lr"], group["betas"]
        options = lr, beta1, beta2, group["eps"], group["weight_decay"]
        grads = [p.grad.contiguous() for p in params]
        adamw_(params, grads, means, squares, steps, *options, math.inf if clip is None else clip)

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state
