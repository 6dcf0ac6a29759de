"""One training step, the evaluation on held-out text, and the loop of a whole run.

Letters: B batch, T time, N tokens of a text. What a run's directory holds is described in `run.py`.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast import data, run
from gptfast import progress as terminal
from gptfast.errors import ConfigError, DataError, GptfastError
from gptfast.model import GPT
from gptfast.optimizer import AdamW
from gptfast.presets import PRECISIONS, Precision, TrainConfig
from gptfast.run import Row, RunDirectory, RunState
from gptfast.tokenizer import CharTokenizer

EVAL_TOKENS_AT_ONCE = 8192  # bounds the memory of an evaluation
REPORTS_PER_SECOND = 10


class TrainError(GptfastError):
    """A run that cannot go on: its loss or its weights are no longer finite."""


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    loss: float  # mean over the tokens, nats
    perplexity: float  # exp(loss)
    tokens: int  # predicted ones: all but the text's first


@dataclass(frozen=True)
class TrainResult:
    """A run that has ended, or was interrupted."""

    model: GPT  # in evaluation mode
    tokenizer: CharTokenizer | None
    history: list[Row]  # what history.jsonl holds
    interrupted: bool  # by Ctrl-C


@torch.no_grad()
def evaluate(model: GPT, ids: Tensor, precision: Precision = "fp32") -> Evaluation:
    """Computes the mean loss over a text, cut into disjoint windows, without dropout.

    Args:
        model: it is in the mode it was in, training or evaluation, afterwards.
        ids: (N,) int64, at least 2 tokens. Windows are block_size long, the last may be shorter.
        precision: "fp32", or "bf16" for activations in bfloat16.

    Raises:
        ConfigError: an unknown precision.
        DataError: `ids` is not 1-D int64, or has fewer than 2 tokens.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if ids.dim() != 1 or ids.dtype != torch.int64 or len(ids) < 2:
        raise DataError(
            "evaluate: ids must be a 1-D int64 tensor of at least 2 tokens, "
            f"got shape {tuple(ids.shape)} of {str(ids.dtype)[6:]}"
        )
    T, device = model.config.block_size, model.wte.weight.device
    ids = ids.to(device)
    tokens = len(ids) - 1
    whole = tokens // T * T
    rows = max(1, EVAL_TOKENS_AT_ONCE // T)
    batches: list[tuple[Tensor, Tensor]] = []
    if whole:
        xs, ys = ids[:whole].view(-1, T), ids[1 : whole + 1].view(-1, T)
        batches += zip(xs.split(rows), ys.split(rows), strict=True)
    if whole < tokens:
        batches.append((ids[None, whole:-1], ids[None, whole + 1 :]))
    training = model.training
    model.eval()
    try:
        with _autocast(device, precision):
            total = sum(model.loss(x, y).item() * y.numel() for x, y in batches)
    finally:
        model.train(training)
    loss = total / tokens
    # Bounded where the exponential leaves a double: a diverged run can still be written down.
    return Evaluation(loss, math.exp(min(loss, 700.0)), tokens)


def _autocast(device: torch.device, precision: Precision) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def check_lengths(block_size: int, train_ids: Tensor, val_ids: Tensor | None) -> None:
    """Raises DataError where one of a run's two texts is shorter than a window."""
    for part, ids in (("training", train_ids), ("held-out", val_ids)):
        if ids is not None and len(ids) <= block_size:
            raise DataError(
                f"the {part} part of the text is shorter than a window: it has {len(ids)} tokens, "
                f"a window needs {block_size + 1} (block_size {block_size} and the token after it)"
            )


class Trainer:
    """Trains a model by AdamW.

    Random numbers: `step` takes its dropout key from torch's default generator, as the model itself
    does, so `torch.manual_seed` governs it. `fit` seeds that generator with `config.seed` and gives
    it back as it was: a run depends on its arguments alone and leaves the caller's random numbers
    alone. Equal seeds and thread counts give the same bits.

    Args:
        model: with float32 weights, which "bf16" keeps as master weights.
        config: how to train.

    Raises:
        ConfigError: the weights are in half precision.
    """

    def __init__(self, model: GPT, config: TrainConfig) -> None:
        self.model = model
        self.config = config
        self.device = model.wte.weight.device
        dtype = model.wte.weight.dtype
        if dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                "training needs float32 weights (precision='bf16' lowers the activations alone), "
                f"got {str(dtype)[6:]}"
            )
        self.parameters = [param for param in model.parameters() if param.requires_grad]
        self.optimizer = AdamW(
            self.parameters,
            fused_kernel=model.backend != "reference",
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )

    def step(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Trains on one batch: forward, backward, clip, AdamW.

        Args:
            idx: (B, T) int64.
            targets: (B, T) int64, the token after each position.

        Returns:
            () float32, the loss before the update, without gradient.
        """
        if not self.model.training:
            self.model.train()
        with _autocast(self.device, self.config.precision):
            loss = self.model.loss(idx, targets)
        loss.backward()
        self.optimizer.clipped_step(self.config.clip)
        for param in self.parameters:
            param.grad = None  # torch's zero_grad takes as long as a small model's whole update
        return loss.detach()

    def evaluate(self, ids: Tensor) -> Evaluation:
        """Computes the mean loss over the text `ids` in the run's precision; see `evaluate`."""
        return evaluate(self.model, ids, self.config.precision)

    def fit(
        self,
        train_ids: Tensor,
        val_ids: Tensor | None = None,
        *,
        tokenizer: CharTokenizer | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool = False,
        extra: dict[str, Any] | None = None,
    ) -> TrainResult:
        """Trains for `config.steps` or `config.epochs`, evaluating and saving on the way.

        The directory `out` holds the last checkpoint (not the best), written at each evaluation and
        at Ctrl-C. The first Ctrl-C ends the run after the step that is being computed; a second one
        raises KeyboardInterrupt at once and saves nothing.

        Args:
            train_ids: (N,) int64, more than block_size tokens.
            val_ids: (M,) int64, the held-out text; None evaluates nothing.
            tokenizer: stored in the checkpoint.
            out: directory of the run; None writes nothing.
            resume: go on with the interrupted run in `out`, to the bits it would have had.
            overwrite: replace the run in `out`.
            progress: show a progress bar and the evaluations on stderr.
            extra: JSON-able, stored in the checkpoint beside what training stores there.

        Returns:
            The model and the history, one row per evaluation: `step`, `epoch` (passes over the
            windows so far), `train_loss` (mean over the steps since the row before), `val_loss`,
            `perplexity`, `tokens_per_s`, `seconds` (of training, without evaluations), `lr`.

        Raises:
            ConfigError: neither steps nor epochs are set, or see `gptfast.run.check`.
            DataError: a text is shorter than a window.
            CheckpointError: `out` cannot be written or read.
            TrainError: the loss is no longer finite; the last checkpoint stays.
        """
        if self.config.steps is None and self.config.epochs is None:
            raise ConfigError("a run needs a number of steps or of epochs, got neither")
        run.check(out, resume, overwrite)
        check_lengths(self.model.config.block_size, train_ids, val_ids)
        directory = RunDirectory(out)
        loop = _Loop(self, directory, train_ids, val_ids, tokenizer, extra or {})
        with torch.random.fork_rng(devices=[]), _threads(self.config.threads):
            torch.default_generator.manual_seed(self.config.seed)
            if resume:
                loop.load()
            state = loop.state
            directory.start(state.history, resume)
            try:
                with (
                    terminal.first_interrupt() as interrupted,
                    terminal.bar(state, loop.total, directory.path, progress) as report,
                ):
                    loop.go(interrupted, report)
            finally:
                self.model.eval()
        return TrainResult(self.model, tokenizer, state.history, state.step < loop.total)


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Loop:
    """One call of `Trainer.fit`: the run's state, and what moves it on."""

    def __init__(
        self,
        trainer: Trainer,
        directory: RunDirectory,
        train_ids: Tensor,
        val_ids: Tensor | None,
        tokenizer: CharTokenizer | None,
        extra: dict[str, Any],
    ) -> None:
        config = trainer.config
        self.trainer, self.config, self.directory = trainer, config, directory
        self.tokenizer, self.extra, self.val_ids = tokenizer, extra, val_ids
        self.text = run.fingerprint(train_ids, val_ids)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.epoch_start = self.generator.get_state()
        self.windows = data.EpochWindows(
            train_ids.to(trainer.device),
            trainer.model.config.block_size,
            config.batch_size,
            self.generator,
        )
        self.state = RunState()
        per_epoch = len(self.windows)
        self.total = config.steps or per_epoch * (config.epochs or 0)
        self.eval_every = config.eval_every or (self.total if config.steps else per_epoch)

    def go(self, interrupted: Callable[[], bool], report: terminal.Report) -> None:
        """Runs to the end, or to the step in which an interrupt came."""
        state, reported, saved = self.state, 0.0, False
        batches = self._batches()
        while state.step < self.total and not interrupted():
            start = time.perf_counter()
            x, y = next(batches)
            loss = self.trainer.step(x, y).item()
            now = time.perf_counter()
            state.count(loss, y.numel(), now - start)
            saved = False
            if not math.isfinite(loss):
                raise self._not_finite(f"the loss became {loss}")
            if state.step == self.total or state.step % self.eval_every == 0:
                report(self._evaluate())
                self.save()
                saved = True
            elif now - reported > 1 / REPORTS_PER_SECOND:
                report(None)
                reported = now
        if not saved:
            self.save()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from the state's step on, without an end."""
        windows = self.windows
        while self.config.steps is not None:
            yield data.random_windows(
                windows.ids, windows.block_size, windows.batch_size, self.generator
            )
        done = self.state.step % len(windows)
        while True:
            self.epoch_start = self.generator.get_state()
            yield from islice(windows, done, None)
            done = 0

    def _evaluate(self) -> Row:
        """Ends the history's row of the steps since the last one."""
        state, config = self.state, self.config
        if not all(bool(param.isfinite().all()) for param in self.trainer.parameters):
            raise self._not_finite("the weights are no longer finite")
        result = None
        if self.val_ids is not None:
            last = state.step == self.total
            limit = None if last or config.eval_tokens is None else config.eval_tokens + 1
            result = self.trainer.evaluate(self.val_ids[:limit])
        row = {
            "step": state.step,
            "epoch": round(state.step / len(self.windows), 4),
            "train_loss": state.loss_sum / state.loss_steps,
            "val_loss": result.loss if result else None,
            "perplexity": result.perplexity if result else None,
            "tokens_per_s": round(state.row_tokens / state.row_seconds, 1),
            "seconds": round(state.seconds, 3),
            "lr": config.lr,
        }
        state.end_row(row)
        self.directory.append(row)
        return row

    def _not_finite(self, what: str) -> TrainError:
        where = self.directory.path
        kept = f"; {where} keeps the checkpoint before" if where and self.state.history else ""
        return TrainError(
            f"{what} at step {self.state.step}: a lower lr (now {self.config.lr:g}) "
            f"or gradient clipping (clip, now {self.config.clip}) may help{kept}"
        )

    def save(self) -> None:
        """Writes checkpoint and training state."""
        # Windows at random have no epochs; between two, the generator is where the next one starts.
        between = self.config.steps is not None or self.state.step % len(self.windows) == 0
        resumable = {
            "text": self.text,
            "optimizer": self.trainer.optimizer.state_dict(),
            "dropout": torch.default_generator.get_state(),
            "windows": self.generator.get_state() if between else self.epoch_start,
        }
        extra = self.extra | {
            "train": asdict(self.config),
            "step": self.state.step,
            "text_sha256": self.text,
        }
        self.directory.save(
            self.trainer.model, self.tokenizer, self.config, self.state, resumable, extra
        )

    def load(self) -> None:
        """Goes to where `save` was called."""
        self.state, resumable = self.directory.load(self.trainer.model, self.config)
        if resumable["text"] != self.text:
            raise ConfigError(f"{self.directory.path}: the run was started with another text")
        self.trainer.optimizer.load_state_dict(resumable["optimizer"])
        torch.default_generator.set_state(resumable["dropout"])
        self.generator.set_state(resumable["windows"])
