"""The calls that `gpu_static.py` compiles: every operator on tensors without data.

Letters: B batch, T time, C n_embd, H heads, D head_dim, F 4C, V vocab_size, M B T.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptfast.ops.int8 import empty_int8
from gptfast.ops.sampling import Sampling
from gptfast.ops.triton import (
    adamw,
    attention,
    attention_backward,
    cross_entropy,
    decode,
    embedding,
    few_rows,
    ffn,
    int8,
    launch,
    linear,
)
from gptfast.ops.triton import sampling as device_sampling
from gptfast.ops.triton.slots import start_slots

DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32,
}  # fmt: skip
B, T, C, H, F, V = 8, 1024, 768, 12, 3072, 50257  # GPT-2


@dataclass(frozen=True)
class Case:
    """A call of an operator in one dtype: useful FLOPs, and bytes read or written once."""

    name: str
    run: Callable[[torch.dtype], Any]
    flops: float
    elements: float  # of activations and weights, in the dtype
    fixed_bytes: float = 0.0
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    wide: bool = True  # rows are long enough for loads of 16 bytes


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def long(*shape: int) -> Tensor:
    """Indices without data."""
    return empty(*shape, dtype=torch.int64)


def attention_case(D: int, dropout_p: float, backward: bool) -> Case:
    """Attention with C / D heads of a packed projection."""
    heads, scale = C // D, D**-0.5
    seed = long() if dropout_p else None

    def run(dtype: torch.dtype) -> None:
        q, k, v = empty(B, T, 3, heads, D, dtype=dtype).permute(2, 0, 3, 1, 4)
        if not backward:
            attention.attention(q, k, v, scale, dropout_p, seed, 1)
            return
        out, lse = empty(B, T, heads, D, dtype=dtype).transpose(1, 2), empty(B, heads, 2, T)
        dropout = launch.dropout_args(dropout_p, seed, 1, lse.device)
        dq, dk, dv = empty(B, T, 3, heads, D, dtype=dtype).permute(2, 0, 3, 1, 4)
        grads = dq, dk, dv
        attention_backward.write_grads(out, q, k, v, out, lse, grads, scale, dropout, True)

    products = 5 if backward else 2
    name = f"attention{' backward' if backward else ''}, D {D}{', dropout' if dropout_p else ''}"
    return Case(
        name, run, products * B * C * T * (T + 1), B * T * C * (8 if backward else 4),
        4.0 * B * heads * T, tuple(DTYPES) if D == 64 else ("bf16", "fp32"), D >= 64,
    )  # fmt: skip


def cases() -> list[Case]:
    """All kernels at the sizes of GPT-2 124M, the heads' width and dropout varied."""
    M, norm = B * T, (empty(C), empty(C))
    moments = empty(M), empty(M)

    def linear_forward(dtype: torch.dtype) -> None:
        x, w = empty(M, C, dtype=dtype), empty(3 * C, C)
        linear.linear(x, *norm, w, empty(3 * C), None)

    def linear_backward(dtype: torch.dtype) -> None:
        x, dy, w = (empty(*size, dtype=dtype) for size in ((M, C), (M, 3 * C), (3 * C, C)))
        linear.linear_backward(dy, x, *norm, *moments, w, empty(3 * C), 0b11111)

    def projection(dtype: torch.dtype) -> None:
        x, w = empty(M, C, dtype=dtype), empty(C, C)
        linear.linear(x, None, None, w, empty(C), x)

    def ffn_params() -> Any:
        return *norm, empty(F, C), empty(F), empty(C, F), empty(C)

    def ffn_forward(gelu: str, dropout_p: float, dtype: torch.dtype) -> None:
        x, seed = empty(M, C, dtype=dtype), long() if dropout_p else None
        options: Any = gelu, dropout_p, seed, 2, True
        ffn.ffn(x, *ffn_params(), *options)

    def ffn_backward(gelu: str, dropout_p: float, dtype: torch.dtype) -> None:
        x, seed = empty(M, C, dtype=dtype), long() if dropout_p else None
        hidden = empty(M, F, dtype=dtype)
        rest: Any = *ffn_params(), *moments, hidden, gelu, dropout_p, seed, 2, 0b1111111
        ffn.ffn_backward(x, x, *rest)

    def loss(with_grad: bool, smoothing: float, dtype: torch.dtype) -> None:
        x = empty(M, C, dtype=dtype)
        options: Any = None, -100, "mean", smoothing, 0b1111 if with_grad else 0
        cross_entropy.linear_cross_entropy(x, *norm, empty(V, C), long(M), *options)

    def embed(dtype: torch.dtype) -> None:
        tables = empty(V, C), empty(T, C)
        embedding.embedding(long(B, T), *tables, 0.1, long(), 0, dtype)

    def embed_backward(dtype: torch.dtype) -> None:
        tables = empty(V, C), empty(T, C)
        dy = empty(B, T, C, dtype=dtype)
        embedding.embedding_backward(dy, long(B, T), *tables, 0, 0.1, long(), 0, 0b11)

    def adamw_step(averaged: bool, _: torch.dtype) -> None:
        tables = [empty(V, C), empty(C)]
        state = tables, tables, tables, tables, [empty(), empty()], tables if averaged else []
        adamw.adamw_(*state, [0.1, 0.0], 1e-3, 0.9, 0.95, 1e-8, 1.0, 0.999)

    def embed_backward_of_few_tokens(dtype: torch.dtype) -> None:
        tables, dy = (empty(65, C), empty(64, C)), empty(64, 64, C, dtype=dtype)
        embedding.embedding_backward(dy, long(64, 64), *tables, 0, 0.1, long(), 0, 0b11)

    def decode_step(rows: int, D: int, dtype: torch.dtype) -> None:
        cache = empty(rows, 2, C // D, T, D, dtype=dtype)
        decode.decode_attention(empty(rows, C, dtype=dtype), cache, long(rows))

    def fill_cache(dtype: torch.dtype) -> None:
        slots, text = long(16), empty(16, T, dtype=torch.int64)
        decode.next_windows(slots, slots, slots, slots, slots, text, T, T, 1)
        kv, cache = empty(16, T, 2 * C, dtype=dtype), empty(16, 2, H, T, C // H, dtype=dtype)
        decode.fill_cache(kv, slots, slots, cache)
        seen = empty(16, V + 15, dtype=torch.uint8)
        start_slots(long(16 * (7 + T)), 16, long(7, 16), text, seen)

    def few_rows_qkv(rows: int, few_bits: bool, dtype: torch.dtype) -> None:
        own = torch.float32 if few_bits else dtype  # of the model's weights
        sizes = (3 * C, C), (3 * C,), (V, C), (T, C), (C,)
        w, b, wte, wpe, n = (empty(*size, dtype=own) for size in sizes)
        weight: Any = empty_int8(w) if few_bits else w
        x, each = empty(rows, C, dtype=dtype), long(rows)
        cache = empty(rows, 2, H, T, C // H, dtype=dtype)
        append = few_rows.Append(cache, each, each, each)
        for embedded in (few_rows.Embedding(each, each, wte, wpe, T), None):
            few_rows.few_rows_linear(
                x, weight, b, x, norm=(n, n), embedding=embedded, append=append
            )

    def few_rows_ffn(rows: int, few_bits: bool, dtype: torch.dtype) -> None:
        x, hidden = empty(rows, C, dtype=dtype), empty(rows, F, dtype=dtype)
        weights: Any = empty(F, C, dtype=dtype), empty(C, F, dtype=dtype)
        first, second = map(empty_int8, weights) if few_bits else weights
        few_rows.few_rows_linear(x, first, hidden[0], hidden, norm=(x[0], x[0]), gelu="tanh")
        few_rows.few_rows_linear(hidden, second, x[0], x, residual=x)

    def few_bits(dtype: torch.dtype) -> None:
        weight = empty(V, C, dtype=dtype)
        int8.round_to_int8(weight, empty_int8(weight))

    def few_rows_head(rows: int, dtype: torch.dtype) -> None:
        x, w = empty(rows, C, dtype=dtype), empty(V, C, dtype=dtype)
        few_rows.few_rows_linear(x, w, None, empty(rows, V + 15), norm=(x[0], x[0]))

    def sample(how: Sampling, V: int, _: torch.dtype) -> None:
        seen, each = empty(64, V + 15, dtype=torch.uint8), long(64)
        progress = device_sampling.Progress(
            each, each, each, each, each, empty(64, T, dtype=torch.int64), T
        )
        device_sampling.sample(
            device_sampling.kind_of(how, V), empty(5, dtype=torch.float64), empty(64, V + 15), V,
            seen, each, each, each, empty(64, dtype=torch.int32), empty(64), progress,
        )  # fmt: skip

    weights = 8 * C * C
    greedy = Sampling(temperature=0.0)
    everything = Sampling(temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.1)
    found = [
        attention_case(D, dropout_p, backward)
        for D, dropout_p in ((16, 0.0), (32, 0.0), (64, 0.0), (64, 0.1), (128, 0.0), (256, 0.1))
        for backward in (False, True)
    ]
    for name, gelu, p in (("ffn", "tanh", 0.0), ("ffn, erf, dropout", "erf", 0.1)):
        found += [
            Case(name, functools.partial(ffn_forward, gelu, p), 4.0 * M * C * F,
                 M * (2 * C + F) + weights),
            Case(f"{name}, backward", functools.partial(ffn_backward, gelu, p), 8.0 * M * C * F,
                 M * (3 * C + F) + 2 * weights),
        ]  # fmt: skip
    return [
        *found,
        Case("norm and linear", linear_forward, 6.0 * M * C * C, 4 * M * C + 3 * C * C),
        Case("norm and linear, backward", linear_backward, 12.0 * M * C * C,
             5 * M * C + 6 * C * C),
        Case("linear and residual", projection, 2.0 * M * C * C, 3 * M * C + C * C),
        Case("loss", functools.partial(loss, False, 0.0), 2.0 * M * C * V, M * C + V * C),
        *(Case(f"loss{of_what} and gradients", functools.partial(loss, True, smoothing),
               6.0 * M * C * V, 2 * M * C + 2 * V * C)
          for of_what, smoothing in (("", 0.0), (" with smoothed labels", 0.1))),
        Case("embedding", embed, 0.0, 2 * M * C),
        Case("embedding, backward", embed_backward, 0.0, 2 * M * C + V * C),
        Case("AdamW", functools.partial(adamw_step, False), 0.0, 8 * V * C, dtypes=("fp32",)),
        Case("AdamW with averages", functools.partial(adamw_step, True), 0.0, 10 * V * C,
             dtypes=("fp32",)),
        Case("embedding of 65 tokens, backward", embed_backward_of_few_tokens, 0.0,
             64 * 64 * C + 129 * C),
        *(Case(f"decode attention, D {D}", functools.partial(decode_step, 64, D),
               4.0 * 64 * T * C, 2 * 64 * T * C) for D in (64, 128)),
        Case("filling the cache", fill_cache, 0.0, 4 * 16 * T * C),
        *(Case(f"norm and qkv, {rows} rows", functools.partial(few_rows_qkv, rows, False),
               12.0 * rows * C * C, 6 * C * C) for rows in (1, 64, 512)),
        *(Case(f"norm and qkv of 8 bits, {rows} rows", functools.partial(few_rows_qkv, rows, True),
               12.0 * rows * C * C, 0.0, 6.0 * C * C, ("bf16",)) for rows in (1, 64, 512)),
        *(Case(f"ffn, {rows} rows", functools.partial(few_rows_ffn, rows, False),
               4.0 * rows * C * F, 2 * C * F) for rows in (1, 64, 512)),
        *(Case(f"ffn of 8 bits, {rows} rows", functools.partial(few_rows_ffn, rows, True),
               4.0 * rows * C * F, 0.0, 2.0 * C * F, ("bf16",)) for rows in (1, 64, 512)),
        Case("rounding to 8 bits", few_bits, 0.0, V * C, 1.0 * V * C),
        *(Case(f"head, {rows} rows", functools.partial(few_rows_head, rows),
               2.0 * rows * C * V, C * V) for rows in (1, 64, 512)),
        *(Case(f"{name}, V {size}", functools.partial(sample, how, size), 0.0, 0.0,
               4.0 * 64 * size, ("fp32",), wide=size > 1000 and how is everything)
          for size in (66, V)
          for name, how in (("sampling", everything), ("sampling, greedy", greedy))),
    ]  # fmt: skip
