"""From a text to a trained model: single steps, whole runs, and the directory that keeps a run."""

from gptfast.config import TrainConfig
from gptfast.presets import PRESETS, Preset, preset
from gptfast.training.distributed import ProcessError, Processes, join
from gptfast.training.evaluation import Evaluation, evaluate
from gptfast.training.loop import TrainError, TrainResult, UnsavedError
from gptfast.training.trainer import Trainer
from gptfast.training.training import held_out, split, train

__all__ = [
    "PRESETS",
    "Evaluation",
    "Preset",
    "ProcessError",
    "Processes",
    "TrainConfig",
    "TrainError",
    "TrainResult",
    "Trainer",
    "UnsavedError",
    "evaluate",
    "held_out",
    "join",
    "preset",
    "split",
    "train",
]
