"""Incremental decoding of a whole GPT in one operator call per step.

Letters: L layers, H heads, D head_dim, T block_size, V vocab_size.
"""

from typing import Any

import torch
from torch import Tensor

from gptfast.ops.common import define


def _fake_pack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    # The size depends on the instruction set that was chosen: only running the operator tells it.
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def _fake_forward(tokens: Tensor, starts: Tensor, row: Tensor, *args: Any) -> Tensor:
    cache, vocab_size, *_ = args[3:]
    return cache.new_empty(row.shape[0], vocab_size, dtype=torch.float32)


# A weight (N, K) in the layout that the kernels multiply by, uint8.
pack_weight = define("pack_weight(Tensor weight, ScalarType dtype) -> Tensor", _fake_pack_weight)

# Logits (sequences, V) float32 after each sequence's last new token; see csrc/engine/decoder.h.
#   tokens  all new tokens, int64, one sequence after the other
#   starts  (sequences + 1,) where each begins
#   row     (sequences,) its row of the cache
#   cached  (sequences,) how many of its tokens are there already
#   params  wte, wpe, per layer its norms and biases, ln_f; an empty tensor for an absent one
#   packed  per layer c_attn, c_proj, c_fc, c_proj, then lm_head, by pack_weight
#   cache   (L, 2, rows, H, T, D) keys and values, written
forward = define(
    """
    decoder_forward(Tensor tokens, Tensor starts, Tensor row, Tensor cached, Tensor[] params,
        Tensor[] packed, Tensor(a!) cache, int vocab_size, bool attention, str gelu) -> Tensor
    """,
    _fake_forward,
)
