"""Token plus position embedding with dropout.

Letters: B batch, T time, C n_embd, V vocab_size.
"""

from typing import Any

import torch
from torch import Tensor

from gptfast.ops import select
from gptfast.ops.arguments import Argument, Kind, Table, check_dropout, check_int, parameter
from gptfast.ops.autograd import Fused, backward_of, needs_grad, nothing, only_wanted, wanted
from gptfast.ops.library import define, public
from gptfast.ops.linear import fake_grad
from gptfast.ops.random import seed_tensor


def _fake_embedding(idx: Tensor, wte: Tensor, *args: Any) -> Tensor:
    *_, dtype = args
    return wte.new_empty(*idx.shape, wte.shape[1], dtype=dtype)


def _fake_embedding_backward(
    dy: Tensor, idx: Tensor, wte: Tensor, wpe: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *_, wanted = args
    return fake_grad(wte, wte, bool(wanted & 1)), fake_grad(wpe, wte, bool(wanted & 2))


_embedding = define(
    """
    embedding(Tensor idx, Tensor wte, Tensor wpe, float dropout_p, Tensor? seed, int stream,
        ScalarType dtype) -> Tensor
    """,
    _fake_embedding,
)
_embedding_backward = define(
    """
    embedding_backward(Tensor dy, Tensor idx, Tensor wte, Tensor wpe, int padding_idx,
        float dropout_p, Tensor? seed, int stream, int wanted) -> (Tensor dwte, Tensor dwpe)
    """,
    _fake_embedding_backward,
)


class _Embedding(Fused):
    op = "embedding"

    @staticmethod
    def forward(
        wte: Tensor, wpe: Tensor, idx: Tensor, seed: Tensor | None, *options: Any
    ) -> Tensor:
        _, dropout_p, stream, dtype = options
        return _embedding(idx, wte, wpe, dropout_p, seed, stream, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        wte, wpe, idx, seed, *options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(idx, wte, wpe, seed)
        ctx.options = options[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if grads[0] is None:
            return nothing(ctx)
        idx, wte, wpe, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        found = backward_of(
            _Embedding.op, _embedding_backward,
            grads[0], idx, wte, wpe, *ctx.options[:2], seed, ctx.options[2], wanted(needs),
        )  # fmt: skip
        return *only_wanted(found, needs), None, None, None, None, None, None


_TABLE = Table(
    "embedding",
    wte=parameter("V C"),
    idx=Argument(Kind.INDICES, "B T"),
    wpe=parameter("block_size C"),
)


@public
def embedding(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    *,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes dropout(wte[idx] + wpe[0 .. T-1]).

    Args:
        idx: (B, T), int64 in [0, V), T at most wpe's rows.
        wte: (V, C), contiguous, float32, bfloat16 or, on a GPU, float16.
        wpe: (block_size, C), float32 or wte's dtype.
        padding_idx: The row of wte that gets no gradient, in [0, V); None: every row gets one.
        dropout_p: Probability, in [0, 1], of an element to be dropped.
        seed: Key of the dropout mask, () int64 or an int; drawn from torch's default generator when
            None.
        stream: Number of this dropout among those that share the seed.
        dtype: The result's dtype, one of those; wte's when None.

    Returns:
        (B, T, C) in `dtype`.

    Raises:
        ValueError, TypeError: Shapes or dtypes do not fit.
        RuntimeError: An index is out of range.
        BackendError: There are no fused kernels for the device or dtype.
    """
    op = "embedding"
    sizes = _TABLE.check(wte, idx, wpe)
    select.require_fused(op, wte.device.type, wte.dtype)
    V, block_size = sizes["V"], sizes["block_size"]
    if sizes["T"] > block_size:
        raise ValueError(
            f"{op}: idx must be (B, T) with T at most {block_size}, got shape {tuple(idx.shape)}"
        )
    padding = -1 if padding_idx is None else check_int(op, "padding_idx", padding_idx)
    if padding_idx is not None and not 0 <= padding < V:
        raise ValueError(f"{op}: padding_idx must be None or in [0, {V}), got {padding_idx}")
    dropout_p = check_dropout(op, dropout_p)
    stream = check_int(op, "stream", stream)
    key = seed_tensor(seed) if dropout_p > 0.0 else None
    dtype = wte.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}: dtype must be a torch.dtype, got {dtype!r}")
    select.require_fused(op, wte.device.type, dtype)
    if not needs_grad(wte, wpe):
        return _embedding(idx, wte, wpe, dropout_p, key, stream, dtype)
    return _Embedding.call(wte, wpe, idx, key, padding, dropout_p, stream, dtype)
