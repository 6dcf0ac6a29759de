"""The loop of a training run: steps, evaluations and saves, for a new or a resumed run."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptfast import data
from gptfast.config import TrainConfig
from gptfast.console import say
from gptfast.errors import CheckpointError, ConfigError, GptfastError
from gptfast.model import GPT
from gptfast.tokenizer import Tokenizer
from gptfast.training import run
from gptfast.training.callbacks import Callback
from gptfast.training.distributed import Agreed
from gptfast.training.result import TrainResult
from gptfast.training.run import RunDirectory
from gptfast.training.sharding import load_whole, local, parts_of_state
from gptfast.training.state import Row, RunState

if TYPE_CHECKING:
    from gptfast.training.trainer import Trainer


class TrainError(GptfastError):
    """Training cannot continue: the loss or a weight is not finite."""


class UnsavedError(CheckpointError):
    """The last save of a run failed. The files of the previous save, if any, are kept.

    Attributes:
        result: What `fit` would have returned, with the trained model.
    """

    def __init__(self, message: str, result: TrainResult) -> None:
        super().__init__(message)
        self.result = result


class Later:
    """A number that the device computes, for the host to read later.

    Args:
        value: () float32.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self._copied = (
            torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None
        )

    def value(self) -> float:
        """Waits for the number."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.item()


class Loop:
    """One call of `Trainer.fit`: the state of the run and the code that advances it."""

    def __init__(
        self,
        trainer: "Trainer",
        directory: RunDirectory,
        train_ids: Tensor,
        val_ids: Tensor | None,
        tokenizer: Tokenizer | None,
        extra: dict[str, Any],
        callbacks: Sequence[Callback] = (),
        shown: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        config = trainer.config
        self.trainer, self.config, self.directory = trainer, config, directory
        self.processes = trainer.processes
        self.agreed = Agreed()  # as of the step that was counted last
        self.tokenizer, self.extra, self.val_ids = tokenizer, extra, val_ids
        self.text = fingerprint or run.fingerprint(train_ids, val_ids)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.epoch_start = self.generator.get_state()
        self.windows = data.EpochWindows(
            data.placed(train_ids, trainer.device),
            trainer.gpt.config.block_size,
            config.batch_size,
            self.generator,
        )
        self.state = RunState()
        self.pending: tuple[Later, int] | None = None  # the last step's loss and tokens
        self.loss = math.nan  # of the step that was counted last
        self.callbacks, self.shown = callbacks if self.processes.first else (), shown
        self.error: BaseException | None = None  # what ended the run before its time
        self.clock = 0.0  # the moment up to which the steps' time has been counted
        self.saved_at = time.monotonic()
        self.has_checkpoint = False  # whether the directory contains a checkpoint of this run
        self.stopped = False  # whether `stop` was called
        self.best_before = RunState().best  # as it was before the last evaluation
        # Returns the signal received, if any.
        self.received_signal: Callable[[], int | None] = lambda: None
        per_epoch = len(self.windows)
        self.total = trainer.total_steps = config.steps or per_epoch * (config.epochs or 0)
        self.eval_every = config.eval_every or (self.total if config.steps else per_epoch)

    @property
    def model(self) -> GPT:
        """The model that is evaluated and saved; with `ema`, the one with the mean weights."""
        return self.trainer.averaged

    @property
    def path(self) -> Path | None:
        """The run's directory."""
        return self.directory.path

    def stop(self) -> None:
        """Ends the run after the current step, as a finished one; for callbacks."""
        self.stopped = True

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run before its last step."""
        return self.state.step < self.total and not self._is_stopped()

    def warn(self, message: str) -> None:
        """Warns on stderr where the run is shown there, else by Python's `warnings`."""
        if self.shown:
            say(f"warning: {message}")
        else:
            warnings.warn(message, stacklevel=2)

    def result(self) -> TrainResult:
        """Returns the result of `Trainer.fit`."""
        state, signal, interrupted = self.state, self._signal(), self.interrupted
        best = next((row for row in state.history if row["step"] == state.best_step), None)
        return TrainResult(
            self.model.eval(), self.tokenizer, state.history, interrupted, signal, best
        )

    def _is_stopped(self) -> bool:
        """Whether a callback or `patience` ends the run early."""
        patience = self.config.patience
        stopped = self.stopped if self.processes.size == 1 else self.agreed.stopped
        return stopped or patience is not None and self.state.not_better >= patience

    def _signal(self) -> int | None:
        """The signal that ends the run; with several processes, the one that all agreed on."""
        return self.received_signal() if self.processes.size == 1 else self.agreed.signal

    def train(self) -> None:
        """Trains until the last step, or until the end of the step in which a signal arrives."""
        self._gather_for_callbacks()
        with ExitStack() as begun:
            try:
                for callback in self.callbacks:
                    callback.on_start(self)
                    begun.callback(callback.on_end, self)
                self._train()
            except BaseException as error:
                self.error = error
                raise

    def _train(self) -> None:
        step = self.state.step
        batches = self._batches()
        last = step >= self.total or self._is_stopped()
        if last:
            self._save(last)
        self.saved_at = time.monotonic()
        self.clock = time.perf_counter()
        while not last:
            starts = next(batches)
            loss = self.trainer.step_at(self.windows.ids, starts)
            step += 1
            self._count()
            self.pending = Later(loss), len(starts) * self.windows.block_size
            row = None
            if step == self.total or step % self.eval_every == 0:
                self._count()
                row = self._evaluate()
            last = step == self.total or self._is_stopped() or self._signal() is not None
            waited = self._waited() if self.processes.size == 1 else self.agreed.waited
            if row or last or _is_due(self.config, step, waited):
                self._count()
                self._save(last)
                self.saved_at, self.agreed = time.monotonic(), replace(self.agreed, waited=0.0)
                self.clock = time.perf_counter()

    def _waited(self) -> float:
        """Seconds since the last save."""
        return time.monotonic() - self.saved_at

    def _gather_for_callbacks(self) -> None:
        """Gathers a sharded model for the callbacks of the first process."""
        if self.trainer.sharded:
            self.trainer.whole_models()

    def _call(self, method: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, method)(self, *arguments)

    def _count(self) -> None:
        """Waits for the step before, whose loss has not been read yet, if there is one.

        The device computes the next step meanwhile, where one has been started.
        """
        if self.pending is None:
            return
        (later, tokens), self.pending = self.pending, None
        self.agreed = self.processes.agreed(
            later.value(), self.received_signal(), self.stopped, self._waited()
        )
        loss, before = self.agreed.loss, self.clock
        self.clock = time.perf_counter()
        self.state.count(loss, tokens, self.clock - before)
        self.loss = loss
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss became {loss}")
        if self.callbacks:
            self._call("on_step")
            self.clock = time.perf_counter()

    def _batches(self) -> Iterator[Tensor]:
        """Yields where the windows of each batch start, from the current step on, endlessly."""
        windows = self.windows
        while self.config.steps is not None:
            yield data.random_starts(
                windows.ids, windows.block_size, windows.batch_size, self.generator
            )
        done = self.state.step % len(windows)
        while True:
            self.epoch_start = self.generator.get_state()
            yield from windows.starts(done)
            done = 0

    def _evaluate(self) -> Row:
        """Evaluates, and appends a row on the steps since the previous one to the history."""
        state, config = self.state, self.config
        self._check_weights()
        result = None
        if self.val_ids is not None:
            last = state.step == self.total
            limit = None if last or config.eval_tokens is None else config.eval_tokens + 1
            result = self.trainer.evaluate(self.val_ids[:limit])
            if not math.isfinite(result.loss):
                raise self._not_finite(f"the held-out loss became {result.loss}")
            compared = result
            if limit is None and config.eval_tokens is not None:  # all compare the same tokens
                compared = self.trainer.evaluate(self.val_ids[: config.eval_tokens + 1])
            self.best_before = state.best
            state.is_best(compared.loss)
        row = {
            "step": state.step,
            "epoch": round(state.step / len(self.windows), 4),
            "train_loss": state.loss_sum / state.loss_steps,
            "val_loss": result.loss if result else None,
            "perplexity": result.perplexity if result else None,
            "tokens_per_s": round(state.row_tokens / state.row_seconds, 1),
            "seconds": round(state.seconds, 3),
            "lr": self.trainer.lr,
        }
        state.end_row(row)
        self._gather_for_callbacks()
        self._call("on_evaluation", row)
        return row

    def _check_weights(self) -> None:
        finite = all(bool(local(param).isfinite().all()) for param in self.trainer.parameters)
        if self.trainer.sharded:
            finite = all(others for [others] in self.processes.gathered(float(finite)))
        if not finite:
            raise self._not_finite("the weights are no longer finite")

    def _not_finite(self, what: str) -> TrainError:
        kept = f"; {self.directory.path} keeps the checkpoint before" if self.has_checkpoint else ""
        return TrainError(
            f"{what} at step {self.state.step}: a lower lr (now {self.config.lr:g}) "
            f"or gradient clipping (clip, now {self.config.clip}) may help{kept}"
        )

    def _save(self, last: bool) -> None:
        """Saves. A failure is reported and training continues, except after the last step."""
        if self.directory.path is None:
            if last:
                self._gather_for_callbacks()  # what `result` gives
            return
        self._check_weights()
        whole = self.trainer.whole()  # all processes take part, and none goes on alone
        state, error = self.state, None
        try:
            self.save(*whole)
        except Exception as raised:
            error = raised
        # The first process alone writes; all must know how many evaluations were not better.
        lost = error is not None and state.best_step == state.step != self.directory.best_step
        if any(others for [others] in self.processes.gathered(float(lost))):
            state.unsaved_best(self.best_before)
        if error is None:
            self.has_checkpoint = True
            self._call("on_save")
            return
        failed = f"the save at step {state.step} failed"
        if last:
            raise UnsavedError(
                f"{failed}, the trained model is in this error's `result`: {error}", self.result()
            ) from error
        self.warn(f"{failed}, training goes on: {error}")

    def save(self, model: GPT, result: GPT, moments: dict[str, Any]) -> None:
        """Writes the checkpoint and the training state from what `Trainer.whole` returned."""
        # `load` draws the order of the epoch again, so it needs the state before that draw. The
        # current state is the right one between two epochs and for random windows.
        between = self.config.steps is not None or self.state.step % len(self.windows) == 0
        resumable = {
            "text": self.text,
            "trained": self.trainer.names,
            "optimizer": moments,
            "dropout": self.trainer.generator.get_state(),
            "windows": self.generator.get_state() if between else self.epoch_start,
        }
        extra = self.extra | {
            "train": asdict(self.config),
            "step": self.state.step,
            "text_sha256": self.text,
        }
        self.directory.save(
            model, self.tokenizer, self.config, self.state, resumable, extra, result
        )

    def load(self) -> None:
        """Restores the state at the time of the last `save`."""
        trainer, path = self.trainer, self.directory.path
        self.state, weights, resumable = self.processes.from_first(
            lambda: self.directory.load(trainer.gpt, self.config)
        )
        with self.directory.reading_state():
            if resumable["text"] != self.text:
                raise ConfigError(f"{path}: the run was started with another text")
            # Earlier versions did not store the names.
            if resumable.get("trained", trainer.names) != trainer.names:
                raise ConfigError(f"{path}: the run was started with other parameters frozen")
            load_whole(trainer.gpt, weights)
            moments = parts_of_state(resumable["optimizer"], trainer.parameters)
            trainer.optimizer.load_state_dict(moments)
            trainer.generator.set_state(resumable["dropout"])
            self.generator.set_state(resumable["windows"])
        if self.state.step > self.total:
            raise ConfigError(
                f"{path}: the run is at step {self.state.step} and cannot end at {self.total}"
            )
        trainer.steps_done = self.state.step
        self.has_checkpoint = True


def _is_due(config: TrainConfig, step: int, waited: float) -> bool:
    """Whether save_every or save_minutes requires a save; the last was `waited` seconds ago."""
    by_steps = config.save_every is not None and step % config.save_every == 0
    return by_steps or config.save_minutes is not None and waited >= 60 * config.save_minutes
