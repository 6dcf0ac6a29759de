"""The directory of a training run, and the state from which an interrupted run goes on.

It holds the last checkpoint (`model.safetensors` and `config.json`: what `gptfast.load` reads),
`history.jsonl` with one JSON object per evaluation, and `training_state.pt`; `best/` has the
checkpoint of the best evaluation so far. `training_state.pt` has all that is needed to go on,
weights and history included, and is replaced in one step: a crash between two files never mixes the
parts of two moments. It ends with its own checksum, which `torch.load` skips. While a run writes
there, `.lock` is locked.

Checkpoint and state have the run's id, drawn at its start. The checkpoint is saved first, so that a
crash leaves one of the state's step or a later one; any other pair was put together by hand.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gptfast import checkpoint
from gptfast.checks import as_int, check_path, dtype_name
from gptfast.config import GPTConfig, TrainConfig
from gptfast.data import as_int64
from gptfast.errors import CheckpointError, ConfigError, reason
from gptfast.files import write_atomic
from gptfast.integrity import load_sealed, reading, save_sealed
from gptfast.lock import LOCK_NAME, locked
from gptfast.model import GPT
from gptfast.run_file import RUN_FILE_NAME
from gptfast.storable import mismatch, stored_config
from gptfast.tokenizer import Tokenizer
from gptfast.training.state import Row, RunState, lines_of, run_state

HISTORY_NAME = "history.jsonl"
STATE_NAME = "training_state.pt"
BEST_NAME = "best"
CHECKPOINT_FILES = (checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME)
FILES = (STATE_NAME, HISTORY_NAME, *CHECKPOINT_FILES)
BEST_FILES = tuple(f"{BEST_NAME}/{name}" for name in CHECKPOINT_FILES)
MACHINE_NAME, SAMPLES_NAME, PLOT_NAME = "machine.json", "samples.jsonl", "loss.png"
OTHER_FILES = (RUN_FILE_NAME, MACHINE_NAME, SAMPLES_NAME, PLOT_NAME)  # of callbacks
FORMAT = "gptfast-training-state"
HASHED_AT_ONCE = 2**17  # tokens
VERSION = 3  # added the best evaluation; 2 the checksum and the run's id; all are still read

# May differ when a run goes on: how long it lasts, what it shows and saves, how it computes. (The
# parts of a batch change the rounding and the dropout masks.)
FREE_FIELDS = (
    *("steps", "epochs", "eval_every", "eval_tokens", "save_every", "save_minutes", "threads"),
    *("graph", "recompute", "parallel", "accumulation_steps", "patience", "sample"),
)


def check(out: str | Path | None, resume: bool = False, overwrite: bool = False) -> None:
    """Checks, without changing anything, that a run may be written to `out`.

    Args:
        out: The run's directory; None for a run that is not written.
        resume: The run in there is to go on.
        overwrite: The run in there, if any, is to be replaced.

    Raises:
        ConfigError: It holds a run and neither is asked for, or it holds none to resume.
        CheckpointError: It cannot be written to.
    """
    if resume and overwrite:
        raise ConfigError("a run can be resumed or overwritten, not both")
    if out is None:
        if resume:
            raise ConfigError("resuming needs the directory of the run (out)")
        return
    path = check_path("out", out)
    existing = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise CheckpointError(
            f"{path}: a run cannot be written there, {existing} is not a directory"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path}: a run cannot be written there, no permission in {existing}")
    if resume and not (path / STATE_NAME).is_file():
        raise ConfigError(f"{path}: there is no run to resume, it has no {STATE_NAME}")
    if not (resume or overwrite) and any((path / name).exists() for name in FILES):
        way = "resume or overwrite"
        if not (path / STATE_NAME).is_file():
            way = f"overwrite (it cannot be resumed, it has no {STATE_NAME})"
        raise ConfigError(f"{path} already holds a run: choose another directory, or say {way}")


class RunDirectory:
    """Writes a run to its directory; with `path` None it writes nothing.

    Args:
        path: The directory.
        writes: False for all but one of several processes.
    """

    def __init__(self, path: str | Path | None, writes: bool = True) -> None:
        self.path = None if path is None else Path(path)
        self._writes = writes
        self.id = secrets.token_hex(8)  # of the run; one that is resumed keeps its own
        self.best_step = 0  # of the evaluation whose weights `best/` has

    @contextmanager
    def opened(self, resume: bool, overwrite: bool) -> Iterator[None]:
        """Makes the directory and keeps other runs out of it, until the end of the `with`.

        The operating system drops the lock of a process that dies. Readers do not need it. On
        Windows, and on file systems without locks, no run is kept out.

        Args:
            resume: As for `check`.
            overwrite: As for `check`.

        Raises:
            ConfigError: Another run is being trained there, or see `check`.
            CheckpointError: The directory cannot be written to.
        """
        check(self.path, resume, overwrite)
        if self.path is None:
            yield
            return
        with ExitStack() as held:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(self.path / LOCK_NAME))
            except BlockingIOError:
                raise ConfigError(f"{self.path}: another run is being trained there") from None
            except OSError as error:
                raise self._unwritable(error) from error
            check(self.path, resume, overwrite)  # again: one that has just ended left a run
            yield

    def start(self, history: list[Row], resume: bool) -> None:
        """Writes the history so far.

        Args:
            history: Rows of the run's earlier part.
            resume: Keep the files of the run that is there; otherwise they are removed.

        Raises:
            CheckpointError: The directory cannot be written to.
        """
        if self.path is None:
            return
        try:
            if not resume:
                for name in (*FILES, *BEST_FILES, *OTHER_FILES):
                    (self.path / name).unlink(missing_ok=True)
            self._write_history(history)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.path}: a run cannot be written there ({reason(error)})")

    def _write_history(self, history: list[Row]) -> None:
        assert self.path is not None
        write_atomic({self.path / HISTORY_NAME: lines_of(history).encode("utf-8")})

    def save(
        self,
        model: GPT,
        tokenizer: Tokenizer | None,
        config: TrainConfig,
        state: RunState,
        resumable: dict[str, Any],
        extra: dict[str, Any],
        result: GPT,
    ) -> None:
        """Writes the checkpoint, the training state and, after them, the history of this moment.

        Args:
            model: The model that is trained, whose weights the training state holds.
            tokenizer: Stored in the checkpoint.
            config: How the run trains.
            state: Where it is.
            resumable: What else `load` must give back: the states of optimizer and generators.
            extra: JSON-able, stored in the checkpoint.
            result: The model of the checkpoint.

        Raises:
            CheckpointError: A file cannot be written; the one that was there before is kept.
        """
        if self.path is None or not self._writes:
            return
        extra = extra | {"run": self.id}
        if state.best_step == state.step > 0:
            checkpoint.save(result, tokenizer, self.path / BEST_NAME, extra=extra)
            self.best_step = state.step
        checkpoint.save(result, tokenizer, self.path, extra=extra)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "run": self.id,
            "model": stored_config(model).to_dict(),
            "train": asdict(config),
            "weights": model.state_dict(),
            "state": asdict(state),
            "resumable": resumable,
        }
        file = self.path / STATE_NAME
        try:
            write_atomic({file: lambda opened: save_sealed(content, opened)}, durable=True)
            file = self.path / HISTORY_NAME
            self._write_history(state.history)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
            raise CheckpointError(
                f"{file}: cannot be written ({getattr(error, 'strerror', None) or error}); "
                "one that was there before is kept"
            ) from error

    def load(
        self, model: GPT, config: TrainConfig
    ) -> tuple[RunState, dict[str, torch.Tensor], dict[str, Any]]:
        """Reads what `save` wrote.

        Args:
            model: A model of the run's shape.
            config: The run's config; only FREE_FIELDS may differ.

        Returns:
            Where the run is, the model's weights, and what `save` was given as `resumable`.

        Raises:
            CheckpointError: The file is damaged, foreign, of a newer version or of another run than
                the checkpoint beside it.
            ConfigError: The run was started with another model or another training.
        """
        assert self.path is not None  # `check` refuses to resume without a directory
        with self.reading_state() as file:
            content = _read_state(file)
            # Fields that the file's version did not have yet take their defaults.
            saved = GPTConfig().to_dict() | content["model"]
            _check_same(self.path, saved, stored_config(model).to_dict())
            _check_same(self.path, asdict(TrainConfig()) | content["train"], asdict(config))
            state = run_state(content["state"], content["version"])
            if content["train"].get("eval_tokens") != config.eval_tokens:
                state.forget_best()  # its loss was measured on other tokens
            if self._best_is_later(state.step):
                state.forget_best()  # a crash came between its successor and this state
            self.best_step = state.best_step
            if content["version"] > 1:
                self.id = content["run"]
                self._check_checkpoint(state.step)
            weights, resumable, own = content["weights"], content["resumable"], model.state_dict()
            problem = mismatch(weights, own) or _other_dtype(weights, own)
            problem = problem or _other_moments(resumable, model)
            if problem:
                raise CheckpointError(f"{file}: does not fit the model: {problem}")
        return state, weights, resumable

    @contextmanager
    def reading_state(self) -> Iterator[Path]:
        """Gives the state's file; what goes wrong inside becomes one sentence about that file."""
        assert self.path is not None
        with reading(self.path / STATE_NAME):
            yield self.path / STATE_NAME

    def _best_is_later(self, step: int) -> bool:
        """Whether `best/` holds an evaluation after this step, which replaced the one before it."""
        assert self.path is not None
        try:
            extra = checkpoint.read_config(self.path / BEST_NAME)["extra"]
        except CheckpointError:  # there is none
            return False
        kept = as_int(extra.get("step")) if isinstance(extra, dict) else None
        return kept is not None and kept > step

    def _check_checkpoint(self, step: int) -> None:
        """Raises CheckpointError unless a save of this run left the checkpoint."""
        assert self.path is not None
        file = self.path / checkpoint.WEIGHTS_NAME
        if not file.exists():
            return
        without = f"without {file.name} the run goes on from {STATE_NAME} alone"
        try:
            extra = checkpoint.read_config(self.path)["extra"]
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {without}") from error
        own = isinstance(extra, dict) and extra.get("run") == self.id
        if not own or extra["step"] < step:
            raise CheckpointError(
                f"{file}: of another run, or of an earlier save, than {STATE_NAME}: put back the "
                f"files of one save; {without}"
            )


def _read_state(file: Path) -> dict[str, Any]:
    with open(file, "rb") as opened:
        content, sealed = load_sealed(opened)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not a training state of gptfast")
    checkpoint.check_version(file, content.get("version"), VERSION)
    if content["version"] > 1 and not sealed:
        raise CheckpointError(f"{file}: the file is damaged (it lacks its checksum)")
    return content


def _other_dtype(found: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> str | None:
    for name, tensor in found.items():
        if tensor.dtype != own[name].dtype:
            return f"{name} is of {dtype_name(tensor.dtype)}, not of {dtype_name(own[name].dtype)}"
    return None


def _other_moments(resumable: dict[str, Any], model: GPT) -> str | None:
    params = dict(model.named_parameters())
    # Version 1 did not note the names.
    names = resumable.get("trained", [name for name in params if params[name].requires_grad])
    held = sum(len(group["params"]) for group in resumable["optimizer"]["param_groups"])
    if held != len(names):
        return f"the optimizer has {held} parameters, the model trains {len(names)}"
    for i, moments in resumable["optimizer"]["state"].items():
        for name, moment in moments.items():
            shape = () if name == "step" else tuple(params[names[i]].shape)
            if tuple(moment.shape) != shape:
                return f"the optimizer's {name} of {names[i]} has shape {tuple(moment.shape)}"
    return None


def fingerprint(*parts: torch.Tensor | None) -> str:
    """The sha256 of token sequences as int64, by which a resumed run recognises its text."""
    sha = hashlib.sha256()
    for part in parts:
        ids = torch.empty(0, dtype=torch.int64) if part is None else part
        sha.update((8 * len(ids)).to_bytes(8, "little"))
        for some in ids.split(HASHED_AT_ONCE):
            sha.update(as_int64(some.cpu()).numpy().tobytes())
    return sha.hexdigest()


def _check_same(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    ends = wanted.get("schedule") in ("cosine", "linear")  # and its rates depend on when
    for name, value in wanted.items():
        # A run by steps and one by epochs draw their windows in different ways.
        other_way = name == "steps" and (value is None) != (saved.get(name) is None)
        other_way |= ends and name in ("steps", "epochs")
        if saved.get(name) != value and (name not in FREE_FIELDS or other_way):
            raise ConfigError(
                f"{path}: the run was started with {name}={saved.get(name)!r} "
                f"and cannot go on with {name}={value!r}"
            )
