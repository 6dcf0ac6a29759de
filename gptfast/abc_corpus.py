"""The `abc` corpus and the best possible prediction of it.

The text is a sequence of words drawn independently, so its source is a hidden Markov chain: the
state is (word, place in the word), the character there is emitted with certainty, and after a
word's last character a new word is drawn. That makes the true next-character distribution, and the
entropy that no model can beat, computable exactly.
"""

from functools import cache

import numpy as np

from gptfast.checks import whole
from gptfast.errors import DataError

WORDS = ("AABCBBC", "BCABCCA", "CAAACB\n\n")
PROBABILITIES = (0.4, 0.4, 0.2)
NUM_WORDS = 150_000

_ALPHABET = "".join(sorted(set("".join(WORDS))))
_MASK_32 = 0xFFFFFFFF


def _r_uniforms(seed: int, n: int) -> np.ndarray:
    """First `n` values of R's `runif` after `set.seed(seed)`: float64, shape (n,)."""
    x = seed & _MASK_32
    for _ in range(50):
        x = (69069 * x + 1) & _MASK_32
    state = np.empty(625, dtype=np.uint32)
    for i in range(625):
        x = (69069 * x + 1) & _MASK_32
        state[i] = x
    generator = np.random.RandomState()
    # The first of the 625 is R's position, which R sets to 624 here: all words are used up.
    generator.set_state(("MT19937", state[1:], 624, 0, 0.0))
    return generator.randint(0, 2**32, size=n, dtype=np.uint32) * 2.3283064365386963e-10


def abc_corpus(seed: int = 1) -> str:
    """Draw the corpus: 150,000 words and a final newline, as R's `sample(prob=)` draws them.

    Args:
        seed: R's seed, a 32-bit integer with or without sign; 1 gives the registered corpus.

    Raises:
        DataError: if `seed` is not a 32-bit integer.
    """
    key = whole(seed)
    if key is None or not -(2**31) <= key < 2**32:
        raise DataError(f"seed must be a 32-bit integer, got {seed!r}")
    # R's revsort leaves these equal probabilities swapped: it reads word 2, word 1, word 3.
    order = (1, 0, 2)
    cumulative = np.cumsum([PROBABILITIES[i] for i in order])
    words = np.array([WORDS[i] for i in order], dtype=object)
    draws = np.searchsorted(cumulative, _r_uniforms(key, NUM_WORDS), side="left")
    return "".join(words[np.minimum(draws, len(words) - 1)]) + "\n"


@cache
def _chain() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The hidden chain with S states and A characters, float64.

    Returns:
        stationary weights (S,), transition probabilities (S, S), emission probabilities (S, A).
    """
    lengths = [len(word) for word in WORDS]
    first = np.cumsum([0, *lengths[:-1]])
    S = sum(lengths)
    stationary = np.repeat(PROBABILITIES, lengths) / np.dot(PROBABILITIES, lengths)
    transition = np.eye(S, k=1)
    for start, length in zip(first, lengths, strict=True):
        transition[start + length - 1] = 0.0
        transition[start + length - 1, first] = PROBABILITIES
    emission = np.zeros((S, len(_ALPHABET)))
    emission[np.arange(S), [_ALPHABET.index(char) for char in "".join(WORDS)]] = 1.0
    return stationary, transition, emission


def abc_next_distribution(context: str) -> dict[str, float]:
    """True distribution of the character after `context`, by the forward algorithm.

    The context may begin anywhere in the text (stationary start), as a training window does.

    Args:
        context: characters that precede; an empty one gives the marginal distribution.

    Returns:
        Probability of each of the corpus's four characters (newline, A, B, C), zeros included.

    Raises:
        DataError: if the source cannot produce `context`; names the first impossible place.
    """
    belief, transition, emission = _chain()
    for i, char in enumerate(context):
        column = _ALPHABET.find(char)
        # belief = P(state of this character | characters before it)
        joint = belief * emission[:, column] if column >= 0 else np.zeros_like(belief)
        if not joint.any():
            raise DataError(f"the abc source cannot give {char!r} at position {i} of the context")
        belief = (joint / joint.sum()) @ transition
    return dict(zip(_ALPHABET, (belief @ emission).tolist(), strict=True))


def abc_entropy(max_context: int = 16) -> float:
    """Lowest mean loss that any model can reach, over contexts of 1 to `max_context` characters.

    The mean over context lengths of H(next character | context of that length) in nats, exact: all
    contexts that the source can produce are enumerated with their probabilities.

    Raises:
        DataError: if `max_context` is below 1.
    """
    count = whole(max_context)
    if count is None or count < 1:
        raise DataError(f"max_context must be a whole number, at least 1, got {max_context!r}")
    stationary, transition, emission = _chain()
    # Row n: P(context n, state of the next character); the sum of a row is P(context n).
    joint = stationary[None, :]
    entropies = []
    for length in range(count + 1):
        with_next = joint @ emission  # (contexts, A): P(context, next character)
        p = with_next[with_next > 0]
        p_context = joint.sum(axis=1)
        entropies.append((p_context * np.log(p_context)).sum() - (p * np.log(p)).sum())
        if length < count:
            longer = (joint[:, None, :] * emission.T[None]).reshape(-1, len(stationary))
            joint = longer[longer.any(axis=1)] @ transition
    return float(np.mean(entropies[1:]))
