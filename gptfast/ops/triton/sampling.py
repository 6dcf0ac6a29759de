"""From logits to tokens, by the algorithm of csrc/kernels/layers/sampling.inl; one program per row.

Each filter keeps the tokens that reach a threshold. A bisection over the ordered bit patterns of
floats finds it, which needs no sort.

Letters: R rows of logits, V vocab_size.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.sampling import SAMPLING_STREAM, Sampling
from gptfast.ops.triton.launch import block_of
from gptfast.ops.triton.tiles import LN2, LOG2E

BLOCK = 1024
STREAM = tl.constexpr(SAMPLING_STREAM)
MIN_SCORE = tl.constexpr(-2139095041)  # _ordered of -inf
ONE = tl.constexpr(0x3F800000)  # the bits of 1.0


@triton.jit
def _ordered(bits):
    """Maps a float's bits to an integer of the same order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score(logits, seen, j, V, penalty):
    """Logits j after the repetition penalty; -inf past V."""
    z = tl.load(logits + j, mask=j < V, other=-float("inf"))
    if seen is not None:
        before = tl.load(seen + j, mask=j < V, other=0) != 0
        z = tl.where(before, tl.where(z > 0.0, z / penalty, z * penalty), z)
    return z


@triton.jit
def _weight(z, highest, sharpness):
    """exp((z - highest) / temperature), without 0 * inf at a temperature near 0."""
    below = z - highest
    return tl.where(below == 0.0, 1.0, tl.exp2(below * sharpness))


@triton.jit
def _kept(logits, seen, j, V, penalty, highest, sharpness, min_score, min_weight):
    """The weights j that reach both thresholds; 0 for the other tokens."""
    z = _score(logits, seen, j, V, penalty)
    p = _weight(z, highest, sharpness)
    reaches = (_ordered(z.to(tl.int32, bitcast=True)) >= min_score) & (
        p.to(tl.int32, bitcast=True) >= min_weight
    )
    return tl.where(reaches & (j < V), p, 0.0)


@triton.jit
def sample_kernel(
    logits, seen, seeds, sequence_ids, steps, tokens, logprobs, V,
    sharpness, top_k, top_p, min_p, penalty,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chooses a token of one row; also gives its log-probability under softmax(logits)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    if seen is not None:
        seen += row * V
    # One pass: the highest score, the first token that has it, and ln sum exp of the raw logits.
    lane = tl.arange(0, BLOCK)
    first, nothing = tl.cast(V, tl.int32), tl.cast(-float("inf"), tl.float32)
    highest, top, total = nothing, nothing, 0.0
    for j0 in tl.range(0, V, BLOCK):
        j = j0 + lane
        z = _score(logits, seen, j, V, penalty)
        higher = tl.max(z, 0)
        place = tl.min(tl.where((z == higher) & (j < V), j, V), 0)
        first = tl.where(higher > highest, place, first)
        highest = tl.maximum(highest, higher)
        x = tl.load(logits + j, mask=j < V, other=-float("inf"))
        both = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp2((top - both) * LOG2E) + tl.sum(tl.exp2((x - both) * LOG2E), 0)
        top = both
    token = first
    if not GREEDY:
        min_score, min_weight = MIN_SCORE, 0
        if TOP_K:
            # The largest t that at least top_k scores reach.
            low = (first * 0).to(tl.int64) + MIN_SCORE
            high = _ordered(highest.to(tl.int32, bitcast=True)).to(tl.int64)
            while low < high:
                middle = low + (high - low + 1) // 2
                count = 0
                for j0 in tl.range(0, V, BLOCK):
                    z = _score(logits, seen, j0 + lane, V, penalty)
                    reaches = _ordered(z.to(tl.int32, bitcast=True)) >= middle
                    count += tl.sum((reaches & (j0 + lane < V)).to(tl.int32), 0)
                low = tl.where(count >= top_k, middle, low)
                high = tl.where(count >= top_k, high, middle - 1)
            min_score = low.to(tl.int32)
        whole = 0.0
        if TOP_P:
            for j0 in tl.range(0, V, BLOCK):
                p = _kept(logits, seen, j0 + lane, V, penalty, highest, sharpness, min_score, 0)
                whole += tl.sum(p, 0)
            # The largest t such that weights of at least t hold top_p of the mass; at most 1.0.
            low, high = (first * 0).to(tl.int64), (first * 0).to(tl.int64) + ONE
            while low < high:
                middle = low + (high - low + 1) // 2
                mass = 0.0
                for j0 in tl.range(0, V, BLOCK):
                    p = _kept(
                        logits, seen, j0 + lane, V, penalty, highest, sharpness, min_score,
                        middle.to(tl.int32),
                    )  # fmt: skip
                    mass += tl.sum(p, 0)
                low = tl.where(mass >= top_p * whole, middle, low)
                high = tl.where(mass >= top_p * whole, high, middle - 1)
            min_weight = low.to(tl.int32)
        share = tl.cast(min_p, tl.float32)
        min_weight = tl.maximum(min_weight, share.to(tl.int32, bitcast=True))
        # Inverse transform sampling by 53 bits of a Philox block, as in gptfast.ops.sampling.
        none = tl.zeros([1], tl.uint32)
        step = none + tl.load(steps + row).to(tl.uint32)
        sequence = none + tl.load(sequence_ids + row).to(tl.uint32)
        w0, w1, _, _ = tl.philox(tl.load(seeds + row), step, sequence, none, none + STREAM)
        bits = (w0.to(tl.uint64) << 21) + (w1.to(tl.uint64) >> 11)
        uniform = tl.sum(bits.to(tl.float64), 0) * 1.1102230246251565e-16
        mass = tl.sum(tl.zeros([1], tl.float64), 0)
        for j0 in tl.range(0, V, BLOCK):
            p = _kept(
                logits, seen, j0 + lane, V, penalty, highest, sharpness, min_score, min_weight
            )
            mass += tl.sum(p.to(tl.float64), 0)
        target = uniform * mass
        reached = tl.sum(tl.zeros([1], tl.float64), 0)
        token, last = V, 0
        for j0 in tl.range(0, V, BLOCK):
            j = j0 + lane
            p = _kept(logits, seen, j, V, penalty, highest, sharpness, min_score, min_weight).to(
                tl.float64
            )
            sums = reached + tl.cumsum(p, 0)
            place = tl.min(tl.where((sums > target) & (p > 0.0), j, V), 0)
            token = tl.minimum(token, place)
            last = tl.maximum(last, tl.max(tl.where(p > 0.0, j, 0), 0))
            reached += tl.sum(p, 0)
        token = tl.where(token < V, token, last)  # rounding may leave the target unreached
    tl.store(tokens + row, token.to(tl.int64))
    lse = top + tl.log2(total) * LN2
    # Logits that are all NaN give no token (V); the caller checks for logits that are not finite.
    tl.store(logprobs + row, tl.load(logits + token, mask=token < V, other=0.0) - lse)


def sample(
    how: Sampling, logits: Tensor, seen: Tensor | None, seeds: Tensor, sequence_ids: Tensor,
    steps: Tensor, tokens: Tensor, logprobs: Tensor,
) -> None:  # fmt: skip
    """Chooses a token of every row as gptfast.ops.sampling.choose does.

    Args:
        how: The options.
        logits: (R, V) float32, contiguous.
        seen: (R, V) uint8, 1 for the tokens that the repetition penalty applies to; None without a
            penalty.
        seeds: (R,) int64; this and the next two say which number each row draws, as in
            gptfast.ops.sampling.draws.
        sequence_ids: (R,) int64.
        steps: (R,) int64.
        tokens: (R,) int64, receives the tokens.
        logprobs: (R,) float32, receives their log-probabilities under softmax(logits).
    """
    R, V = logits.shape
    greedy = how.temperature == 0.0
    sample_kernel[(R,)](
        logits, seen if how.repetition_penalty != 1.0 else None, seeds, sequence_ids, steps, tokens,
        logprobs, V, 0.0 if greedy else math.log2(math.e) / how.temperature,
        how.top_k, how.top_p, how.min_p, how.repetition_penalty,
        GREEDY=greedy, TOP_K=0 < how.top_k < V, TOP_P=how.top_p < 1.0,
        BLOCK=min(BLOCK, block_of(V)),
    )  # fmt: skip
