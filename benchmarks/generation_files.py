"""A gptfast model as the files that other engines load: one way for all rows and contenders.

Conversion is not timed.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gptfast import GPT
from gptfast.ops.reference import LAYER_NORM_EPS


def write_huggingface(model: GPT, folder: Path) -> None:
    """Writes config.json and model.safetensors, as transformers' GPT-2 has them."""
    from transformers import GPT2Config, GPT2LMHeadModel, utils

    utils.logging.disable_progress_bar()
    c = model.config
    config = GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        activation_function="gelu_new" if c.gelu == "tanh" else "gelu",
        tie_word_embeddings=c.tie_weights,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    other = GPT2LMHeadModel(config)
    weights = {}
    for name, weight in model.state_dict().items():
        transposed = name.endswith("weight") and (".c_" in name)  # Conv1D stores (K, N)
        place = name if name.startswith("lm_head") else f"transformer.{name}"
        weights[place] = weight.t().contiguous() if transposed else weight
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected and not [name for name in missing if "attn.bias" not in name]
    other.save_pretrained(folder)


def write_ctranslate2(model: GPT, folder: Path, compute_type: str) -> None:
    """Writes the folder of a CTranslate2 model whose tokens are ids as text.

    CTranslate2 converts the files of `write_huggingface`.
    """
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            names = {str(i): i for i in range(model.config.vocab_size)}
            return SimpleNamespace(
                get_vocab=lambda: names, bos_token="0", eos_token="0", unk_token="0"
            )

    source = folder / "huggingface"
    write_huggingface(model, source)
    Converter(str(source)).convert(str(folder), quantization=compute_type, force=True)


def write_llama_cpp(model: GPT, path: Path, kind: str) -> None:
    """Writes what llama.cpp loads, quantised by it; `kind` of its matrices is F32, BF16 or Q8_0."""
    import llama_cpp

    if kind == "F32":
        write_gguf(model, path)
        return
    exact = path.with_stem("exact")
    write_gguf(model, exact)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    code = llama_cpp.llama_model_quantize(str(exact).encode(), str(path).encode(), params)
    assert code == 0, f"llama_model_quantize returns {code}"


def write_gguf(model: GPT, path: Path) -> None:
    """Writes a GGUF file in float32."""
    import gguf

    c = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(LAYER_NORM_EPS)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("none")
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, c.n_layer)
    for name, weight in model.state_dict().items():
        head = name == "lm_head.weight"
        if head and c.tie_weights:
            continue
        place = names.get_name(name if head else f"transformer.{name}", (".weight", ".bias"))
        writer.add_tensor(place, weight.numpy())
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
