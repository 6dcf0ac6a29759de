"""A model that several processes train: a copy in each, or a part of every weight in each.

With FSDP2 a parameter is a DTensor, and each process has some of its rows. The model's own code
never sees that: in a forward or backward pass, FSDP puts plain whole weights in the place of the
parts.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gptfast.config import TrainConfig
from gptfast.errors import ConfigError
from gptfast.model import GPT, unwrapped
from gptfast.storable import check_storable, empty
from gptfast.training import reduction
from gptfast.training.distributed import Processes


def shared(model: nn.Module, config: TrainConfig, processes: Processes) -> nn.Module:
    """Makes a model one that several processes train; alone, it stays as it is.

    Gradients become sums over the processes, not means: a trainer weighs its part of a batch.

    Args:
        model: A GPT with the same weights in every process; with "fsdp" it is changed in place.
        config: `parallel` is used.
        processes: Those that train it.

    Returns:
        What to call in training.

    Raises:
        ConfigError: The model is in DistributedDataParallel, or "fsdp" for one within a wrapper.
        CheckpointError: "fsdp" for a GPT that a checkpoint cannot hold.
    """
    if processes.size == 1:
        return model
    device = unwrapped(model).main_weight.device
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ConfigError(
            "the trainer itself sums gradients over the processes: give it a model outside of "
            "DistributedDataParallel"
        )
    if config.parallel == "ddp":
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, reduction.hook)
        return wrapped
    if not isinstance(model, GPT):
        raise ConfigError(
            f"parallel='fsdp' takes a GPT without a wrapper, got a {type(model).__name__}"
        )
    check_storable(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (processes.size,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
        part = cast(FSDPModule, module)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        if device.type == "cpu":
            part.set_custom_reduce_scatter(cast(Any, reduction.ReduceScatter()))
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether each process has a part of every weight."""
    return any(hasattr(param, "to_local") for param in model.parameters())


def unsummed(model: nn.Module) -> AbstractContextManager[None]:
    """Makes backward passes inside add up gradients per process; the next pass outside sums them.

    FSDP sums the gradients of every pass, and so keeps no whole gradients.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def local(x: Tensor) -> Tensor:
    """Returns this process's part of a tensor, or all of it if the tensor is not in parts."""
    return cast(Any, x).to_local() if hasattr(x, "to_local") else x


def clip_parts_(params: Sequence[Tensor], clip: float) -> None:
    """Scales the gradients of parameters that are in parts to a joint norm of at most `clip`.

    The squares are summed in the order of ranks. A norm that is not finite shows in the weights.
    """
    shards: Any = [param for param in params if param.grad is not None]
    group = shards[0].device_mesh.get_group()
    grads = [local(param.grad) for param in shards]
    own = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).double().square().sum()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    norm = sum(parts[1:], parts[0]).sqrt().float()
    torch._foreach_mul_(grads, (clip / (norm + 1e-6)).clamp(max=1.0))


@contextmanager
def exchanged(first: Sequence[Tensor], second: Sequence[Tensor]) -> Iterator[None]:
    """Swaps the contents of two lists of tensors during the `with`; the second may be empty."""

    @torch.no_grad()
    def exchange() -> None:
        for one, other in zip(first, second, strict=False):
            kept = local(one).clone()
            local(one).copy_(local(other))
            local(other).copy_(kept)

    exchange()
    try:
        yield
    finally:
        exchange()


def whole(x: Tensor) -> Tensor:
    """Gathers a tensor from the processes that have its parts; all of them must call it."""
    return cast(Any, x).full_tensor() if hasattr(x, "full_tensor") else x


def part_of(x: Tensor, like: Tensor) -> Tensor:
    """Splits a tensor that every process has into parts as `like` is split."""
    if not hasattr(like, "to_local"):
        return x
    from torch.distributed.tensor import DTensor, distribute_tensor

    shards = cast(DTensor, like)
    return distribute_tensor(
        x.to(shards.device), shards.device_mesh, shards.placements, src_data_rank=None
    )


@torch.no_grad()
def whole_model(model: GPT) -> GPT:
    """Returns a plain GPT on the CPU with the weights of a sharded one; others as they are.

    All processes must call it.
    """
    if not is_sharded(model):
        return model
    tensors = {name: whole(tensor).cpu() for name, tensor in model.state_dict().items()}
    plain = empty(model.config)
    plain.load_state_dict(tensors, assign=True)
    if model.config.tie_weights:
        plain.lm_head.weight = plain.wte.weight
    plain.backend = model.backend
    return plain.eval()


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """Returns an optimizer's state_dict with whole tensors. All processes must call it."""
    moments = {
        i: {
            name: whole(value).cpu() if hasattr(value, "full_tensor") else value
            for name, value in each.items()
        }
        for i, each in state["state"].items()
    }
    return state | {"state": moments}


def parts_of_state(state: dict[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
    """Returns the state_dict that `whole_state` made with the parts of this process."""
    moments = {
        i: {
            name: value if name == "step" else part_of(value, params[i])
            for name, value in each.items()
        }
        for i, each in state["state"].items()
    }
    return state | {"state": moments}


def reshard(model: GPT) -> None:
    """Drops the whole weights that an evaluation gathered, or the next step would use them."""
    cast(Any, model).reshard()


@torch.no_grad()
def load_whole(model: GPT, weights: dict[str, Tensor]) -> None:
    """Gives a model, sharded or not, whole weights that every process has."""
    own = model.state_dict()
    for name, tensor in own.items():
        local(tensor).copy_(local(part_of(weights[name], tensor)))
