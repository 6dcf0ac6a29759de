"""The checkpoints of nanoGPT (https://github.com/karpathy/nanoGPT): `ckpt.pt` and `meta.pkl`.

Its model has GPT-2's names, GELU by the error function, a head that is tied to the embedding, and
no padding. `meta.pkl` has the characters of its data set, whose first has id 0; a model without it
reads GPT-2's tokens, which `BPETokenizer.load("gpt2")` makes. Versions before June 2023
had the tanh approximation of GELU, and their checkpoints do not say so: they are read with the
exact one.
"""

import hashlib
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gptfast.bpe import BPETokenizer
from gptfast.bpe_files import BYTE_SYMBOLS, END_OF_TEXT
from gptfast.config import GPTConfig
from gptfast.errors import CheckpointError, ConfigError, DataError
from gptfast.files import write_atomic
from gptfast.formats import huggingface_config
from gptfast.formats.weight_files import own_names, read_plain, read_torch
from gptfast.integrity import reading
from gptfast.model import EMBEDDING, GPT, HEAD
from gptfast.storable import assembled, stored_config, stored_tensors
from gptfast.tokenizer import CharTokenizer, Tokenizer

CHECKPOINT_NAME = "ckpt.pt"
META_NAME = "meta.pkl"

# nanoGPT's defaults, which a checkpoint of it holds before the first step.
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 6e-4, (0.9, 0.95), 1e-8, 0.1
BEST_VAL_LOSS = 1e9

_SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
_DEFAULTS = {"bias": True, "dropout": 0.0}  # of checkpoints that are older than these arguments
_GPT2_MERGES = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # its sha256


def read(path: str | Path) -> tuple[GPT, Tokenizer | None]:
    """Reads a checkpoint of nanoGPT.

    Args:
        path: `ckpt.pt`, or the folder with it. `meta.pkl` is looked for beside it, then where
            nanoGPT has it: in the folder that the checkpoint names, `../data/<dataset>`.

    Returns:
        The model, in evaluation mode, with nanoGPT's logits for nanoGPT's ids; and its tokenizer of
        characters, None without `meta.pkl`.

    Raises:
        CheckpointError: The file is missing, damaged, not nanoGPT's, or of a variant of nanoGPT.
    """
    path = Path(path)
    file = path / CHECKPOINT_NAME if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    content = read_torch(file)
    if not _has_parts(content):
        raise CheckpointError(f"{file}: not nanoGPT's checkpoint, it has no model and model_args")
    with reading(file):
        config, tensors = _config(content["model_args"], file), _tensors(content["model"], file)
        head, table = tensors.get(HEAD), tensors.get(EMBEDDING)
        if isinstance(head, Tensor) and isinstance(table, Tensor) and torch.equal(head, table):
            tensors[HEAD] = table
            config = replace(config, tie_weights=True)
    model = assembled(config, tensors, file).eval()
    meta = _meta_of(file, content.get("config"))
    return model, None if meta is None else _tokenizer(meta, model.config.vocab_size)


def _has_parts(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(content.get(name), dict) for name in ("model", "model_args")
    )


def _config(model_args: dict[str, Any], file: Path) -> GPTConfig:
    missing = [name for name in _SIZES if model_args.get(name) is None]
    others = sorted(map(str, model_args.keys() - {*_SIZES, *_DEFAULTS}))
    if missing or others:
        problem = f"lack {missing[0]!r}" if missing else f"have {others[0]!r}, which it has not"
        raise CheckpointError(f"{file}: not a model of nanoGPT's: its model_args {problem}")
    try:
        return GPTConfig(
            **_DEFAULTS | model_args, attn_proj_dropout=True, padding_idx=None, init="gpt2"
        )
    except ConfigError as error:
        raise CheckpointError(f"{file}: its model_args are not valid: {error}") from error


def _tensors(weights: dict[str, Any], file: Path) -> dict[str, Any]:
    """The weights by our names, copied from the file."""
    return {
        name: weight.clone() if isinstance(weight, Tensor) else weight
        for name, weight in own_names(file, weights).items()
    }


def _meta_of(file: Path, config: Any) -> Path | None:
    """Where the characters of a checkpoint's data set are, if anywhere."""
    beside = file.with_name(META_NAME)
    if beside.is_file():
        return beside
    dataset = config.get("dataset") if isinstance(config, dict) else None
    if not isinstance(dataset, str) or dataset != Path(dataset).name:
        return None
    own = file.absolute().parent.parent / "data" / dataset / META_NAME
    try:
        return own if own.is_file() else None
    except (OSError, ValueError):  # of a name that no file can have
        return None


def _tokenizer(file: Path, vocab_size: int) -> CharTokenizer:
    meta = read_plain(file)
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if not isinstance(itos, dict) or set(itos) != set(range(len(itos))):
        raise CheckpointError(f"{file}: expected a dict with 'itos', a text for each id from 0 on")
    if len(itos) != vocab_size:
        raise CheckpointError(
            f"{file}: it has {len(itos)} ids, and the model's vocab_size is {vocab_size}: "
            "remove the file to read the model without a tokenizer"
        )
    texts = [itos[i] for i in range(len(itos))]
    while texts and texts[-1] == "":  # ids that the model has beyond the vocabulary
        texts.pop()
    padded = texts[:1] == [""]
    try:
        tokenizer = CharTokenizer(tuple(texts[int(padded) :]), padded)
    except DataError as error:
        raise CheckpointError(f"{file}: its ids are not those of characters: {error}") from error
    if meta.get("stoi") != _stoi(tokenizer):
        raise CheckpointError(f"{file}: 'stoi' is not the inverse of 'itos'")
    return tokenizer


def _stoi(tokenizer: CharTokenizer) -> dict[str, int]:
    return {char: i for i, char in enumerate(tokenizer.chars, int(tokenizer.padded))}


def write(model: GPT, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Writes `ckpt.pt` for nanoGPT's `sample.py` and `train.py` (with `--init_from=resume`).

    A vocabulary of characters goes into `meta.pkl` beside it, which nanoGPT reads from
    `data/<name of the folder>/meta.pkl`. The checkpoint has nanoGPT's optimizer as it is before the
    first step, at nanoGPT's defaults; `train.py` takes dropout, which it also has after
    `attn.c_proj`, from its own options.

    Args:
        model: Of plain layers, see `gptfast.export`.
        tokenizer: Of characters, or GPT-2's, which nanoGPT has itself; None writes none.
        folder: Made if missing.

    Raises:
        CheckpointError: There is no such model or tokenizer in nanoGPT, or the folder has the
            characters of another one, or a model of Hugging Face, which readers would take for it.
        OSError: A file cannot be written.
    """
    config = stored_config(model)
    _check(config, tokenizer)
    if not isinstance(tokenizer, CharTokenizer) and (folder / META_NAME).exists():
        raise CheckpointError(
            f"{folder}: {META_NAME} is there, which would be taken for the model's: choose another "
            "folder"
        )
    if (folder / huggingface_config.CONFIG_NAME).exists():
        raise CheckpointError(
            f"{folder}: {huggingface_config.CONFIG_NAME} is there, of a model that readers would "
            "take for this one: choose another folder"
        )
    tensors = stored_tensors(model)
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        warnings.warn("nanoGPT rounds float64 weights to float32", stacklevel=3)
    if tokenizer is None:
        warnings.warn(
            "without a tokenizer nanoGPT's sample.py takes its texts as GPT-2's tokens",
            stacklevel=3,
        )
    state = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    state[HEAD] = tensors[EMBEDDING]
    content = {
        "model": state,
        "optimizer": _unused_optimizer(tensors),
        "model_args": {name: getattr(config, name) for name in (*_SIZES, *_DEFAULTS)},
        "iter_num": 0,
        "best_val_loss": BEST_VAL_LOSS,
        "config": {},
    }
    files: dict[Path, Any] = {}

    def checkpoint(file: BinaryIO) -> None:
        torch.save(content, file)

    files[folder / CHECKPOINT_NAME] = checkpoint
    if isinstance(tokenizer, CharTokenizer):
        content["config"] = {"dataset": folder.absolute().name}
        files[folder / META_NAME] = pickle.dumps(_meta(tokenizer, config.vocab_size), protocol=4)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(files, durable=True)


def _check(config: GPTConfig, tokenizer: Tokenizer | None) -> None:
    for holds, what in (
        (
            config.tie_weights,
            "a head of its own: its head shares the embedding's weights, as that of a run with "
            "--model.tie-weights and --model.init gpt2 does",
        ),
        (config.attention, "blocks without attention"),
        (config.gelu == "erf", "the tanh approximation of GELU"),
    ):
        if not holds:
            raise CheckpointError(f"nanoGPT has no models with {what}")
    if isinstance(tokenizer, BPETokenizer) and not is_gpt2(tokenizer):
        raise CheckpointError(
            "nanoGPT has no tokenizers but those of characters and GPT-2's, this is another one"
        )


def _meta(tokenizer: CharTokenizer, vocab_size: int) -> dict[str, Any]:
    # sample.py looks up every id that it draws, so those without a character are there too.
    itos = dict.fromkeys(range(vocab_size), "")
    stoi = _stoi(tokenizer)
    return {
        "vocab_size": vocab_size,
        "itos": itos | {i: char for char, i in stoi.items()},
        "stoi": stoi,
    }


def _unused_optimizer(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The state of AdamW before its first step, with nanoGPT's groups: matrices and vectors.

    torch completes the groups by its defaults. It is written out here because torch.optim loads
    torch's compiler, which takes seconds.
    """
    matrices = sum(tensor.dim() > 1 for tensor in tensors.values())
    shared = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS}
    groups = [
        shared | {"weight_decay": WEIGHT_DECAY, "params": [*range(matrices)]},
        shared | {"weight_decay": 0.0, "params": [*range(matrices, len(tensors))]},
    ]
    return {"state": {}, "param_groups": groups}


def is_gpt2(tokenizer: BPETokenizer) -> bool:
    """Whether a tokenizer gives GPT-2's ids: those of the bytes, of its merges, of the end."""
    parsed = tokenizer.parsed
    lines = "".join(f"{left} {right}\n" for left, right in parsed.merges)
    if hashlib.sha256(f"#version: 0.2\n{lines}".encode()).hexdigest() != _GPT2_MERGES:
        return False
    symbols = [chr(symbol) for symbol in BYTE_SYMBOLS]
    tokens = [*symbols, *(left + right for left, right in parsed.merges), END_OF_TEXT]
    vocabulary = parsed.vocabulary | parsed.special
    return parsed.by_words and vocabulary == {token: i for i, token in enumerate(tokens)}
