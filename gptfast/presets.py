"""How a model is trained, and the course's two runs as ready-made presets."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from gptfast import config, data
from gptfast.checks import check_seed, whole
from gptfast.config import GPTConfig
from gptfast.errors import ConfigError

Precision = Literal["fp32", "bf16"]
PRECISIONS = ("fp32", "bf16")
COUNTS = ("batch_size", "steps", "epochs", "eval_every", "eval_tokens", "save_every", "threads")


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains. Raises ConfigError where a field is wrong or contradicts another.

    A run goes by `steps` or by `epochs`, never by both; `Trainer.step` alone needs neither.
    """

    lr: float = 1e-3  # AdamW's learning rate, the same in all steps
    clip: float | None = None  # the gradient's largest norm; None does not clip
    weight_decay: float = 0.01  # AdamW's, on all parameters
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's
    batch_size: int = 64  # B, windows per step
    steps: int | None = None  # this many steps on windows drawn at random
    epochs: int | None = None  # this many times over all windows, in a new order each time
    eval_every: int | None = None  # steps; None: after each epoch, or at the end where steps is set
    eval_tokens: int | None = None  # held-out tokens that all evaluations but the last read at most
    save_every: int | None = None  # steps; None: at evaluations, at the end and by save_minutes
    save_minutes: float | None = 10.0  # at most so long without a save; None: see save_every
    seed: int = 1  # of the initial weights, the windows and the dropout masks
    precision: Precision = "fp32"  # of the activations; the weights are fp32 in both
    text_fraction: float = 1.0  # the leading part of the text that is used at all
    val_fraction: float = 0.1  # the trailing part of that which is held out; 0 holds out nothing
    threads: int | None = None  # of torch while the run lasts; None leaves torch's number

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if value is None and name != "batch_size":
                continue
            count = whole(value)
            if count is None or count < 1:
                raise ConfigError(f"{name} must be a positive whole number, got {value!r}")
            object.__setattr__(self, name, count)  # an int, as JSON wants it
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                "a run goes by steps or by epochs, not by both: "
                f"got steps={self.steps} and epochs={self.epochs}"
            )
        _check_number("lr", self.lr, above=0.0)
        if self.clip is not None:
            _check_number("clip", self.clip, above=0.0)
        if self.save_minutes is not None:
            _check_number("save_minutes", self.save_minutes, above=0.0)
        _check_number("weight_decay", self.weight_decay, least=0.0)
        _check_number("text_fraction", self.text_fraction, above=0.0, most=1.0)
        _check_number("val_fraction", self.val_fraction, least=0.0, below=1.0)
        pair = isinstance(self.betas, tuple | list) and len(self.betas) == 2
        if not pair or not all(isinstance(b, int | float) and 0 <= b < 1 for b in self.betas):
            raise ConfigError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        # A list, as JSON gives it, would not be hashable.
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "seed", check_seed(self.seed))
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")


def _check_number(
    name: str,
    value: Any,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and above < value < below and least <= value <= most:
        return
    low = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
    high = f" and below {below:g}" if below < math.inf else f" and at most {most:g}"
    bounds = low if below == most == math.inf else low + high
    raise ConfigError(f"{name} must be a number {bounds}, got {value!r}")


def abc() -> TrainConfig:
    """The course's training on the "ABC" language."""
    return TrainConfig(lr=3e-3, steps=400, eval_every=100, eval_tokens=20_000, val_fraction=0.2)


def shakespeare() -> TrainConfig:
    """The course's training on Shakespeare's characters."""
    return TrainConfig(
        lr=1e-3, clip=1.0, epochs=3, eval_every=500, text_fraction=0.3, val_fraction=0.1
    )


@dataclass(frozen=True)
class Preset:
    """All of a run: the model's shape, the training, and the text to take where none is given."""

    name: str
    model: Callable[[int], GPTConfig]  # of the vocabulary's size
    train: TrainConfig
    text: Callable[[], str] | None = None  # None: the user gives one
    help: str = ""

    def override(self, overrides: Mapping[str, Any]) -> "Preset":
        """This preset with other values in some fields of the model and of the training.

        `steps` replaces the preset's `epochs`, and the other way round.

        Args:
            overrides: values by field name; a field of GPTConfig or of TrainConfig.

        Raises:
            ConfigError: a field that neither has, or a value that a training field refuses;
                the model's values are checked when `model` makes the config.
        """
        of_model = {field.name for field in fields(GPTConfig)}
        of_train = {field.name for field in fields(TrainConfig)}
        for name in sorted(overrides.keys() - of_model - of_train):
            raise ConfigError(
                f"there is no option {name!r}; the model has {', '.join(sorted(of_model))}; "
                f"training has {', '.join(sorted(of_train))}"
            )
        for_model = {name: overrides[name] for name in overrides if name in of_model}
        for_train = {name: overrides[name] for name in overrides if name in of_train}
        for chosen, other in (("steps", "epochs"), ("epochs", "steps")):
            if for_train.get(chosen) is not None:
                for_train.setdefault(other, None)

        def model(vocab_size: int) -> GPTConfig:
            return replace(self.model(vocab_size), **for_model)

        return replace(self, model=model, train=replace(self.train, **for_train))


PRESETS = {
    "abc": Preset(
        name="abc",
        model=config.abc,
        train=abc(),
        text=data.abc_corpus,
        help='the "ABC" language: 400 steps of batch 64 on windows of 16 characters',
    ),
    "shakespeare": Preset(
        name="shakespeare",
        model=config.shakespeare,
        train=shakespeare(),
        text=data.shakespeare,
        help="Tiny Shakespeare: 3 epochs over all windows of 64 characters of its first 30 %",
    ),
}


def preset(name: str) -> Preset:
    """The preset of that name. Raises ConfigError that names the known ones where there is none."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
