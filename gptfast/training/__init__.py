"""From a text to a trained model: single steps, whole runs, and the directory that keeps a run."""

from gptfast.config import TrainConfig
from gptfast.presets import PRESETS, Preset, preset
from gptfast.training.callbacks import Callback
from gptfast.training.distributed import ProcessError, Processes, join
from gptfast.training.evaluation import Evaluation, evaluate
from gptfast.training.loop import Loop, TrainError, UnsavedError
from gptfast.training.result import TrainResult
from gptfast.training.state import Row
from gptfast.training.trainer import Trainer
from gptfast.training.training import held_out, split, train
from gptfast.training.watching.sampler import Sampler
from gptfast.training.watching.tensorboard import TensorBoard
from gptfast.training.watching.tracker import Tracker
from gptfast.training.watching.wandb import WandB

__all__ = [
    "PRESETS",
    "Callback",
    "Evaluation",
    "Loop",
    "Preset",
    "ProcessError",
    "Processes",
    "Row",
    "Sampler",
    "TensorBoard",
    "TrainConfig",
    "TrainError",
    "TrainResult",
    "Tracker",
    "Trainer",
    "UnsavedError",
    "WandB",
    "evaluate",
    "held_out",
    "join",
    "preset",
    "split",
    "train",
]
