"""A whole run from a preset and a text: what `gptfast train` calls."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast import checkpoint, run
from gptfast.data import read_text
from gptfast.errors import ConfigError, DataError
from gptfast.model import GPT, Backend
from gptfast.ops.select import usable_device
from gptfast.presets import PRESETS, Preset, TrainConfig, preset
from gptfast.tokenizer import CharTokenizer
from gptfast.trainer import Evaluation, Trainer, check_lengths, evaluate
from gptfast.training_loop import TrainError, TrainResult, UnsavedError

__all__ = [
    "PRESETS",
    "Evaluation",
    "Preset",
    "TrainConfig",
    "TrainError",
    "TrainResult",
    "Trainer",
    "UnsavedError",
    "evaluate",
    "held_out",
    "preset",
    "split",
    "train",
]


def train(
    chosen: str | Preset,
    out: str | Path | None = None,
    *,
    text: str | None = None,
    data: str | Path | None = None,
    tokenizer: CharTokenizer | None = None,
    backend: Backend = "auto",
    device: str | torch.device = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **overrides: Any,
) -> TrainResult:
    """Trains a new model on a text, for example `train("abc", "runs/abc", steps=200, n_layer=4)`.

    The result depends on the arguments and the thread count alone: initial weights, windows and
    dropout come from `seed`, and the caller's random numbers are left as they were.

    Args:
        chosen: a preset or its name, see PRESETS.
        out: directory of the run; None writes nothing. See `Trainer.fit`.
        text: the text; without it `data`, without both the preset's own.
        data: a UTF-8 text file.
        tokenizer: None makes one of the whole text.
        backend: the model's.
        device: where the model is trained, and stays.
        resume: go on with the interrupted run in `out`, with the text and options of its start.
        overwrite: replace the run in `out`.
        progress: show a progress bar and the evaluations on stderr.
        **overrides: other values for fields of GPTConfig and TrainConfig; `steps` replaces `epochs`
            and the other way round.

    Raises:
        ConfigError: an unknown preset or field, a wrong value, a device that is not there, or an
            `out` that holds another run.
        DataError: the text is missing, empty, or shorter than a window.
        CheckpointError: `out` cannot be written or read.
        TrainError: the loss is no longer finite; the last checkpoint stays.
    """
    recipe = (preset(chosen) if isinstance(chosen, str) else chosen).override(overrides)
    device = usable_device(device)
    run.check(out, resume, overwrite)
    if text is not None and data is not None:
        raise ConfigError("give the text or a file with it, not both")
    # Where the text comes from, for `held_out`; a text that was given is not kept.
    extra = {"preset": recipe.name, "data": None if data is None else str(Path(data).absolute())}
    if text is None:
        text = _text(recipe, data)
    else:
        extra = {"preset": None, "data": None}
    if tokenizer is None:
        tokenizer = CharTokenizer.from_text(text)
    config = recipe.model(tokenizer.vocab_size)
    if config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"vocab_size must be at least the tokenizer's {tokenizer.vocab_size}, "
            f"got {config.vocab_size}"
        )
    train_ids, val_ids = split(tokenizer.encode_tensor(text), recipe.train)
    check_lengths(config.block_size, train_ids, val_ids)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.train.seed)
        model = GPT(config, backend).to(device)
    return Trainer(model, recipe.train).fit(
        train_ids,
        val_ids,
        tokenizer=tokenizer,
        out=out,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        extra=extra,
    )


def split(ids: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor | None]:
    """Cuts a text into the part to train on and the held-out part.

    Args:
        ids: (N,) tokens.
        config: `text_fraction` and `val_fraction` are used.

    Returns:
        Views of `ids`; the second is None where `val_fraction` is 0.
    """
    used = ids[: int(len(ids) * config.text_fraction)]
    if config.val_fraction == 0.0:
        return used, None
    cut = int(len(used) * (1.0 - config.val_fraction))
    return used[:cut], used[cut:]


def held_out(path: str | Path) -> Tensor:
    """Gives the held-out tokens of the run in a directory, as they were in its training.

    Args:
        path: the `out` of a run by `train`.

    Returns:
        (M,) int64.

    Raises:
        CheckpointError: there is no checkpoint, or a damaged one.
        DataError: no text is known, it was not cut in two, or the file holds another one now.
    """
    header = checkpoint.read_config(path)
    extra, tokenizer = header["extra"], header["tokenizer"]
    if tokenizer is None or extra.get("preset") not in PRESETS and extra.get("data") is None:
        raise DataError(f"{path}: it is not known on which text this model was trained: give one")
    text = _text(PRESETS.get(extra["preset"]), extra["data"])
    ids = CharTokenizer.from_dict(tokenizer).encode_tensor(text)
    train_ids, val_ids = split(ids, TrainConfig(**extra["train"]))
    if run.fingerprint(train_ids, val_ids) != extra["text_sha256"]:
        raise DataError(f"{path}: {extra['data']} is no longer the text that it was trained on")
    if val_ids is None:
        raise DataError(f"{path}: nothing of its text was held out: give one")
    return val_ids


def _text(recipe: Preset | None, path: str | Path | None) -> str:
    if path is not None:
        return read_text(path)
    if recipe is None or recipe.text is None:
        raise ConfigError("the preset has no text of its own: give one")
    return recipe.text()
