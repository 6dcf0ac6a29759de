"""GPT language models trained and sampled fast on ordinary CPUs, by kernels of our own."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptfast import ops
    from gptfast.bpe import BPETokenizer
    from gptfast.checkpoint import save
    from gptfast.config import GPTConfig, TrainConfig
    from gptfast.errors import (
        BackendError,
        CheckpointError,
        ConfigError,
        DataError,
        GptfastError,
    )
    from gptfast.formats import load
    from gptfast.formats.export import export
    from gptfast.generation import Generation, PackedModel, Score, generate, pack, score, stream
    from gptfast.model import GPT, Intermediates
    from gptfast.tokenizer import CharTokenizer, Tokenizer
    from gptfast.training import Callback, Trainer, evaluate, train

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "BPETokenizer",
    "BackendError",
    "Callback",
    "CharTokenizer",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GPTConfig",
    "Generation",
    "GptfastError",
    "Intermediates",
    "PackedModel",
    "Score",
    "TrainConfig",
    "Tokenizer",
    "Trainer",
    "evaluate",
    "export",
    "generate",
    "load",
    "ops",
    "pack",
    "save",
    "score",
    "stream",
    "train",
]

_HOMES = {
    "bpe": ("BPETokenizer",),
    "checkpoint": ("save",),
    "config": ("GPTConfig", "TrainConfig"),
    "errors": ("BackendError", "CheckpointError", "ConfigError", "DataError", "GptfastError"),
    "formats": ("load",),
    "formats.export": ("export",),
    "generation": ("Generation", "PackedModel", "Score", "generate", "pack", "score", "stream"),
    "model": ("GPT", "Intermediates"),
    "tokenizer": ("CharTokenizer", "Tokenizer"),
    "training": ("Callback", "Trainer", "evaluate", "train"),
}
_SUBMODULES = ("data", "lm_eval", "ops", "training")


def __getattr__(name: str) -> Any:
    """Loads a name or module at its first use, so that `gptfast --help` does not wait for torch."""
    if name in _SUBMODULES:
        try:
            return import_module(f"gptfast.{name}")
        except ValueError as error:  # of one whose package is missing
            raise AttributeError(f"gptfast.{name}: {error}") from error
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"gptfast.{home}"), name)
            return value
    raise AttributeError(f"module 'gptfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES} - {"lm_eval"})  # whose package is an extra
