"""The shape of a model, and how it is trained."""

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from gptfast.checks import as_int, as_number, check_seed, shortened
from gptfast.errors import ConfigError

Precision = Literal["fp32", "bf16"]
PRECISIONS = get_args(Precision)
NUMBERS = (  # fields of TrainConfig
    *("lr", "min_lr", "clip", "weight_decay", "label_smoothing", "ema", "save_minutes"),
    *("text_fraction", "val_fraction"),
)
MOST_STEPS = 2**62  # that a run may count; the libraries that show it take no more
COUNTS = (  # fields of TrainConfig that are positive, or None where that is their default
    *("batch_size", "accumulation_steps", "steps", "epochs", "eval_every", "eval_tokens"),
    *("save_every", "threads", "patience", "decay_steps"),
)

if TYPE_CHECKING:
    VocabSize = Any  # a model's config always has an int: its readers need no check for None
else:
    VocabSize = int | None


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and switches of a GPT.

    Raises:
        ConfigError: A field has a wrong value, or two fields contradict each other.
    """

    # A switch whose default is True is the option --no-NAME, with the same help: it says "whether".

    block_size: int = 64  # T, the longest context
    vocab_size: VocabSize = None  # V; None: that of the text that the model is trained on
    n_layer: int = 2  # L
    n_head: int = 2  # H
    n_embd: int = 128  # C
    dropout: float = 0.2  # of the embedding, the attention weights and the FFN's output
    attn_proj_dropout: bool = False  # whether attn.c_proj's output has dropout too, as in GPT-2
    bias: bool = True  # whether the linear layers and norms have biases; the head has none
    attention: bool = True  # whether the blocks have their attention sub-blocks
    gelu: Literal["erf", "tanh"] = "erf"  # exact (erf), or GPT-2's approximation (tanh)
    tie_weights: bool = False  # whether the head shares the token embedding's weight
    padding_idx: int | None = 0  # this token's embedding is zero and is not trained
    init: Literal["torch", "gpt2"] = "torch"  # whose initial weights: torch's defaults, or GPT-2's

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if name != "vocab_size" or self.vocab_size is not None:
                object.__setattr__(self, name, _positive(name, getattr(self, name)))
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd must be divisible by n_head, got n_embd={self.n_embd} and"
                f" n_head={self.n_head}"
            )
        dropout = as_number(self.dropout)
        if dropout is None or not 0.0 <= dropout < 1.0:
            raise ConfigError(f"dropout must be in [0, 1), got {shortened(self.dropout)}")
        object.__setattr__(self, "dropout", dropout)
        _check_choices(self)
        if self.padding_idx is not None:
            token, limit = as_int(self.padding_idx), self.vocab_size
            if token is None or token < 0 or limit is not None and token >= limit:
                end = "vocab_size" if limit is None else limit
                raise ConfigError(
                    f"padding_idx must be None or in [0, {end}), got {self.padding_idx!r}"
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


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains.

    A run lasts `steps` where that is set, else `epochs`; `Trainer.step` alone needs neither.

    Raises:
        ConfigError: A field has a wrong value.
    """

    lr: float = 1e-3  # AdamW's learning rate, the largest of the schedule
    # after the warm-up lr stays (constant), falls to min_lr along half a cosine or a line until the
    # last step, or stays and falls along a line in the last decay_steps (wsd)
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    warmup_steps: int = 0  # steps in which the learning rate first grows along a line up to lr
    min_lr: float = 0.0  # the learning rate of the last step; not of a constant schedule
    decay_steps: int | None = None  # of wsd; None: a tenth of the run's steps
    clip: float | None = None  # the gradient's largest norm; None does not clip
    weight_decay: float = 0.01  # AdamW's
    # what decays: all parameters, or matrices and embeddings alone, not biases and norms
    decayed: Literal["all", "matrices"] = "all"
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's
    label_smoothing: float = 0.0  # the part of the target's probability that all tokens share
    # decay of a running mean of the weights, e.g. 0.999, which is then what is evaluated and saved;
    # None: there is no mean
    ema: float | None = None
    batch_size: int = 64  # B, windows per step, of all processes and accumulated parts together
    accumulation_steps: int = 1  # parts of a batch, one after the other, which saves memory
    recompute: bool = False  # whether the backward pass computes blocks again, to save memory
    steps: int | None = None  # so many steps, on windows drawn at random; wins over epochs
    epochs: int | None = None  # without steps: so many passes over all windows, each in a new order
    eval_every: int | None = None  # steps; None: after each epoch, or at the end where steps is set
    eval_tokens: int | None = None  # held-out tokens that all evaluations but the last read at most
    patience: int | None = None  # end after so many evaluations without a better loss; None: never
    sample: str | None = None  # at each evaluation, continue this text and show what comes
    save_every: int | None = None  # steps; None: at evaluations, at the end and by save_minutes
    save_minutes: float | None = 10.0  # at most so long without a save; None: see save_every
    seed: int = 1  # of the initial weights, the windows and the dropout masks
    precision: Precision = "fp32"  # of the activations; the weights are fp32 in both
    text_fraction: float = 1.0  # the leading part of the text that is used at all
    val_fraction: float = 0.1  # the trailing part of that which is held out; 0 holds out nothing
    threads: int | None = None  # of torch while the run lasts; None leaves torch's number
    # auto: on a GPU each step is one CUDA graph, where the model allows it; off: never
    graph: Literal["auto", "off"] = "auto"
    # of several processes: each has the whole model (ddp), or a part of each weight (fsdp)
    parallel: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        for name in COUNTS:
            default = self.__dataclass_fields__[name].default
            if default is not None or getattr(self, name) is not None:
                object.__setattr__(self, name, _positive(name, getattr(self, name)))
        warmup = as_int(self.warmup_steps)
        if warmup is None or not 0 <= warmup < MOST_STEPS:
            got = shortened(self.warmup_steps)
            raise ConfigError(f"warmup_steps must be a whole number, at least 0, got {got}")
        object.__setattr__(self, "warmup_steps", warmup)
        for name in ("lr", "clip", "save_minutes"):
            if name == "lr" or getattr(self, name) is not None:
                _check_number(name, getattr(self, name), above=0.0)
        _check_number("min_lr", self.min_lr, least=0.0, most=self.lr)
        _check_number("label_smoothing", self.label_smoothing, least=0.0, below=1.0)
        if self.ema is not None:
            _check_number("ema", self.ema, above=0.0, below=1.0)
        _check_number("weight_decay", self.weight_decay, least=0.0)
        _check_number("text_fraction", self.text_fraction, above=0.0, most=1.0)
        _check_number("val_fraction", self.val_fraction, least=0.0, below=1.0)
        # Of JSON it is a list, which would not be hashable.
        betas = [*map(as_number, self.betas)] if isinstance(self.betas, tuple | list) else []
        if len(betas) != 2 or not all(b is not None and 0.0 <= b < 1.0 for b in betas):
            got = shortened(self.betas)
            raise ConfigError(f"betas must be two numbers in [0, 1), got {got}")
        object.__setattr__(self, "betas", tuple(betas))
        for name in NUMBERS:
            object.__setattr__(self, name, as_number(getattr(self, name)))
        object.__setattr__(self, "seed", check_seed(self.seed))
        _check_choices(self)
        if self.sample is not None and not (isinstance(self.sample, str) and self.sample):
            raise ConfigError(f"sample must be a text of at least a character, got {self.sample!r}")
        if self.patience is not None and self.val_fraction == 0.0:
            raise ConfigError("patience needs held-out text, got val_fraction=0")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ConfigError(f"decay_steps belongs to schedule 'wsd', got {self.schedule!r}")
        if self.min_lr > 0.0 and self.schedule == "constant":
            raise ConfigError(f"min_lr must be 0 in a constant schedule, got {self.min_lr!r}")
        if self.accumulation_steps > self.batch_size:
            raise ConfigError(
                f"accumulation_steps must be at most batch_size={self.batch_size}, "
                f"got {self.accumulation_steps}"
            )


def _check_choices(config: GPTConfig | TrainConfig) -> None:
    """Checks the fields that are switches or have a choice of words, by their annotations."""
    for field in fields(config):
        value = getattr(config, field.name)
        several = bool(getattr(value, "ndim", 0))  # an array is not compared as a whole
        if field.type is bool:
            if several or value not in (True, False):
                raise ConfigError(f"{field.name} must be True or False, got {shortened(value)}")
            object.__setattr__(config, field.name, bool(value))
        elif get_origin(field.type) is Literal:
            known = get_args(field.type)
            if several or value not in known:
                raise ConfigError(f"{field.name} must be one of {known}, got {shortened(value)}")


def _positive(name: str, value: Any) -> int:
    """The value as an int, which JSON takes where it does not take numpy's numbers."""
    count = as_int(value)
    if count is None or not 1 <= count < MOST_STEPS:
        raise ConfigError(f"{name} must be a positive whole number, got {shortened(value)}")
    return count


def _check_number(
    name: str,
    value: Any,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> None:
    number = as_number(value)
    if number is not None and above < number < below and least <= number <= most:
        return
    low = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
    high = f" and below {below:g}" if below < math.inf else f" and at most {most:g}"
    bounds = low if below == most == math.inf else low + high
    raise ConfigError(f"{name} must be a number {bounds}, got {shortened(value)}")
