"""Checkpoints: a directory with `model.safetensors` and `config.json`.

`model.safetensors` is whole by itself: its metadata hold the same JSON as `config.json` (format,
version, model configuration, tokenizer, extra). So a save takes effect in one step, the atomic
replacement of that file, and weights are never read with the configuration of another save.
`config.json` is the readable copy.

Both files are first written aside and flushed to the disk: whatever fails there (a full disk, a
killed process) leaves the old checkpoint untouched. Then, in this order, the old `config.json` is
removed, the weights are replaced, the new `config.json` is put in place. A crash between these
steps leaves the old or the new weights, at worst without their readable copy, and they load. Two
files that disagree therefore come from an edit or a copy by hand, and are refused.

The files aside have fixed names: what a killed process leaves is overwritten by the next save. One
process at a time may save to a directory.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from gptfast.config import GPTConfig
from gptfast.errors import CheckpointError
from gptfast.model import GPT
from gptfast.ops.select import usable_device
from gptfast.tokenizer import CharTokenizer

FORMAT = "gptfast-checkpoint"
VERSION = 1
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

_METADATA_KEY = "gptfast"


def save(
    model: GPT,
    tokenizer: CharTokenizer | None,
    path: str | Path,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint to the directory `path`; it replaces the old one whole, or not at all.

    Args:
        model: the model; its tensors are stored in their dtype, tied weights once.
        tokenizer: stored with the model; None stores none.
        path: the directory, made if missing; other files in it are left alone.
        extra: JSON-able, kept with the model; `read_config(path)["extra"]` gives it back.

    Raises:
        CheckpointError: if the tokenizer has more ids than the model, or if the files cannot be
            written; a checkpoint that was there before still loads.
        TypeError: if `extra` is not JSON-able.
    """
    path = Path(path)
    _check_vocabulary(model.config, tokenizer, path)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "config": model.config.to_dict(),
        "tokenizer": None if tokenizer is None else tokenizer.to_dict(),
        "extra": {} if extra is None else extra,
    }
    try:
        text = json.dumps(header, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise TypeError(f"save: extra must be JSON-able: {error}") from None
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_weights and name == "lm_head.weight")
    }
    weights = to_safetensors(tensors, metadata={_METADATA_KEY: text})
    try:
        path.mkdir(parents=True, exist_ok=True)
        _replace_pair(path, weights, text.encode("utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: the checkpoint could not be saved ({error.strerror or error}); "
            "one that was there before is kept"
        ) from error


def _replace_pair(path: Path, weights: bytes, config: bytes) -> None:
    new_weights, new_config = path / f"{WEIGHTS_NAME}.tmp", path / f"{CONFIG_NAME}.tmp"
    try:
        _write_synced(new_weights, weights)
        _write_synced(new_config, config)
        (path / CONFIG_NAME).unlink(missing_ok=True)
        os.replace(new_weights, path / WEIGHTS_NAME)
        os.replace(new_config, path / CONFIG_NAME)
    finally:
        new_weights.unlink(missing_ok=True)
        new_config.unlink(missing_ok=True)
    _sync_directory(path)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    # Renames are durable only when the directory is; Windows has no such call.
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, CharTokenizer | None]:
    """Read a checkpoint that `save` wrote.

    Args:
        path: the directory.
        device: where the model goes.

    Returns:
        the model, in evaluation mode and in the dtype it was saved in, and its tokenizer (None if
        it was saved without). The caller's random stream is left as it was.

    Raises:
        ConfigError: if there is no such device.
        CheckpointError: if the checkpoint is missing, damaged, not gptfast's, of another version,
            or if its parts do not fit each other.
    """
    device = usable_device(device)
    file = Path(path) / WEIGHTS_NAME
    header, tensors = _read(Path(path), with_tensors=True)
    try:
        config = GPTConfig.from_dict(header["config"])
        stored = header["tokenizer"]
        tokenizer = None if stored is None else CharTokenizer.from_dict(stored)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the stored configuration is not valid: {error}") from error
    _check_vocabulary(config, tokenizer, file)
    if config.tie_weights and "wte.weight" in tensors:
        tensors["lm_head.weight"] = tensors["wte.weight"]
    with torch.random.fork_rng(devices=[]):
        model = GPT(config)
    _check_tensors(model.state_dict(), tensors, file)
    model.to(tensors["wte.weight"].dtype).load_state_dict(tensors)
    return model.to(device).eval(), tokenizer


def read_config(path: str | Path) -> dict[str, Any]:
    """Read what is stored beside the weights: `format`, `version`, `config`, `tokenizer`, `extra`.

    Args:
        path: the checkpoint's directory.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged, not gptfast's or of another version,
            or if `config.json` is not the one that was saved with the weights.
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
    try:
        # Opened once: header and tensors stay one save's even if another one replaces the file.
        with safe_open(file, framework="pt") as opened:
            header = _check_header(file, opened.metadata() or {})
            _check_copy(path / CONFIG_NAME, header)
            names = opened.keys() if with_tensors else ()
            return header, {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: the file is damaged or unreadable ({error})") from error


def _check_header(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    header = _parse(file, metadata.get(_METADATA_KEY, "null"))
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(
            f"{file}: not a gptfast checkpoint (its metadata name another format)"
        )
    if header.get("version") != VERSION:
        raise CheckpointError(
            f"{file}: expected checkpoint version {VERSION}, got {header.get('version')!r}"
        )
    missing = [key for key in ("config", "tokenizer", "extra") if key not in header]
    if missing:
        raise CheckpointError(f"{file}: the file is damaged (its metadata lack {missing[0]!r})")
    return header


def _check_copy(file: Path, header: dict[str, Any]) -> None:
    if not file.exists():
        return
    copy = _parse(file, file.read_bytes())
    # As text, because a NaN in `extra` is not equal to itself.
    if json.dumps(copy, sort_keys=True) != json.dumps(header, sort_keys=True):
        raise CheckpointError(
            f"{file}: not the configuration that {WEIGHTS_NAME} was saved with; "
            "remove it to use the copy inside that file"
        )


def _parse(file: Path, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file}: the file is damaged (not JSON: {error})") from error


def _check_tensors(
    expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], file: Path
) -> None:
    for names, problem in (
        (sorted(expected.keys() - found.keys()), "lacks"),
        (sorted(found.keys() - expected.keys()), "has unexpected"),
    ):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{file}: does not fit its configuration: {problem} {names[0]}{others}"
            )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{file}: does not fit its configuration: {name} has shape "
                f"{tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
            )


def _check_vocabulary(config: GPTConfig, tokenizer: CharTokenizer | None, path: Path) -> None:
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, "
            f"more than the model's vocab_size {config.vocab_size}"
        )
