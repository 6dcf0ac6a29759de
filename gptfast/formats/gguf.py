"""GGUF, the files of llama.cpp: a GPT is a model of its architecture gpt2.

llama.cpp computes GELU by the tanh approximation, from a table in float16. It has a bias in every
linear layer and norm: zeros stand for those that a model lacks.
"""

import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.errors import CheckpointError, ConfigError
from gptfast.files import write_atomic
from gptfast.formats.gguf_tokens import Tokens, tokens_of
from gptfast.model import GPT
from gptfast.ops.reference import LAYER_NORM_EPS
from gptfast.storable import stored_config, stored_tensors, with_all_biases
from gptfast.tokenizer import CharTokenizer, Tokenizer

NAME = "model.gguf"
SUFFIX = ".gguf"
ARCHITECTURE = "gpt2"

_NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
_BLOCK_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def file_of(path: Path) -> Path:
    """The file that `write` writes: `path` itself if it ends in .gguf, else one in that folder."""
    return path if path.suffix == SUFFIX else path / NAME


def write(model: GPT, tokenizer: Tokenizer | None, path: Path) -> None:
    """Writes a GGUF file; matrices keep bfloat16 and float16, all else is float32.

    Args:
        model: Of plain layers, see `gptfast.export`.
        tokenizer: Goes into the file; without, llama.cpp takes and gives ids alone.
        path: See `file_of`; folders are made if missing.

    Raises:
        ConfigError: The package gguf is missing.
        CheckpointError: There is no such model or tokenizer in llama.cpp.
        OSError: The file cannot be written.
    """
    library = _library()
    config, tensors = stored_config(model), stored_tensors(model)
    if not config.attention:
        raise CheckpointError("llama.cpp has no models with blocks without attention")
    tokens = None if tokenizer is None else tokens_of(tokenizer, config.vocab_size)
    for holds, warning in (
        (
            config.gelu == "tanh",
            "llama.cpp computes GELU by its tanh approximation, and the model by the error "
            "function: logits will differ slightly",
        ),
        (
            not isinstance(tokenizer, CharTokenizer),
            "llama.cpp leaves out the characters of a text that the tokenizer does not have",
        ),
        (
            all(tensor.dtype != torch.float64 for tensor in tensors.values()),
            "llama.cpp has no float64: such weights are rounded to float32",
        ),
    ):
        if not holds:
            warnings.warn(warning, stacklevel=3)

    def content(opened: BinaryIO) -> None:
        writer = library.GGUFWriter(opened.name, ARCHITECTURE)  # which opens the file by its name
        try:
            _add_sizes(writer, config)
            _add_tokens(writer, tokens)
            _add_tensors(writer, library, with_all_biases(tensors, config))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    file = file_of(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic({file: content}, durable=True)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "writing GGUF needs the package gguf: pip install 'gptfast-kernels[gguf]'"
        ) from None
    return gguf


def _add_sizes(writer: Any, config: GPTConfig) -> None:
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(LAYER_NORM_EPS)
    writer.add_vocab_size(config.vocab_size)


def _add_tokens(writer: Any, tokens: Tokens | None) -> None:
    if tokens is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens.texts)
    writer.add_token_types(tokens.types)
    writer.add_token_merges(tokens.merges)
    writer.add_bos_token_id(tokens.end)  # as of GPT-2
    writer.add_eos_token_id(tokens.end)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _add_tensors(writer: Any, library: Any, tensors: dict[str, Tensor]) -> None:
    types, kinds = library.GGMLQuantizationType, library.LlamaFileType
    halves = {torch.bfloat16: types.BF16, torch.float16: types.F16}
    used = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        matrix = part == "weight" and tensor.dim() == 2 and module != "wpe"
        if matrix and tensor.dtype in halves:
            to = used[tensor.dtype] = halves[tensor.dtype]
            data = tensor.view(torch.uint8).numpy()  # numpy has no bfloat16
            writer.add_tensor(f"{_name(module)}.{part}", data, raw_dtype=to)
        else:
            writer.add_tensor(f"{_name(module)}.{part}", tensor.float().numpy())
    kind = {torch.bfloat16: kinds.MOSTLY_BF16, torch.float16: kinds.MOSTLY_F16}
    writer.add_file_type(kind[next(iter(used))] if used else kinds.ALL_F32)


def _name(module: str) -> str:
    if not module.startswith("h."):
        return _NAMES[module]
    _, layer, inner = module.split(".", 2)
    return f"blk.{layer}.{_BLOCK_NAMES[inner]}"
