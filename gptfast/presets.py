"""The course's two runs, ready-made: a model's shape, a training, and a text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from gptfast import data
from gptfast.config import GPTConfig, TrainConfig
from gptfast.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """All that a run needs: the model's shape, the training, and the text."""

    name: str
    model: GPTConfig
    train: TrainConfig
    text: Callable[[], str] | None = None  # returns the text; None: the user gives one
    help: str = ""

    def override(self, overrides: Mapping[str, Any]) -> "Preset":
        """Returns this preset with other values in some fields of its two configs.

        Args:
            overrides: Values by the name of a field of GPTConfig or TrainConfig.

        Raises:
            ConfigError: Neither config has such a field, or a config refuses the values.
        """
        of_model = {field.name for field in fields(GPTConfig)}
        of_train = {field.name for field in fields(TrainConfig)}
        for name in sorted(overrides.keys() - of_model - of_train):
            raise ConfigError(
                f"there is no option {name!r}; the model has {', '.join(sorted(of_model))}; "
                f"training has {', '.join(sorted(of_train))}"
            )
        return replace(
            self,
            model=replace(self.model, **{k: v for k, v in overrides.items() if k in of_model}),
            train=replace(self.train, **{k: v for k, v in overrides.items() if k in of_train}),
        )


PRESETS = {
    "abc": Preset(
        name="abc",
        model=GPTConfig(block_size=16),
        train=TrainConfig(lr=3e-3, steps=400, eval_every=100, eval_tokens=20_000, val_fraction=0.2),
        text=data.abc_corpus,
        help='the "ABC" language: 400 steps of batch 64 on windows of 16 characters',
    ),
    "shakespeare": Preset(
        name="shakespeare",
        model=GPTConfig(block_size=64),
        train=TrainConfig(
            lr=1e-3, clip=1.0, epochs=3, eval_every=500, text_fraction=0.3, val_fraction=0.1
        ),
        text=data.shakespeare,
        help="Tiny Shakespeare: 3 epochs over all windows of 64 characters of its first 30 %",
    ),
}


def preset(name: str) -> Preset:
    """Returns the preset of that name.

    Raises:
        ConfigError: There is none; the error names those that there are.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
