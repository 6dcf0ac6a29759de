"""The shape of a model, and the course's two models as ready-made shapes."""

from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, Literal

from gptfast.checks import whole
from gptfast.errors import ConfigError


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and switches of a GPT. Raises ConfigError where they contradict each other."""

    block_size: int = 64  # T, the longest context
    vocab_size: int = 66  # V
    n_layer: int = 2  # L
    n_head: int = 2  # H
    n_embd: int = 128  # C
    dropout: float = 0.2  # of the embedding, the attention weights and the FFN's output
    bias: bool = True  # of the linear layers and norms; the head has none
    attention: bool = True  # False leaves the attention sub-blocks out
    gelu: Literal["erf", "tanh"] = "erf"
    tie_weights: bool = False  # the head shares the token embedding's weight
    padding_idx: int | None = 0  # this token's embedding is zero and is not trained
    init: Literal["torch", "gpt2"] = "torch"

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            count = whole(value)
            if count is None or count < 1:
                raise ConfigError(f"{name} must be a positive whole number, got {value!r}")
            object.__setattr__(self, name, count)
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd must be divisible by n_head, got n_embd={self.n_embd} and"
                f" n_head={self.n_head}"
            )
        if not (isinstance(self.dropout, float | Real) and 0.0 <= self.dropout < 1.0):
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout!r}")
        object.__setattr__(self, "dropout", float(self.dropout))
        for name in ("bias", "attention", "tie_weights"):
            value = getattr(self, name)
            if value not in (True, False):
                raise ConfigError(f"{name} must be True or False, got {value!r}")
            object.__setattr__(self, name, bool(value))
        for name, known in (("gelu", ("erf", "tanh")), ("init", ("torch", "gpt2"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.padding_idx is not None:
            token = whole(self.padding_idx)
            if token is None or not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"padding_idx must be None or in [0, {self.vocab_size}),"
                    f" got {self.padding_idx!r}"
                )
            object.__setattr__(self, "padding_idx", token)

    @property
    def head_dim(self) -> int:
        """D, the columns of one head."""
        return self.n_embd // self.n_head

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GPTConfig":
        """The config that `to_dict` wrote. Raises ConfigError for a field that there is not."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"GPTConfig has no field {unknown[0]!r}; it has {', '.join(known)}")
        return cls(**values)


def abc(vocab_size: int = 5) -> GPTConfig:
    """The course's model of the "ABC" language: 400,128 parameters with its 5 characters."""
    return GPTConfig(block_size=16, vocab_size=vocab_size)


def shakespeare(vocab_size: int = 66) -> GPTConfig:
    """The course's model of Shakespeare's characters."""
    return GPTConfig(block_size=64, vocab_size=vocab_size)
