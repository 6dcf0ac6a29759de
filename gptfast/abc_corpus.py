"""The `abc` corpus, its true next-character distribution and its entropy.

The words of the text are drawn independently, so the source is a hidden Markov model: the state is
(word, position in the word), it emits its character with probability 1, and after a word's last
character a new word is drawn. The true next-character distribution and the entropy, a lower bound
on the loss of any model, can therefore be computed exactly.
"""

from functools import cache

import numpy as np

from gptfast.checks import as_int
from gptfast.errors import DataError

WORDS = ("AABCBBC", "BCABCCA", "CAAACB\n\n")
PROBABILITIES = (0.4, 0.4, 0.2)
NUM_WORDS = 150_000

_ALPHABET = "".join(sorted(set("".join(WORDS))))
_MASK_32 = 0xFFFFFFFF


def _r_uniforms(seed: int, n: int) -> np.ndarray:
    """Returns the first `n` values of R's `runif` after `set.seed(seed)`, (n,) float64."""
    x = seed & _MASK_32
    for _ in range(50):
        x = (69069 * x + 1) & _MASK_32
    state = np.empty(625, dtype=np.uint32)
    for i in range(625):
        x = (69069 * x + 1) & _MASK_32
        state[i] = x
    generator = np.random.RandomState()
    # The first of the 625 is R's position in the state; R sets it to 624, so all words are used.
    generator.set_state(("MT19937", state[1:], 624, 0, 0.0))
    return generator.randint(0, 2**32, size=n, dtype=np.uint32) * 2.3283064365386963e-10


def abc_corpus(seed: int = 1) -> str:
    """Draws the corpus as R's `sample(prob=)` does: 150,000 words and a final newline.

    Args:
        seed: R's seed, a signed or unsigned 32-bit integer; 1 gives the corpus in `CORPORA`.

    Raises:
        DataError: `seed` is not a 32-bit integer.
    """
    key = as_int(seed)
    if key is None or not -(2**31) <= key < 2**32:
        raise DataError(f"seed must be a 32-bit integer, got {seed!r}")
    # R's revsort is not stable: it puts these probabilities in the order word 2, word 1, word 3.
    order = (1, 0, 2)
    cumulative = np.cumsum([PROBABILITIES[i] for i in order])
    words = np.array([WORDS[i] for i in order], dtype=object)
    draws = np.searchsorted(cumulative, _r_uniforms(key, NUM_WORDS), side="left")
    return "".join(words[np.minimum(draws, len(words) - 1)]) + "\n"


@cache
def _chain() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the hidden Markov model with S states and A characters, float64.

    Returns:
        Stationary distribution (S,), transition matrix (S, S), emission matrix (S, A).
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
    """Computes the true distribution of the character after `context` by the forward algorithm.

    The context may begin anywhere in the text (stationary start), as a training window does.

    Args:
        context: The preceding characters; an empty context gives the marginal distribution.

    Returns:
        The probability of each of the corpus's four characters (newline, A, B, C), zeros included.

    Raises:
        DataError: The source cannot produce `context`; names the first impossible position.
    """
    belief, transition, emission = _chain()
    for i, char in enumerate(context):
        column = _ALPHABET.find(char)
        # belief = P(state at this character | characters before it)
        joint = belief * emission[:, column] if column >= 0 else np.zeros_like(belief)
        if not joint.any():
            raise DataError(f"the abc source cannot give {char!r} at position {i} of the context")
        belief = (joint / joint.sum()) @ transition
    return dict(zip(_ALPHABET, (belief @ emission).tolist(), strict=True))


def abc_entropy(max_context: int = 16) -> float:
    """Computes the lowest possible mean loss for contexts of 1 to `max_context` characters.

    This is the mean over context lengths of H(next character | context of that length), in nats. It
    is exact: all contexts that the source can produce are enumerated with their probabilities.

    Raises:
        DataError: `max_context` is below 1.
    """
    count = as_int(max_context)
    if count is None or count < 1:
        raise DataError(f"max_context must be a whole number, at least 1, got {max_context!r}")
    stationary, transition, emission = _chain()
    # Row n is P(context n, state of the next character); its sum is P(context n).
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
