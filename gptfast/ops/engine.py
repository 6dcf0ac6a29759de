"""The compiled engine: packed weights, generation of many tokens in one call, scores.

Letters: L layers, C n_embd, D head_dim, T block_size, V vocab_size, N sequences.
"""

import torch
from torch import Tensor

from gptfast.ops.library import define

# How the engine and Python name a sequence's fields: the columns of `state`'s first tensor, int64;
# csrc/engine/generator.h says what they hold.
FIELDS = "begin length prompt limit offset cached row state seed number twin beyond".split()
STATES = "waiting running length stop window invalid".split()


def _fake_pack_weight(weight: Tensor, dtype: torch.dtype, int8: bool) -> Tensor:
    # The size depends on the instruction set that was chosen: only running the operator tells it.
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def _fake_generate(*_: object) -> tuple[torch.SymInt, torch.SymInt]:
    context = torch.library.get_ctx()  # both depend on what is generated
    return context.new_dynamic_size(), context.new_dynamic_size()


def _fake_score(tokens: Tensor, *_: object) -> Tensor:
    return tokens.new_empty(tokens.shape, dtype=torch.float32)


# A weight (N, K) in the layout that the kernels multiply activations of `dtype` by, uint8.
pack_weight = define(
    "pack_weight(Tensor weight, ScalarType dtype, bool int8) -> Tensor", _fake_pack_weight
)

# A model, as generate and score take it:
#   params  wte, wpe, per layer its norms and biases, ln_f, float32; an empty tensor for an absent
#           one. A layer has ln_1, c_attn's bias (the last layer: of q, then of k and v), c_proj's
#           bias, ln_2, c_fc's bias, c_proj's bias; without attention the last four alone.
#   packed  per layer c_attn (the last layer: the rows of q, then those of k and v), c_proj, c_fc,
#           c_proj; then lm_head, all by pack_weight
_MODEL = """
    Tensor[] params, Tensor[] packed, {extra}int n_layer, int n_head, bool attention, str gelu,
    bool int8, int capacity
"""

# Both have a cache besides, (rows, elements) float32 or bfloat16, the dtype of the activations:
# keys and values of up to `capacity` tokens each, zero at first.

# Generates until `seconds` have passed or a sequence needs more places, one step at least. Returns
# how many sequences go on, and which one ended as its logits are not finite, the first if several
# did; -1 where none.
#   state   sequences (N, FIELDS), tokens (places,) int64, logprobs (places,) float32, alternative
#           (places, k) int64 and alternative_logprob (places, k) float32 of the k likeliest tokens;
#           of any shape with so many elements
#   table   [] or [qkv (T * V, 3 C), known (T * V,) uint8], what is known of the first layer
#   stops   tokens int64; strings and pieces (what each token writes), each uint8 with starts int64
generate = define(
    f"""
    generate(Tensor(a!)[] state, Tensor(b!) cache, Tensor(c!)[] table,
        {_MODEL.format(extra="Tensor[] stops, ")}, float temperature, int top_k, float top_p,
        float min_p, float repetition_penalty, int stride, float seconds)
        -> (SymInt unfinished, SymInt invalid)
    """,
    _fake_generate,
)

# Log-probabilities (M,) float32 of `targets` (M,) after each of `tokens` (M,); a window of tokens
# starts at each but the last of `starts`.
score = define(
    f"""
    score(Tensor tokens, Tensor targets, Tensor starts, Tensor(a!) cache, {_MODEL.format(extra="")})
        -> Tensor
    """,
    _fake_score,
)
