"""The course's two runs, ready-made: a shape, a training, a text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from gptfast import config, data
from gptfast.config import GPTConfig, TrainConfig
from gptfast.errors import ConfigError


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
