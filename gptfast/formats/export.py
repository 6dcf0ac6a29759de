"""`export`: a model in the format of another project."""

from pathlib import Path

from torch import nn

from gptfast import checkpoint
from gptfast.checks import check_path
from gptfast.errors import CheckpointError, ConfigError
from gptfast.formats import gguf, huggingface, nanogpt
from gptfast.model import unwrapped
from gptfast.storable import check_storable
from gptfast.tokenizer import Tokenizer, check_kept

WRITERS = {"hf": huggingface.write, "gguf": gguf.write, "nanogpt": nanogpt.write}


def export(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    path: str | Path,
    to: str = "hf",
    *,
    overwrite: bool = False,
) -> None:
    """Writes a model for another project; a warning says what is rounded otherwise there.

    Args:
        model: A GPT, also within `torch.compile` or DistributedDataParallel.
        tokenizer: Written with the model; None writes none.
        path: A folder, made if missing; for "gguf" also a file that ends in .gguf.
        to: "hf" for Hugging Face's transformers, "gguf" for llama.cpp (needs the package gguf) or
            "nanogpt".
        overwrite: Write to a folder that is not empty, or over the file. Other files stay.

    Raises:
        ConfigError: `to` is unknown, there is no GPT in `model`, the tokenizer is of another class
            than gptfast's, the path is taken, or a package is missing.
        CheckpointError: The format cannot hold the model or the tokenizer; modules were replaced or
            changed; the tokenizer has more ids than the model; a file cannot be written.
    """
    path, model = check_path("path", path), unwrapped(model)
    check_target(path, to, overwrite)
    check_storable(model)
    check_kept(tokenizer)
    checkpoint.check_vocabulary(model.config, tokenizer, path)
    try:
        WRITERS[to](model, tokenizer, path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: the model could not be exported ({error.strerror or f'{error}: is it full?'})"
        ) from error


def check_target(path: Path, to: str, overwrite: bool) -> None:
    """Raises ConfigError if a model may not be exported to a path; changes nothing."""
    if not isinstance(to, str) or to not in WRITERS:
        raise ConfigError(f"to must be one of {', '.join(WRITERS)}, got {to!r}")
    if to == "gguf" and path.suffix == gguf.SUFFIX:
        if path.is_dir():
            raise ConfigError(f"{path}: expected a file, got a folder")
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists: choose another file, or say overwrite")
        return
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: expected a folder, got a file")
    if checkpoint.is_checkpoint(path):
        raise ConfigError(f"{path} holds a checkpoint of gptfast: choose another folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ConfigError(f"{path} is not empty: choose another folder, or say overwrite")
