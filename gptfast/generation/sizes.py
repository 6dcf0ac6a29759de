"""How sizes are rounded for a decoder, so that calls and steps share its caches and graphs."""

MOST_UNROLLED = 32  # steps in a graph
# Target number of launches in one graph, which has at least 8 steps. Many slots add a few launches
# for norms and draws, and windows that move add those of a forward pass.
GRAPH_LAUNCHES = 512
FILL_LENGTH = 4  # fewest positions of a window that are computed together


def fill_length(length: int, capacity: int) -> int:
    """Returns how many positions are computed for the first `length`: 0, 4, 8, ..., capacity."""
    return min(max(FILL_LENGTH, 1 << (length - 1).bit_length()), capacity) if length > 0 else 0


def unrolled(layers: int) -> int:
    """Returns how many steps the largest graph has: the host starts each with one call."""
    launches = 5 * layers + 2
    return min(MOST_UNROLLED, max(8, 1 << max(1, GRAPH_LAUNCHES // launches).bit_length() - 1))


def slots_bucket(slots: int) -> int:
    """Rounds slots up, so that calls of similar sizes share a decoder.

    To a power of 2 up to 64, then by a quarter at most.
    """
    power = 1 << (slots - 1).bit_length()
    unit = max(16, power // 8)
    return power if power <= 64 else -(-slots // unit) * unit


def capacity_bucket(capacity: int, block_size: int) -> int:
    """Rounds a capacity up to 64, 128, ... tokens, at most block_size."""
    return min(block_size, max(64, 1 << (capacity - 1).bit_length()))
