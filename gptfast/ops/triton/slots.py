"""Gives slots to sequences: one launch for all of a call, from one copy of the host's data.

Letters: n sequences, S slots.
"""

import triton
import triton.language as tl
from torch import Tensor

from gptfast.ops.triton.launch import kernel

# What the host writes of each sequence: (COLUMNS, n). `begin` is where its text starts in `given`.
COLUMNS = "slot", "begin", "length", "offset", "limit", "seed", "sequence_id"
# What a slot has: (FIELDS, S).
FIELDS = "tokens", "lengths", "offsets", "drawn", "limits", "seeds", "sequence_ids"


@kernel
@triton.jit(do_not_specialize=["n"])
def start_kernel(given, state, text, seen, n, field, capacity, columns, BLOCK: tl.constexpr):
    """Writes a sequence's text, from its window on, and its counters to a slot."""
    row = given + tl.program_id(0)
    slot, begin, length = tl.load(row), tl.load(row + n), tl.load(row + 2 * n)
    offset, limit = tl.load(row + 3 * n), tl.load(row + 4 * n)
    own = state + slot
    tl.store(own, tl.load(given + begin + length - 1))
    tl.store(own + field, length - offset)
    tl.store(own + 2 * field, offset)
    tl.store(own + 3 * field, tl.zeros_like(slot))
    tl.store(own + 4 * field, limit)
    tl.store(own + 5 * field, tl.load(row + 5 * n))
    tl.store(own + 6 * field, tl.load(row + 6 * n))
    for t0 in tl.range(0, length, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        token = tl.load(given + begin + t, mask=t < length, other=0)
        inside = (t >= offset) & (t < length)
        tl.store(text + slot * capacity + t % capacity, token, mask=inside)
        if seen is not None:
            tl.store(seen + slot * columns + token, tl.cast(1, tl.uint8), mask=t < length)


def start_slots(given: Tensor, n: int, state: Tensor, text: Tensor, seen: Tensor | None) -> None:
    """Gives slots to sequences.

    Args:
        given: The COLUMNS of n sequences, then the tokens of their texts, int64.
        n: How many sequences there are.
        state: (len(FIELDS), S) int64, any stride between the fields.
        text: (S, capacity) int64; token i of a text goes to i % capacity, from the offset on.
        seen: (S, columns) uint8, receives 1 for the tokens of a whole text, and 0 for the others.
    """
    if seen is not None:
        seen.index_fill_(0, given[:n], 0)
    columns = 0 if seen is None else seen.shape[1]
    start_kernel[(n,)](
        given, state, text, seen, n, state.stride(0), text.shape[1], columns, BLOCK=256
    )
