"""GPT-2's `config.json` of Hugging Face and GPTConfig, each made from the other."""

import warnings
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch

from gptfast.checks import dtype_name
from gptfast.config import GPTConfig
from gptfast.errors import CheckpointError, ConfigError
from gptfast.formats.weight_files import read_json
from gptfast.ops.reference import LAYER_NORM_EPS
from gptfast.tokenizer import Tokenizer

CONFIG_NAME = "config.json"

_MODEL_TYPE = "gpt2"
_ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")  # the second lacks the head, which is tied
_GELU = {  # the names of each; within a row they differ in rounding alone
    "tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu_fast"),
    "erf": ("gelu", "gelu_python"),
}
_DEFAULTS: dict[str, Any] = {  # of what a file leaves out
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
}
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_ONLY: dict[str, Any] = {  # what a GPT here computes, and what a file that leaves it out means
    "layer_norm_epsilon": LAYER_NORM_EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "quantization_config": None,
    "auto_map": None,  # the model's own code
}
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
_DROPOUT = 0.1  # where a file leaves it out


def read_config(folder: Path) -> GPTConfig:
    """Reads the shape of a GPT-2 from its `config.json`.

    If the three dropouts of GPT-2 are equal, they become `dropout`, with `attn_proj_dropout`. If
    they differ, `dropout` is 0 and a warning says so: only training would notice.

    Raises:
        CheckpointError: The file is missing or damaged, or describes a model that computes
            something else than a GPT here; the sentence names the field and its value.
    """
    file = folder / CONFIG_NAME
    content = read_json(file)
    _check_kind(file, content)
    found = _DEFAULTS | {_ALIASES.get(name, name): value for name, value in content.items()}
    for name, wanted in _ONLY.items():
        if found.get(name, wanted) != wanted:
            raise _refused(file, name, found[name], repr(wanted))
    try:
        if found["vocab_size"] is None:  # which a GPTConfig may have, but no model
            raise ConfigError("vocab_size must be a positive whole number, got None")
        config = GPTConfig(
            block_size=found["n_positions"],
            vocab_size=found["vocab_size"],
            n_layer=found["n_layer"],
            n_head=found["n_head"],
            n_embd=found["n_embd"],
            dropout=_dropout(file, found),
            attn_proj_dropout=True,
            gelu=_gelu(file, found["activation_function"]),
            tie_weights=found["tie_word_embeddings"],
            padding_idx=None,
            init="gpt2",
        )
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if found.get("n_inner") not in (None, 4 * config.n_embd):
        raise _refused(file, "n_inner", found["n_inner"], f"4 n_embd = {4 * config.n_embd}")
    return config


def _check_kind(file: Path, content: dict[str, Any]) -> None:
    """Raises CheckpointError unless a file describes a GPT-2 that predicts the next token."""
    kind = content.get("model_type")
    if kind != _MODEL_TYPE:
        raise _refused(file, "model_type", kind, repr(_MODEL_TYPE))
    classes = content.get("architectures")
    if classes is not None and classes not in [[each] for each in _ARCHITECTURES]:
        raise _refused(file, "architectures", classes, " or ".join(_ARCHITECTURES))


def _refused(file: Path, name: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(f"{file}: {name} must be {wanted} for gptfast, got {shortened(value)}")


def _gelu(file: Path, activation: Any) -> Any:
    for gelu, names in _GELU.items():
        if activation in names:
            return gelu
    known = ", ".join(name for names in _GELU.values() for name in names)
    raise _refused(file, "activation_function", activation, f"one of {known}")


def _dropout(file: Path, found: dict[str, Any]) -> float:
    values = {name: found.get(name, _DROPOUT) for name in _DROPOUTS}
    dropout = values["resid_pdrop"]
    if all(value == dropout for value in values.values()):
        return dropout
    named = ", ".join(f"{name}={value!r}" for name, value in values.items())
    warnings.warn(
        f"{file}: a GPT has one dropout, and this model three ({named}): it is loaded with "
        "dropout=0, which only training would notice",
        stacklevel=2,
    )
    return 0.0


def to_config(config: GPTConfig, dtype: torch.dtype, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns the content of the `config.json` that describes a model.

    Args:
        config: The model's, with attention.
        dtype: Of its weights.
        tokenizer: Has the ids of the end of a text and of padding; None: there are none.
    """
    return {
        "architectures": [_ARCHITECTURES[0]],
        "model_type": _MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": _GELU[config.gelu][0],
        **dict.fromkeys(_DROPOUTS, config.dropout),
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "tie_word_embeddings": config.tie_weights,
        **special_ids(tokenizer),
        "torch_dtype": dtype_name(dtype),
    }


def special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Returns the ids by which Hugging Face knows where a text begins and ends, and padding.

    None is written where there is none, for GPT-2's own ids are the defaults.
    """
    end = None if tokenizer is None else tokenizer.end_of_text
    padding = None if tokenizer is None else tokenizer.padding
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": padding}
