"""GPT language models trained and sampled fast on ordinary CPUs, by kernels of our own."""

from gptfast import ops
from gptfast.checkpoint import load, save
from gptfast.config import GPTConfig
from gptfast.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    GptfastError,
)
from gptfast.generate import Generation, generate, stream
from gptfast.model import GPT, Intermediates
from gptfast.presets import TrainConfig
from gptfast.tokenizer import CharTokenizer
from gptfast.train import train
from gptfast.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "BackendError",
    "CharTokenizer",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GPTConfig",
    "Generation",
    "GptfastError",
    "Intermediates",
    "TrainConfig",
    "Trainer",
    "generate",
    "load",
    "ops",
    "save",
    "stream",
    "train",
]
