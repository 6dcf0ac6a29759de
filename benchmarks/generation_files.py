"""A gptfast model as the files that other engines load: those of `gptfast export`.

Neither this nor an engine's own conversion is timed.
"""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gptfast import GPT
from gptfast.formats import gguf, huggingface


def write_huggingface(model: GPT, folder: Path) -> None:
    """Writes what transformers loads, and lets it do so without progress bars."""
    from transformers import utils

    utils.logging.disable_progress_bar()
    huggingface.write(model, None, folder)


def write_ctranslate2(model: GPT, folder: Path, compute_type: str) -> None:
    """Writes what CTranslate2 loads, by its converter; its tokens are ids as text."""
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

    exact = path if kind == "F32" else path.with_stem("exact")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its GELU, which the verification allows for
        gguf.write(model, None, exact)
    if exact == path:
        return
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    code = llama_cpp.llama_model_quantize(str(exact).encode(), str(path).encode(), params)
    assert code == 0, f"llama_model_quantize returns {code}"
