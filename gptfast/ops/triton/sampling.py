"""From logits to tokens, by the algorithm of csrc/kernels/layers/sampling.inl; one program per row.

Each filter keeps the tokens that reach a threshold. A search over the ordered bit patterns of
floats finds it, two bits at a time, which needs no sort. A row of at most HELD logits stays in
registers; the highest score of a longer one is found by a kernel of many programs, and it is read
again for every two bits.

The kernel also ends a step of generation: it writes the token down, counts it, and so decides which
slots draw another one. Nothing of that waits for the host.

Letters: R rows of logits, V vocab_size, S slots.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.sampling import SAMPLING_STREAM, Sampling
from gptfast.ops.triton.launch import block_of, cdiv, kernel
from gptfast.ops.triton.overlap import let_successor_start, overlap, wait_for_predecessor
from gptfast.ops.triton.tiles import LN2, LOG2E

HELD, BLOCK = 1024, 4096  # columns that stay; columns at once of a longer row
STREAM = tl.constexpr(SAMPLING_STREAM)
MIN_SCORE = tl.constexpr(-2139095041)  # _ordered of -inf
ONE = tl.constexpr(0x3F800000)  # the bits of 1.0


class Kind(NamedTuple):
    """Which parts of sampling a kernel has; the numbers come from a tensor, see `numbers_of`."""

    greedy: bool
    top_k: bool
    top_p: bool
    penalty: bool


def kind_of(how: Sampling, vocab_size: int) -> Kind:
    """Returns the kind of a way to sample."""
    return Kind(
        how.temperature == 0.0,
        0 < how.top_k < vocab_size,
        how.top_p < 1.0,
        how.repetition_penalty != 1.0,
    )


def numbers_of(how: Sampling) -> list[float]:
    """Returns log2(e) / temperature, top_k, top_p, min_p and penalty, for a float64 tensor (5,)."""
    sharpness = 0.0 if how.temperature == 0.0 else math.log2(math.e) / how.temperature
    return [sharpness, float(how.top_k), how.top_p, how.min_p, how.repetition_penalty]


class Progress(NamedTuple):
    """The slots of a generation, which a step moves on by a token; one row of logits each.

    A slot runs while drawn < limits and its window is not longer than block_size.
    """

    tokens: Tensor  # (S,) int64, the last token
    lengths: Tensor  # (S,) int64, of the window with that token
    offsets: Tensor  # (S,) int64, where the window starts in the text
    drawn: Tensor  # (S,) int64, how many tokens have been drawn
    limits: Tensor  # (S,) int64, how many are to be drawn
    text: Tensor  # (S, capacity) int64; text token i is at i % capacity
    block_size: int


@triton.jit
def _ordered(bits):
    """Maps a float's bits to an integer of the same order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score(logits, seen, held, j, V, columns, penalty, HELD: tl.constexpr):
    """Logits j after the repetition penalty, -inf past V; `held` has them already if HELD."""
    z = held
    if not HELD:
        # Masked by `columns`, which is a multiple of 16, the loads are 16 bytes wide.
        z = tl.where(j < V, tl.load(logits + j, mask=j < columns, other=0.0), -float("inf"))
        if seen is not None:
            before = tl.load(seen + j, mask=j < columns, other=0) != 0
            z = tl.where(before, tl.where(z > 0.0, z / penalty, z * penalty), z)
    return z


@triton.jit
def _weight(z, highest, sharpness):
    """exp((z - highest) / temperature), without 0 * inf at a temperature near 0."""
    below = z - highest
    return tl.where(below == 0.0, 1.0, tl.exp2(below * sharpness))


@triton.jit
def _kept(
    logits, seen, held, j, V, columns, penalty, highest, sharpness, min_score, min_weight,
    HELD: tl.constexpr,
):  # fmt: skip
    """The weights j that reach both thresholds; 0 for the other tokens."""
    z = _score(logits, seen, held, j, V, columns, penalty, HELD)
    p = _weight(z, highest, sharpness)
    reaches = (_ordered(z.to(tl.int32, bitcast=True)) >= min_score) & (
        p.to(tl.int32, bitcast=True) >= min_weight
    )
    return tl.where(reaches & (j < V), p, 0.0)


@triton.jit
def _step_on(row, token, tokens, seen, lengths, offsets, drawn, limits, text, capacity, block_size):
    """Appends the token to a slot that runs, and reports it; reports -1 for a slot that does not.

    length' = length + 1, drawn' = drawn + 1, text[(offset + length) % capacity] = token.
    """
    length, count = tl.load(lengths + row), tl.load(drawn + row)
    runs = (count < tl.load(limits + row)) & (length <= block_size)
    at = (tl.load(offsets + row) + length) % capacity
    tl.store(text + row * capacity + at, token, mask=runs)
    tl.store(tokens + row, token, mask=runs)
    tl.store(lengths + row, length + 1, mask=runs)
    tl.store(drawn + row, count + 1, mask=runs)
    if seen is not None:
        tl.store(seen + token, tl.cast(1, tl.uint8), mask=runs)
    return tl.where(runs, token, -1)


@triton.jit
def _highest(logits, seen, held, j, V, columns, penalty, HELD: tl.constexpr):
    """Of a block: the highest score, the first token that has it, ln sum exp of the raw logits.

    The last one comes as the maximum `top` and the sum of exp(x - top). Also counts the logits that
    are not finite.
    """
    z = _score(logits, seen, held, j, V, columns, penalty, HELD)
    highest = tl.max(z, 0)
    first = tl.min(tl.where((z == highest) & (z > -float("inf")), j, V), 0)
    x = tl.where(j < V, tl.load(logits + j, mask=j < columns, other=0.0), -float("inf"))
    wrong = tl.sum(((j < V) & ~(tl.abs(x) < float("inf"))).to(tl.int32), 0)
    top = tl.max(x, 0)
    return highest, first, top, tl.sum(tl.exp2((x - top) * LOG2E), 0), wrong


@kernel
@triton.jit
def highest_kernel(
    logits, seen, numbers, scores, counts, V, columns, parts,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`_highest` of a part of a row: (R, 3, parts) scores and (R, 2, parts) counts."""
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    let_successor_start(OVERLAP, "at start")
    wait_for_predecessor(OVERLAP)
    logits += row * columns
    if seen is not None:
        seen += row * columns
    j = part * BLOCK + tl.arange(0, BLOCK)
    penalty = tl.load(numbers + 4).to(tl.float32)
    highest, first, top, total, wrong = _highest(
        logits, seen, tl.zeros([BLOCK], tl.float32), j, V, columns, penalty, False
    )
    let_successor_start(OVERLAP, "at end")
    scores += row * 3 * parts + part
    counts += row * 2 * parts + part
    tl.store(scores, highest)
    tl.store(scores + parts, top)
    tl.store(scores + 2 * parts, total)
    tl.store(counts, first)
    tl.store(counts + parts, wrong)


@kernel
@triton.jit
def sample_kernel(
    logits, seen, seeds, sequence_ids, steps, numbers, found_tokens, found_logprobs, V, columns,
    scores, counts, parts,
    tokens, lengths, offsets, limits, text, capacity, block_size,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
    HELD: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Chooses a token of one row; also gives its log-probability under softmax(logits).

    The log-probability is NaN if a logit is not finite. With `tokens`, the row is a slot, which
    appends the token.
    """
    row = tl.program_id(0).to(tl.int64)
    let_successor_start(OVERLAP, "at start")
    wait_for_predecessor(OVERLAP)
    logits += row * columns
    sharpness = tl.load(numbers).to(tl.float32)
    penalty = tl.load(numbers + 4).to(tl.float32)
    if seen is not None:
        seen += row * columns
    lane = tl.arange(0, BLOCK)
    held = tl.zeros([BLOCK], tl.float32)
    if HELD:
        held = _score(logits, seen, held, lane, V, columns, penalty, False)
        highest, first, top, total, wrong = _highest(
            logits, seen, held, lane, V, columns, penalty, HELD
        )
    else:  # of the parts that `highest_kernel` has looked at
        part = tl.arange(0, PARTS)
        some, lowest = part < parts, -float("inf")
        scores += row * 3 * parts + part
        counts += row * 2 * parts + part
        best = tl.load(scores, mask=some, other=lowest)
        highest = tl.max(best, 0)
        firsts = tl.load(counts, mask=some, other=V)
        first = tl.min(tl.where(best == highest, firsts, V), 0)
        tops = tl.load(scores + parts, mask=some, other=lowest)
        top = tl.max(tops, 0)
        own = tl.load(scores + 2 * parts, mask=some, other=0.0)
        total = tl.sum(tl.where(some, own * tl.exp2((tops - top) * LOG2E), 0.0), 0)
        wrong = tl.sum(tl.load(counts + parts, mask=some, other=0), 0)
    token = first
    if not GREEDY:
        min_score, min_weight = MIN_SCORE, 0
        nobody, nothing_yet = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
        if TOP_K:
            # The largest t that at least top_k scores reach.
            top_k = tl.load(numbers + 1)
            low = (first * 0).to(tl.int64) + MIN_SCORE
            high = _ordered(highest.to(tl.int32, bitcast=True)).to(tl.int64)
            while low < high:
                step = (high - low + 4) // 4  # of high - low + 1 candidates
                c1, c2, c3 = nobody, nobody, nobody
                for j0 in tl.range(0, V, BLOCK):
                    z = _score(logits, seen, held, j0 + lane, V, columns, penalty, HELD)
                    key = tl.where(j0 + lane < V, _ordered(z.to(tl.int32, bitcast=True)), MIN_SCORE)
                    c1 += (key >= low + step).to(tl.int32)
                    c2 += (key >= low + 2 * step).to(tl.int32)
                    c3 += (key >= low + 3 * step).to(tl.int32)
                reached = (tl.sum(c1, 0) >= top_k).to(tl.int64)
                reached += (tl.sum(c2, 0) >= top_k).to(tl.int64)
                reached += (tl.sum(c3, 0) >= top_k).to(tl.int64)
                low += reached * step
                high = tl.minimum(high, low + step - 1)
            min_score = low.to(tl.int32)
        if TOP_P:
            # The largest t such that weights of at least t hold top_p of the mass; at most 1.0.
            whole = nothing_yet
            for j0 in tl.range(0, V, BLOCK):
                whole += _kept(
                    logits, seen, held, j0 + lane, V, columns, penalty, highest, sharpness,
                    min_score, 0, HELD,
                )  # fmt: skip
            wanted = tl.load(numbers + 2).to(tl.float32) * tl.sum(whole, 0)
            low, high = first * 0, first * 0 + ONE
            while low < high:
                step = (high - low + 4) // 4  # of high - low + 1 candidates
                s1, s2, s3 = nothing_yet, nothing_yet, nothing_yet
                for j0 in tl.range(0, V, BLOCK):
                    p = _kept(
                        logits, seen, held, j0 + lane, V, columns, penalty, highest, sharpness,
                        min_score, 0, HELD,
                    )  # fmt: skip
                    bits = p.to(tl.int32, bitcast=True)
                    s1 += tl.where(bits >= low + step, p, 0.0)
                    s2 += tl.where(bits >= low + 2 * step, p, 0.0)
                    s3 += tl.where(bits >= low + 3 * step, p, 0.0)
                reached = (tl.sum(s1, 0) >= wanted).to(tl.int32)
                reached += (tl.sum(s2, 0) >= wanted).to(tl.int32)
                reached += (tl.sum(s3, 0) >= wanted).to(tl.int32)
                low += reached * step
                high = tl.minimum(high, low + step - 1)
            min_weight = low
        share = tl.load(numbers + 3).to(tl.float32)
        min_weight = tl.maximum(min_weight, share.to(tl.int32, bitcast=True))
        # Inverse transform sampling by 53 bits of a Philox block, as in gptfast.ops.sampling.
        none = tl.zeros([1], tl.uint32)
        step = none + tl.load(steps + row).to(tl.uint32)
        sequence = none + tl.load(sequence_ids + row).to(tl.uint32)
        w0, w1, _, _ = tl.philox(tl.load(seeds + row), step, sequence, none, none + STREAM)
        bits = (w0.to(tl.uint64) << 21) + (w1.to(tl.uint64) >> 11)
        uniform = tl.sum(bits.to(tl.float64), 0) * 1.1102230246251565e-16
        mass = tl.zeros([BLOCK], tl.float64)
        for j0 in tl.range(0, V, BLOCK):
            mass += _kept(
                logits, seen, held, j0 + lane, V, columns, penalty, highest, sharpness, min_score,
                min_weight, HELD,
            ).to(tl.float64)  # fmt: skip
        target = uniform * tl.sum(mass, 0)
        before = tl.sum(tl.zeros([1], tl.float64), 0)
        token, last = V, 0
        for j0 in tl.range(0, V, BLOCK):
            j = j0 + lane
            p = _kept(
                logits, seen, held, j, V, columns, penalty, highest, sharpness, min_score,
                min_weight, HELD,
            ).to(tl.float64)  # fmt: skip
            after = before + tl.sum(p, 0)
            last = tl.maximum(last, tl.max(tl.where(p > 0.0, j, 0), 0))
            if (after > target) & (token == V):
                sums = before + tl.cumsum(p, 0)
                token = tl.min(tl.where((sums > target) & (p > 0.0), j, V), 0)
            before = after
        token = tl.where(token < V, token, last)  # rounding may leave the target unreached
    let_successor_start(OVERLAP, "at end")
    lse = top + tl.log2(total) * LN2
    token = tl.minimum(token, V - 1).to(tl.int64)  # logits that are all NaN have no first token
    logprob = tl.where(wrong > 0, float("nan"), tl.load(logits + token) - lse)
    if tokens is not None:
        token = _step_on(
            row, token, tokens, seen, lengths, offsets, steps, limits, text, capacity, block_size
        )
    tl.store(found_tokens + row, token.to(found_tokens.dtype.element_ty))
    tl.store(found_logprobs + row, logprob)


def sample(
    kind: Kind, numbers: Tensor, logits: Tensor, vocab_size: int, seen: Tensor | None,
    seeds: Tensor, sequence_ids: Tensor, steps: Tensor, tokens: Tensor, logprobs: Tensor,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Chooses a token of every row as gptfast.ops.sampling.choose does.

    Args:
        kind: See `kind_of`.
        numbers: (5,) float64, see `numbers_of`.
        logits: (R, columns) float32, contiguous, with at least V columns.
        vocab_size: V; what stands in columns from V on does not matter.
        seen: (R, columns) uint8, 1 for the tokens that the repetition penalty applies to; None
            without a penalty.
        seeds: (R,) int64; this and the next two say which number each row draws, as in
            gptfast.ops.sampling.draws.
        sequence_ids: (R,) int64.
        steps: (R,) int64.
        tokens: (R,) int32 or int64, receives the tokens.
        logprobs: (R,) float32, receives their log-probabilities under softmax(logits), NaN for a
            row with a logit that is not finite.
        progress: The slots that the rows belong to, if they are to append their tokens; its `drawn`
            must be `steps`. A slot that does not run gets the token -1.
    """
    R, columns = logits.shape
    block = block_of(vocab_size)
    held = block <= HELD
    where: tuple[Tensor | None, ...] = (None,) * 5
    capacity, block_size = 0, 0
    if progress is not None:
        where = progress.tokens, progress.lengths, progress.offsets, progress.limits, progress.text
        capacity, block_size = progress.text.shape[1], progress.block_size
    seen, starts = seen if kind.penalty else None, overlap(R)
    scores, counts, parts = None, None, cdiv(vocab_size, BLOCK)
    if not held:
        scores = logits.new_empty(R, 3, parts)
        counts = logits.new_empty(R, 2, parts, dtype=torch.int32)
        highest_kernel[(R * parts,)](
            logits, seen, numbers, scores, counts, vocab_size, columns, parts, BLOCK=BLOCK,
            **starts, num_warps=8,
        )  # fmt: skip
    sample_kernel[(R,)](
        logits, seen, seeds, sequence_ids, steps, numbers, tokens, logprobs, vocab_size, columns,
        scores, counts, parts, *where, capacity, block_size,
        GREEDY=kind.greedy, TOP_K=kind.top_k, TOP_P=kind.top_p, BLOCK=block if held else BLOCK,
        HELD=held, PARTS=block_of(parts), **starts, num_warps=_warps(kind, block),
    )  # fmt: skip


def _warps(kind: Kind, block: int) -> int:
    """Returns how many warps a row takes, of `block` columns."""
    if block <= 128 or (kind.greedy and block > HELD):
        return 1
    return 4 if block <= HELD else 16
