"""Ready-made runs: a model's shape, a training, and a text."""

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


# What nanoGPT's runs share: no biases, one matrix for embedding and head, no dropout.
_NANOGPT: dict[str, Any] = {
    "dropout": 0.0, "bias": False, "tie_weights": True, "padding_idx": None, "init": "gpt2",
}  # fmt: skip
_NANOGPT_TRAIN: dict[str, Any] = {
    "schedule": "cosine", "clip": 1.0, "weight_decay": 0.1, "decayed": "matrices",
}  # fmt: skip
_SHAKESPEARE = Preset(
    name="shakespeare",
    model=GPTConfig(block_size=64),
    train=TrainConfig(lr=1e-3, clip=1.0, epochs=3, text_fraction=0.3, val_fraction=0.1),
    text=data.shakespeare,
    help="the course's first exercise: 3 epochs over all windows of 64 characters of the first 30 %"
    " of Tiny Shakespeare",
)
_PRESETS = (
    Preset(
        name="abc",
        model=GPTConfig(block_size=16),
        train=TrainConfig(lr=3e-3, steps=400, eval_every=100, eval_tokens=20_000, val_fraction=0.2),
        text=data.abc_corpus,
        help='the "ABC" language: 400 steps of batch 64 on windows of 16 characters',
    ),
    _SHAKESPEARE,
    replace(
        _SHAKESPEARE,
        name="shakespeare-no-attention",
        model=replace(_SHAKESPEARE.model, attention=False),
        help="its second exercise: the same without attention",
    ),
    Preset(
        name="shakespeare-gpt4r",
        model=GPTConfig(block_size=256, n_layer=6, n_head=6, n_embd=384),
        train=TrainConfig(lr=1e-3, clip=1.0, steps=2500, eval_every=500),
        text=data.shakespeare,
        help="GPT4R's model of 10.8 million parameters: 2,500 steps of batch 64 on windows of 256",
    ),
    Preset(
        name="shakespeare-cpu",
        model=GPTConfig(**_NANOGPT, block_size=64, n_layer=4, n_head=4, n_embd=128),
        train=TrainConfig(
            **_NANOGPT_TRAIN,
            lr=1e-3,
            warmup_steps=100,
            min_lr=1e-4,
            betas=(0.9, 0.99),
            batch_size=12,
            steps=2000,
            eval_every=250,
        ),
        text=data.shakespeare,
        help="nanoGPT's run for a CPU: 2,000 steps of batch 12, to a held-out loss of 1.91",
    ),
    Preset(
        name="gpt2",
        # 50,257 tokens, rounded up to a multiple of 64
        model=GPTConfig(
            **_NANOGPT, block_size=1024, vocab_size=50_304, n_layer=12, n_head=12, n_embd=768
        ),
        train=TrainConfig(
            **_NANOGPT_TRAIN,
            lr=6e-4,
            warmup_steps=2000,
            min_lr=6e-5,
            betas=(0.9, 0.95),
            batch_size=480,
            accumulation_steps=40,
            steps=600_000,
            eval_every=1000,
            eval_tokens=200 * 12 * 1024,
            precision="bf16",
            val_fraction=0.0005,
        ),
        help="GPT-2, 124 million parameters, by nanoGPT's schedule on a token file (--data DIR)",
    ),
)
PRESETS = {preset.name: preset for preset in _PRESETS}


def preset(name: str) -> Preset:
    """Returns the preset of that name.

    Raises:
        ConfigError: There is none; the error names those that there are.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
