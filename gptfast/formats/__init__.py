"""Models wherever they come from: `load` finds out whose format a model has, and reads it.

The formats are gptfast's own checkpoints, folders of Hugging Face with a GPT-2, nanoGPT's `ckpt.pt`
and the course's weights. Models on Hugging Face's hub are fetched first.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from gptfast import checkpoint
from gptfast.checks import check_path
from gptfast.config import GPTConfig
from gptfast.errors import CheckpointError, ConfigError
from gptfast.formats import course, huggingface, nanogpt
from gptfast.formats.weight_files import is_safetensors, read_names, read_torch
from gptfast.model import GPT
from gptfast.ops.select import usable_device
from gptfast.tokenizer import Tokenizer
from gptfast.tokenizer import from_dict as tokenizer_from

Format = Literal["gptfast", "huggingface", "nanogpt", "course"]

HUB = "hf:"


def load(
    path: str | Path, device: str | torch.device = "cpu", *, n_head: int | None = None
) -> tuple[GPT, Tokenizer | None]:
    """Reads a model of any format that gptfast knows.

    Args:
        path: A run or a checkpoint of gptfast; a folder of Hugging Face with a GPT-2; nanoGPT's
            `ckpt.pt` or a folder with one; a file with the course's weights; or "hf:OWNER/NAME", or
            "hf:OWNER/NAME@REVISION", for a model on Hugging Face's hub. Nothing but the last ever
            asks the network.
        device: Where the model goes.
        n_head: H of the course's weights, which do not tell it; for them alone.

    Returns:
        The model, in evaluation mode and in the dtype of its file, and its tokenizer (None if there
        is none). The caller's random stream is left as it was.

    Raises:
        ConfigError: There is no such device, `n_head` is missing or has no place here, or a library
            is missing.
        CheckpointError: There is no model, a damaged one, or one that computes something else than
            a GPT here.
    """
    device = usable_device(device)
    place = _located(path)
    found = format_of(place)
    if found != "course" and n_head is not None:
        raise ConfigError(f"{place}: n_head is for the course's weights alone, got {n_head!r}")
    if found == "gptfast":
        return checkpoint.load(place, device)
    model, tokenizer = _read(place, found, n_head)
    return model.to(device).eval(), tokenizer


def config_of(path: str | Path) -> GPTConfig:
    """Reads the shape of a model that `load` reads; raises the same errors."""
    place, found = _found(path)
    if found == "gptfast":
        return GPTConfig.from_dict(checkpoint.read_config(place)["config"])
    if found == "huggingface":
        return huggingface.read_config(place)
    return _read(place, found)[0].config


def tokenizer_of(path: str | Path) -> Tokenizer | None:
    """Reads the tokenizer of a model that `load` reads; raises the same errors."""
    place, found = _found(path)
    if found == "gptfast":
        stored = checkpoint.read_config(place)["tokenizer"]
        return None if stored is None else tokenizer_from(stored)
    if found == "huggingface":
        return huggingface.read_tokenizer(place)
    return None if found == "course" else _read(place, found)[1]


def stored_with(path: str | Path) -> dict[str, Any] | None:
    """Reads what a checkpoint of gptfast holds beside the weights, see `checkpoint.read_config`.

    Returns None for a model of another format that `load` reads, and raises the same errors.
    """
    place, found = _found(path)
    return checkpoint.read_config(place) if found == "gptfast" else None


def names_model(path: str | Path) -> bool:
    """Whether a path looks like that of a model that `load` may read, and not of a tokenizer."""
    place = Path(path)
    names = (checkpoint.WEIGHTS_NAME, checkpoint.CONFIG_NAME, nanogpt.CHECKPOINT_NAME)
    is_file = place.suffix in (".pt", ".safetensors")
    return is_file or _hub_name(path) is not None or any((place / name).is_file() for name in names)


def format_of(place: Path) -> Format:
    """Finds out from the content of a file or folder whose format a model has.

    Raises:
        CheckpointError: It is none that gptfast knows, or is damaged.
    """
    if not place.exists():
        raise CheckpointError(f"{place}: no such checkpoint")
    return _format_of_folder(place) if place.is_dir() else _format_of_file(place)


def _found(path: str | Path) -> tuple[Path, Format]:
    """Returns a model's place and format; fetches weights only of a gptfast checkpoint."""
    place = _located(path, weights=False)
    found = format_of(place)
    return (_located(path) if found == "gptfast" else place), found


def _located(path: str | Path, weights: bool = True) -> Path:
    """Returns the place of a model on this machine, after fetching one on the hub."""
    name = _hub_name(path)
    if name is None:
        return Path(path)
    from gptfast.formats import hub

    return hub.fetch(name, weights)


def absolute(path: str | Path) -> str:
    """Returns the absolute path of a model; a name of the hub stays as it is."""
    name = _hub_name(path)
    return str(Path(path).absolute()) if name is None else f"{HUB}{name}"


def _hub_name(path: str | Path) -> str | None:
    """The name of a model on the hub; None for a path on this machine."""
    place = check_path("a model", path)
    name = path if isinstance(path, str) else place.as_posix()
    return name.removeprefix(HUB) if name.startswith(HUB) else None


def _read(place: Path, found: Format, n_head: int | None = None) -> tuple[GPT, Tokenizer | None]:
    if found == "huggingface":
        return huggingface.read(place)
    if found == "nanogpt":
        return nanogpt.read(place)
    return course.read(place, n_head)


def _format_of_folder(folder: Path) -> Format:
    weights, config = folder / checkpoint.WEIGHTS_NAME, folder / checkpoint.CONFIG_NAME
    if checkpoint.is_checkpoint(folder):
        return "gptfast"
    if config.is_file():
        return "huggingface"
    if (folder / nanogpt.CHECKPOINT_NAME).is_file():
        return "nanogpt"
    if weights.is_file():
        read_names(weights)  # says so if the file is damaged
        raise CheckpointError(
            f"{weights}: not a gptfast checkpoint (its metadata name another format), and no "
            f"{config.name} beside it says what it is"
        )
    raise CheckpointError(
        f"{folder}: not a checkpoint, it has no {weights.name}, and neither {config.name} of "
        f"Hugging Face nor {nanogpt.CHECKPOINT_NAME} of nanoGPT"
    )


def _format_of_file(file: Path) -> Format:
    names: Iterable[Any]
    if is_safetensors(file):
        names = read_names(file)
    else:
        content = read_torch(file)
        names = content if isinstance(content, Mapping) else ()
        if "model_args" in names:
            return "nanogpt"
    if course.OWN in names:
        return "course"
    raise CheckpointError(
        f"{file}: expected {nanogpt.CHECKPOINT_NAME} of nanoGPT, or weights with the course's "
        "names; "
        "checkpoints of gptfast and models of Hugging Face are named by their folders"
    )
