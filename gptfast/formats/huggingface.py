"""GPT-2 in the form of Hugging Face: a folder that transformers loads, and how one is read."""

import json
from pathlib import Path

from safetensors.torch import save as to_safetensors

from gptfast.checkpoint import check_vocabulary
from gptfast.config import GPTConfig
from gptfast.errors import CheckpointError
from gptfast.files import Content, write_atomic
from gptfast.formats.huggingface_config import CONFIG_NAME, read_config, special_ids, to_config
from gptfast.formats.huggingface_tokenizer import (
    ADDED_NAME,
    SETTINGS_NAME,
    SPECIAL_NAME,
    VOCABULARY_NAMES,
    read_tokenizer,
    to_files,
)
from gptfast.formats.huggingface_weights import (
    WEIGHTS_NAME,
    WEIGHTS_NAMES,
    read_weights,
    to_weights,
)
from gptfast.model import GPT
from gptfast.storable import stored_config
from gptfast.tokenizer import Tokenizer

__all__ = ["read", "read_config", "read_tokenizer", "write"]

GENERATION_NAME = "generation_config.json"
# Files in a folder that readers take for parts of the model.
NAMES = {
    *(CONFIG_NAME, GENERATION_NAME, SETTINGS_NAME, SPECIAL_NAME, ADDED_NAME),
    *(*WEIGHTS_NAMES, *VOCABULARY_NAMES),
}


def read(folder: Path) -> tuple[GPT, Tokenizer | None]:
    """Reads a folder with a GPT-2, as transformers and the hub have it.

    Its files are `config.json`; `model.safetensors` or `pytorch_model.bin`, or the index of several
    of either; and the tokenizer's, if any: `tokenizer.json`, or `vocab.json` with `merges.txt`.

    Args:
        folder: The folder.

    Returns:
        The model, on the CPU and in the dtype of its weights, and its tokenizer. A model in float16
        computes by plain torch on a CPU: `.float()` makes one for the kernels, and
        `generate(dtype=)` a copy.

    Raises:
        CheckpointError: A file is missing or damaged, parts do not fit each other, or the model
            computes something that a GPT here does not; see `read_config`.
    """
    config = read_config(folder)
    tokenizer = read_tokenizer(folder)
    check_vocabulary(config, tokenizer, folder)
    return read_weights(folder, config), tokenizer


def write(model: GPT, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Writes a model and its tokenizer as a folder of Hugging Face, which `read` reads as well.

    `GPT2LMHeadModel` and `AutoTokenizer` of transformers load it, and compute the same. Biases that
    the model lacks are zeros there. transformers trains with the
    dropout in all three places of GPT-2, so a model without `attn_proj_dropout` gets more dropout
    there than here.

    transformers takes a text that spells a special token for that token, gptfast takes it for text;
    with a CharTokenizer both take it for text.

    Args:
        model: Of plain layers, see `gptfast.export`.
        tokenizer: None writes none.
        folder: Made if missing. A model that this function wrote there is replaced whole.

    Raises:
        CheckpointError: The folder has other parts of a model; or the model or the tokenizer has
            what GPT-2 has not.
        OSError: The files cannot be written, and those from before are still there.
    """
    config = stored_config(model)
    if not config.attention:
        raise CheckpointError(f"{folder}: GPT-2 always has attention, this model has none")
    texts = _texts(model, config, tokenizer)
    _check_folder(folder, {WEIGHTS_NAME, *texts})
    weights = to_safetensors(to_weights(model, config), metadata={"format": "pt"})
    files: dict[Path, Content] = {folder / WEIGHTS_NAME: weights}
    files |= {folder / name: text.encode("utf-8") for name, text in texts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(files, durable=True)


def _texts(gpt: GPT, config: GPTConfig, tokenizer: Tokenizer | None) -> dict[str, str]:
    """All files but the weights."""
    settings = {
        CONFIG_NAME: to_config(config, gpt.main_weight.dtype, tokenizer),
        GENERATION_NAME: special_ids(tokenizer),
    }
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in settings.items()}
    return texts | ({} if tokenizer is None else to_files(tokenizer, config.block_size))


def _check_folder(folder: Path, written: set[str]) -> None:
    """Raises CheckpointError if a folder has files that the new model would mix with."""
    for name in sorted(NAMES - written):
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder}: {name} is there, which readers would take for a part of the model: "
                "choose another folder"
            )
