"""Checkpoints: a directory with `model.safetensors` and `config.json`.

`model.safetensors` is whole by itself: its metadata hold the same JSON as `config.json` (format,
version, model configuration, tokenizer, extra, and the sha256 of the weights and of all this). So a
save takes effect in one step, the atomic replacement of that file, and weights are never read with
the configuration of another save. `config.json` is the readable copy.

`write_atomic` replaces both, the weights first. A crash in between leaves the old or the new
weights, at worst without their readable copy, and they load. Two files that disagree therefore come
from an edit or a copy by hand, and are refused. One process at a time may save to a directory.

Version 2 added the checksums and the tokenizer's code points. Version 1 is still read. The
files hold a byte-pair tokenizer whole: one of 50,000 tokens adds 2 MB to each of the two files.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors

from gptfast.checks import check_path
from gptfast.config import GPTConfig
from gptfast.errors import CheckpointError, ConfigError, reason
from gptfast.files import write_atomic
from gptfast.integrity import digest, reading
from gptfast.model import GPT, unwrapped
from gptfast.ops.select import usable_device
from gptfast.storable import assembled, check_storable, stored_config, stored_tensors
from gptfast.tokenizer import Tokenizer, check_kept
from gptfast.tokenizer import from_dict as tokenizer_from

FORMAT = "gptfast-checkpoint"
VERSION = 2
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

_METADATA_KEY = "gptfast"
_SUM, _WEIGHTS_SUM = "sha256", "weights_sha256"


def save(
    model: torch.nn.Module,
    tokenizer: Tokenizer | None,
    path: str | Path,
    extra: dict[str, Any] | None = None,
) -> None:
    """Writes a checkpoint to the directory `path`; it replaces the old one whole, or not at all.

    Args:
        model: A GPT, also within `torch.compile` or DistributedDataParallel; its tensors are stored
            in their dtype. `tie_weights` is stored as it is now: true where head and embedding
            share one tensor, which is stored once.
        tokenizer: Stored with the model; None stores none.
        path: The directory, made if missing; other files in it are left alone.
        extra: JSON-able, kept with the model; `read_config(path)["extra"]` gives it back.

    Raises:
        ConfigError: There is no GPT in `model`, or the tokenizer is of another class than
            gptfast's and would not come back.
        CheckpointError: The checkpoint would load as another model (modules were replaced or
            changed), the tokenizer has more ids than the model, or the files cannot be written; a
            checkpoint that was there before still loads.
        TypeError: `extra` is not JSON-able.
    """
    path = check_path("path", path)
    model = unwrapped(model)
    check_storable(model)
    check_kept(tokenizer)
    check_vocabulary(model.config, tokenizer, path)
    tensors = stored_tensors(model)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "config": stored_config(model).to_dict(),
        "tokenizer": None if tokenizer is None else tokenizer.to_dict(),
        "extra": {} if extra is None else extra,
        _WEIGHTS_SUM: digest(tensors),
    }
    try:
        header = json.loads(json.dumps(header))  # as readers see it
        text = json.dumps(header | {_SUM: _sum(header)}, indent=2) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"save: extra must be JSON-able: {error}") from None
    weights = to_safetensors(tensors, metadata={_METADATA_KEY: text})
    try:
        path.mkdir(parents=True, exist_ok=True)
        files = {path / WEIGHTS_NAME: weights, path / CONFIG_NAME: text.encode("utf-8")}
        write_atomic(files, durable=True)
    except OSError as error:
        raise CheckpointError(
            f"{path}: the checkpoint could not be saved ({reason(error)}); "
            "one that was there before is kept"
        ) from error


def _sum(header: dict[str, Any]) -> str:
    """The sha256 of a header without this checksum itself, whatever the layout."""
    covered = {name: value for name, value in header.items() if name != _SUM}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode("ascii")).hexdigest()


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer | None]:
    """Reads a checkpoint that `save` wrote.

    Args:
        path: The directory.
        device: Where the model goes.

    Returns:
        The model, in evaluation mode and in the dtype it was saved in, and its tokenizer (None if
        it was saved without). The caller's random stream is left as it was.

    Raises:
        ConfigError: There is no such device.
        CheckpointError: The checkpoint is missing, damaged, not gptfast's, of another version,
            or its parts do not fit each other.
    """
    device = usable_device(device)
    file = Path(path) / WEIGHTS_NAME
    header, tensors = _read(Path(path), with_tensors=True)
    try:
        config = GPTConfig.from_dict(header["config"])
        if config.vocab_size is None:
            raise ConfigError("it has no vocab_size")
        stored = header["tokenizer"]
        tokenizer = None if stored is None else tokenizer_from(stored)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the stored configuration is not valid: {error}") from error
    check_vocabulary(config, tokenizer, file)
    model = assembled(config, tensors, file)
    return model.to(device).eval(), tokenizer


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has a checkpoint. One of its files is enough: the other may be damaged."""
    with suppress(CheckpointError), reading(folder / WEIGHTS_NAME):
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as opened:
            if _METADATA_KEY in (opened.metadata() or {}):
                return True
    with suppress(CheckpointError), reading(folder / CONFIG_NAME):
        content = json.loads((folder / CONFIG_NAME).read_bytes())
        return isinstance(content, dict) and content.get("format") == FORMAT
    return False


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads what lies beside the weights: `format`, `version`, `config`, `tokenizer`, `extra`.

    Args:
        path: The checkpoint's directory.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, not gptfast's or of another version,
            or `config.json` is not the one that was saved with the weights.
    """
    return _read(Path(path), with_tensors=False)[0]


def _read(path: Path, with_tensors: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint directory, got a file")
    file = path / WEIGHTS_NAME
    if not file.is_file():
        raise CheckpointError(f"{path}: not a checkpoint, it has no {WEIGHTS_NAME}")
    while True:
        seen = _identity(file)
        try:
            return _read_file(path, with_tensors)
        except CheckpointError:
            if _identity(file) == seen:
                raise
            # A run in training has saved meanwhile: its config.json came after the weights.


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _read_file(path: Path, with_tensors: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    file = path / WEIGHTS_NAME
    # Opened once: header and tensors stay one save's even if another one replaces the file.
    with reading(file), safe_open(file, framework="pt") as opened:
        header = _check_header(file, opened.metadata() or {})
        _check_copy(path / CONFIG_NAME, header)
        if not with_tensors:
            return header, {}
        # Copies, for the file's own pages would change with it.
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}
    if _WEIGHTS_SUM in header and header[_WEIGHTS_SUM] != digest(tensors):
        raise CheckpointError(f"{file}: the file is damaged (its weights have another checksum)")
    return header, tensors


def _check_header(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    header = _parse(file, metadata.get(_METADATA_KEY, "null"))
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(
            f"{file}: not a gptfast checkpoint (its metadata name another format)"
        )
    check_version(file, header.get("version"), VERSION)
    sums = (_WEIGHTS_SUM, _SUM) if header["version"] > 1 else ()
    missing = [key for key in ("config", "tokenizer", "extra", *sums) if key not in header]
    if missing:
        raise CheckpointError(f"{file}: the file is damaged (its metadata lack {missing[0]!r})")
    if _SUM in header and header[_SUM] != _sum(header):
        raise CheckpointError(f"{file}: the file is damaged (its metadata have another checksum)")
    return header


def check_version(file: Path, version: Any, newest: int) -> None:
    """Raises CheckpointError unless a file's version is one from 1 to the newest that is known."""
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{file}: expected a version from 1 to {newest}, got {version!r}")
    if version > newest:
        raise CheckpointError(
            f"{file}: written by a newer gptfast (version {version} of the format, this one reads "
            f"up to {newest}): update gptfast"
        )


def _check_copy(file: Path, header: dict[str, Any]) -> None:
    with reading(file):
        try:
            copy = _parse(file, file.read_bytes())
        except FileNotFoundError:  # a save that is under way removes it first
            return
    # As text, because a NaN in `extra` is not equal to itself.
    if json.dumps(copy, sort_keys=True) != json.dumps(header, sort_keys=True):
        raise CheckpointError(
            f"{file}: not the configuration that {WEIGHTS_NAME} was saved with; "
            "remove it to use the copy inside that file"
        )


def _parse(file: Path, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the file is damaged (not JSON: {error})") from error


def check_vocabulary(config: GPTConfig, tokenizer: Tokenizer | None, path: Path) -> None:
    """Raises CheckpointError if a tokenizer has ids that the model of this config has not."""
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, "
            f"more than the model's vocab_size {config.vocab_size}"
        )
