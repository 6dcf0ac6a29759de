"""A whole run from a preset and a text: what `gptfast train` calls."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast import checkpoint, formats
from gptfast.checks import check_is
from gptfast.config import GPTConfig, TrainConfig
from gptfast.data import as_int64
from gptfast.errors import CheckpointError, ConfigError, DataError
from gptfast.model import GPT, Backend
from gptfast.ops.select import usable_device
from gptfast.presets import PRESETS, Preset, preset
from gptfast.tokenizer import PAD_ID, Tokenizer, check_is_tokenizer
from gptfast.tokenizer import from_dict as tokenizer_from
from gptfast.training import run
from gptfast.training.callbacks import Callback
from gptfast.training.distributed import join, own_device
from gptfast.training.result import TrainResult
from gptfast.training.run_file import RunFileWriter, options_of
from gptfast.training.source import source_of_text
from gptfast.training.trainer import Trainer, check_lengths


def train(
    chosen: str | Preset,
    out: str | Path | None = None,
    *,
    text: str | None = None,
    data: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    init_from: str | Path | None = None,
    backend: Backend = "auto",
    device: str | torch.device = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    **overrides: Any,
) -> TrainResult:
    """Trains a new model on a text, for example `train("abc", "runs/abc", steps=200, n_layer=4)`.

    The result depends on the arguments and the thread count alone: initial weights, windows and
    dropout come from `seed`, and the caller's random numbers are left as they were.

    Processes that torchrun has started train one model together. All need the same arguments and
    the same files; the first of them writes, shows and calls callbacks.

    Args:
        chosen: A preset or its name, see PRESETS.
        out: Directory of the run; None writes nothing. See `Trainer.fit`.
        text: The text; None takes `data`, and without either the preset's own text.
        data: A UTF-8 text file, or a folder that `gptfast data prepare` wrote, whose tokens are
            read when they are needed.
        tokenizer: None takes the tokenizer of `init_from`, of the run to resume, or of the folder,
            or makes one of the text's characters.
        init_from: Any model that `gptfast.load` reads by its path alone, from which this run
            starts: it gives weights, shape and tokenizer, `chosen` gives the training. Of the shape
            only `dropout` may have another value. Resuming such a run does not need
            it again.
        backend: The model's backend.
        device: Where the model is trained, and stays.
        resume: Go on with the interrupted run in `out`. Its text and options have to be given
            again. Other options are an error, except for how long the run lasts and what it
            shows, saves and computes by, such as steps, eval_every and threads.
        overwrite: Replace the run in `out`.
        progress: Show a progress bar and the evaluations, on stderr or in the notebook.
        callbacks: What else watches the run.
        **overrides: Other values for fields of GPTConfig and TrainConfig. A preset that has
            `steps` goes by epochs with `steps=None, epochs=2`.

    Raises:
        ConfigError: An unknown preset or field, a wrong value, a device that is not there, an `out`
            that holds another run, or a shape or tokenizer other than that of `init_from`, or a
            tokenizer other than that of the folder `data`.
        DataError: The text is missing, empty, shorter than a window, or has characters that the
            tokenizer lacks.
        CheckpointError: `out` or `init_from` cannot be written or read.
        UnsavedError: The last save failed; the error's `result` has the trained model.
        TrainError: The loss is no longer finite; the last checkpoint stays.
        ProcessError: Another process of the run has ended; the last checkpoint stays.
    """
    recipe = preset(chosen) if isinstance(chosen, str) else chosen
    check_is("chosen", recipe, Preset, "the name of a preset or a Preset")
    check_is_tokenizer(tokenizer)
    callbacks = [*callbacks]
    for each in callbacks:
        if isinstance(each, type) or not hasattr(each, "on_start"):
            check_is("each of callbacks", each, Callback, "a Callback")
    device = usable_device(device)
    own = own_device(device)
    processes = join(own)
    processes.from_first(lambda: run.check(out, resume, overwrite))
    if init_from is not None and out is not None and not resume:
        start = Path(init_from).resolve()
        if Path(out).resolve() in (start, start.parent if start.name == run.BEST_NAME else start):
            raise ConfigError(f"{out}: a run cannot start from the run that it replaces")
    source, noted = source_of(init_from, out if resume else None)
    known = None if source is None else formats.load(source)
    if known is not None:
        recipe = replace(recipe, model=known[0].config)
    recipe = recipe.override(overrides)
    tokens = source_of_text(recipe, text, data)
    given = tokenizer is not None
    if known is None:
        tokenizer = tokenizer or (_tokens_of(out) if resume else None) or tokens.tokenizer()
        draws = torch.Generator().manual_seed(recipe.train.seed)
        model = GPT(_with_vocabulary(recipe.model, tokenizer), backend, generator=draws)
    else:
        model, tokenizer = _prepared(f"{source}", *known, recipe.model, tokenizer)
        model.backend = backend
    train_ids, val_ids = _long_parts(tokens.ids(tokenizer), recipe.train, model.config.block_size)
    fingerprint = tokens.fingerprint(train_ids, val_ids)
    extra = {"preset": tokens.preset, "data": tokens.data, "init_from": noted}
    made_here = known is None and tokenizer.unit != "character"
    options = options_of(recipe, extra, tokens.file is None and (given or made_here))
    options |= {"backend": backend, "device": str(device)}
    del tokens, text  # a text takes memory, and is not needed any more
    return Trainer(model.to(own), recipe.train, processes).fit(
        train_ids,
        val_ids,
        tokenizer=tokenizer,
        out=out,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        callbacks=[RunFileWriter(options), *callbacks],
        extra=extra,
        fingerprint=fingerprint,
    )


def _tokens_of(out: str | Path | None) -> Tokenizer | None:
    """The tokenizer of a run, unless the run's text makes it anew."""
    try:
        stored = None if out is None else checkpoint.read_config(out)["tokenizer"]
    except CheckpointError:  # its training state is enough to go on
        return None
    own = None if stored is None else tokenizer_from(stored)
    return None if own is None or own.unit == "character" else own


def _with_vocabulary(config: GPTConfig, tokenizer: Tokenizer) -> GPTConfig:
    """Returns the config of a model for the tokenizer: its vocab_size where that is None.

    The default padding_idx is the padding of characters, which other tokenizers lack.
    """
    if tokenizer.padding is None and config.padding_idx == PAD_ID:
        config = replace(config, padding_idx=None)
    if config.vocab_size is None:
        return replace(config, vocab_size=tokenizer.vocab_size)
    if config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"vocab_size must be at least the tokenizer's {tokenizer.vocab_size}, "
            f"got {config.vocab_size}"
        )
    return config


def source_of(
    init_from: str | Path | None, resumed: str | Path | None
) -> tuple[str | Path | None, str | None]:
    """Finds the model whose shape and tokenizer a run's model takes.

    A run that started from another model has noted so, and its own checkpoint serves to resume it.

    Args:
        init_from: As for `train`.
        resumed: The directory of the run that is to go on; None for a new run.

    Returns:
        Where that model is, None for one with new weights; and `init_from` as the run notes it, as
        an absolute path or a name of the hub.

    Raises:
        ConfigError: The run to resume was started from another model than `init_from`.
    """
    given = None if init_from is None else formats.absolute(init_from)
    if resumed is None:
        return init_from, given
    try:
        extra = checkpoint.read_config(resumed)["extra"]
    except CheckpointError:  # its training state is enough to go on
        return init_from, given
    noted = extra.get("init_from") if isinstance(extra, dict) else None
    if given not in (None, noted):
        raise ConfigError(
            f"{resumed}: the run was started with init_from={noted!r} "
            f"and cannot go on with init_from={given!r}"
        )
    return None if noted is None else resumed, noted


def _prepared(
    path: str,
    model: GPT,
    stored: Tokenizer | None,
    wanted: GPTConfig,
    tokenizer: Tokenizer | None,
) -> tuple[GPT, Tokenizer]:
    """Returns a model that was read, in float32 at least, and the tokenizer to train it with."""
    if tokenizer is None:
        tokenizer = stored
    if tokenizer is None:
        raise ConfigError(f"{path}: the model has no tokenizer: give the one of its training")
    if stored not in (None, tokenizer) or tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(f"{path}: the model was trained with another tokenizer")
    for name, value in model.config.to_dict().items():
        other = getattr(wanted, name)
        if name != "dropout" and other != value:
            raise ConfigError(
                f"{path}: the model has {name}={value!r} "
                f"and a run from it cannot have {name}={other!r}"
            )
    model.config = wanted
    for param in model.parameters():
        if param.dtype in (torch.bfloat16, torch.float16):
            param.data = param.data.float()  # exact, and what training needs
    return model, tokenizer


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


def _long_parts(ids: Tensor, config: TrainConfig, block_size: int) -> tuple[Tensor, Tensor | None]:
    """Returns the parts of `split`, which must be long enough to train on and to evaluate."""
    parts = split(ids, config)
    try:
        check_lengths(block_size, *parts)
    except DataError as error:
        by = f"text_fraction={config.text_fraction}, val_fraction={config.val_fraction}"
        raise DataError(f"{error}; by {by}") from None
    return parts


def held_out(path: str | Path) -> Tensor:
    """Gives the held-out tokens of the run in a directory, as they were in its training.

    Args:
        path: The `out` of a run by `train`.

    Returns:
        (M,) int64.

    Raises:
        CheckpointError: There is no checkpoint, or a damaged one.
        DataError: No text is known, it was not cut in two, or the file holds another one now.
    """
    return as_int64(held_out_tokens(path))


def held_out_tokens(path: str | Path) -> Tensor:
    """Like `held_out`, but in the smallest dtype and, from a folder of tokens, not read yet."""
    stored = formats.stored_with(path) or {"extra": None, "tokenizer": None}
    extra, tokenizer = stored["extra"], stored["tokenizer"]
    extra = extra if isinstance(extra, dict) else {}
    name, data = extra.get("preset"), extra.get("data")
    recipe = PRESETS.get(name) if isinstance(name, str) else None
    if tokenizer is None or recipe is None and not (isinstance(data, str) and "\0" not in data):
        raise DataError(f"{path}: it is not known on which text this model was trained: give one")
    try:
        config = TrainConfig(**extra["train"])
        fingerprint = extra["text_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: it is not known which part of its text was held out "
            f"({type(error).__name__}: {error}): give a text"
        ) from error
    kept = data is None or not Path(data).exists() or Path(data).is_file() or Path(data).is_dir()
    if not kept:
        raise DataError(f"{path}: its text came by {data}, which cannot be read again: give one")
    tokens = source_of_text(recipe, None, data)
    train_ids, val_ids = split(tokens.ids(tokenizer_from(tokenizer)), config)
    if tokens.fingerprint(train_ids, val_ids) != fingerprint:
        source = name if data is None else data
        raise DataError(f"{path}: {source} is no longer the text that it was trained on")
    if val_ids is None:
        raise DataError(f"{path}: nothing of its text was held out: give one")
    return val_ids
