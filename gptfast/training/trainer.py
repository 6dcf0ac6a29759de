"""The trainer: one training step, evaluation on held-out text, and whole runs.

Letters: B batch, T time, N tokens of a text. `run.py` describes the files of a run's directory.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptfast import data
from gptfast.config import PRECISIONS, Precision, TrainConfig
from gptfast.data.windows import TOKEN_DTYPES
from gptfast.errors import ConfigError, DataError
from gptfast.model import GPT, unwrapped
from gptfast.ops.cross_entropy import one
from gptfast.ops.random import seed_tensor
from gptfast.storable import check_storable
from gptfast.threads import check_threads
from gptfast.tokenizer import Tokenizer
from gptfast.training.averages import with_weights
from gptfast.training.callbacks import Callback
from gptfast.training.graph import Cuda, StepGraphs
from gptfast.training.loop import Loop, TrainResult
from gptfast.training.optimizer import AdamW, weight_groups
from gptfast.training.run import RunDirectory
from gptfast.training.schedule import is_constant, learning_rate, part_sizes
from gptfast.training.signals import first_interrupt
from gptfast.training.watching.progress import ProgressBar
from gptfast.training.watching.records import Records
from gptfast.training.watching.sampler import Sampler

EVAL_TOKENS_AT_ONCE = 8192  # limits the memory of an evaluation


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    loss: float  # mean over the tokens, nats
    perplexity: float  # exp(loss)
    tokens: int  # number of predicted tokens: all but the first of the text


@torch.no_grad()
def evaluate(model: nn.Module, ids: Tensor, precision: Precision = "fp32") -> Evaluation:
    """Computes the mean loss over a text in disjoint windows, without dropout.

    Args:
        model: a GPT, which torch.compile or DistributedDataParallel may wrap. Its modules are
            switched to evaluation mode and back to their previous mode.
        ids: (N,) int64 or smaller integers, at least 2 tokens. Windows have block_size tokens; the
            last may be shorter.
        precision: "fp32", or "bf16" for activations in bfloat16.

    Returns:
        The mean loss in nats per token, the perplexity, and the number of predicted tokens.

    Raises:
        ConfigError: `precision` is unknown.
        DataError: `ids` is not a 1-D tensor of integers, or has fewer than 2 tokens.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if ids.dim() != 1 or ids.dtype not in TOKEN_DTYPES or len(ids) < 2:
        raise DataError(
            "evaluate: ids must be a 1-D tensor of at least 2 tokens, int64 or smaller integers, "
            f"got shape {tuple(ids.shape)} of {str(ids.dtype)[6:]}"
        )
    gpt = unwrapped(model)
    T, device = gpt.config.block_size, gpt.main_weight.device
    ids = data.placed(ids, device)
    tokens = len(ids) - 1
    whole = tokens // T * T
    rows = max(1, EVAL_TOKENS_AT_ONCE // T)
    batches: list[tuple[Tensor, Tensor]] = []
    if whole:
        xs, ys = ids[:whole].view(-1, T), ids[1 : whole + 1].view(-1, T)
        batches += zip(xs.split(rows), ys.split(rows), strict=True)
    if whole < tokens:
        batches.append((ids[None, whole:-1], ids[None, whole + 1 :]))
    modes = [(module, module.training) for module in gpt.modules()]
    gpt.eval()
    try:
        with _autocast(device, precision):
            total = sum(_loss(gpt, x.to(device), y.to(device)) * y.numel() for x, y in batches)
    finally:
        for module, training in modes:
            module.training = training
    loss = total / tokens
    # The exponent is clamped, because math.exp raises OverflowError when a run has diverged.
    return Evaluation(loss, math.exp(min(loss, 700.0)), tokens)


def _loss(gpt: GPT, idx: Tensor, targets: Tensor) -> float:
    return gpt.loss(data.as_int64(idx), data.as_int64(targets)).item()


def _autocast(device: torch.device, precision: Precision) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def check_lengths(block_size: int, train_ids: Tensor, val_ids: Tensor | None) -> None:
    """Raises DataError if the training or the held-out text is shorter than a window."""
    for part, ids in (("training", train_ids), ("held-out", val_ids)):
        if ids is not None and len(ids) <= block_size:
            raise DataError(
                f"the {part} part of the text is shorter than a window: it has {len(ids)} tokens, "
                f"a window needs {block_size + 1} (block_size {block_size} and the token after it)"
            )


class Trainer:
    """Trains a model with AdamW.

    Random numbers: the trainer has its own generator, seeded by `config.seed`, from which `step`
    draws its dropout keys. A run therefore depends only on its arguments and neither uses nor
    changes torch's global generators. (Custom modules in the model may still draw from torch's
    default generator.) Equal seeds and thread counts give bitwise equal results.

    Args:
        model: a GPT with float32 weights, which remain the master weights with "bf16". `step` calls
            a wrapper of torch.compile or DistributedDataParallel, if there is one.
        config: the training options.

    Raises:
        ConfigError: a trained weight is neither float32 nor float64, or all weights are frozen.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.model = model
        self.config = config
        self.gpt = gpt = unwrapped(model)
        self.device = gpt.main_weight.device
        self.generator = torch.Generator().manual_seed(config.seed)
        trained = {name: param for name, param in gpt.named_parameters() if param.requires_grad}
        for name, param in trained.items():
            if param.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    "training needs float32 weights (precision='bf16' lowers activations alone), "
                    f"got {str(param.dtype)[6:]} for {name}"
                )
        if not trained:
            raise ConfigError(
                "there is nothing to train: all parameters of the model are frozen (requires_grad "
                "is False)"
            )
        gpt.recompute = bool(config.recompute)
        groups = weight_groups(list(trained.values()), config.decayed)
        # In the order of the optimizer, by which its state is stored.
        self.parameters = [param for group in groups for param in group["params"]]
        name_of = {param: name for name, param in trained.items()}
        self.names = [name_of[param] for param in self.parameters]
        self.optimizer = AdamW(
            groups,
            fused_kernel=gpt.backend != "reference",
            ema=config.ema,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self.graphs = StepGraphs(Cuda(self.device) if self.device.type == "cuda" else None)
        self._averaged: tuple[list[Tensor], GPT] | None = None
        self.steps_done = 0
        self.total_steps = config.steps  # None: the schedule knows no end

    def step(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Trains on one batch: forward pass, backward pass, gradient clipping, AdamW.

        On a GPU the step is a CUDA graph from the third batch of a shape on, see `TrainConfig`;
        weights and losses have the same bits without it. The step is not waited for.

        Args:
            idx: (B, T) int64.
            targets: (B, T) int64, the token after each position.

        Returns:
            () float32, the loss before the update, detached. It is the caller's: later steps do not
            overwrite it.
        """
        self._prepare()
        loss = self.graphs.step(self, idx, targets)
        if loss is None:
            loss = self.loss_and_grads(idx, targets, self.dropout_keys())
            self.optimizer.clipped_step(self.config.clip)
            self.drop_grads()
        self.steps_done += 1
        return loss

    def step_at(self, ids: Tensor, starts: Tensor) -> Tensor:
        """Trains on the windows of a text that start at `starts`; otherwise like `step`.

        Args:
            ids: (N,) int64 or smaller integers, on the model's device or, where they are too many
                for it, on the CPU.
            starts: (B,) int64 on the CPU, in [0, N - block_size).
        """
        if ids.device == self.device:
            self._prepare()
            loss = self.graphs.step_at(self, ids, starts)
            if loss is not None:
                self.steps_done += 1
                return loss
        idx, targets = data.gather(ids, starts, self.gpt.config.block_size)
        return self.step(idx.to(self.device), targets.to(self.device))

    def _prepare(self) -> None:
        if not self.gpt.training:
            self.model.train()
        if not is_constant(self.config):  # otherwise it is the caller's, who may change it
            lr = learning_rate(self.config, self.steps_done, self.total_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr

    def dropout_keys(self) -> list[Tensor] | None:
        """Draws a step's keys of dropout masks, one per accumulated part; None without dropout.

        Each is () int64 on the CPU.
        """
        if self.gpt.config.dropout == 0.0:
            return None
        return [seed_tensor(None, self.generator) for _ in range(self.config.accumulation_steps)]

    def loss_and_grads(self, idx: Tensor, targets: Tensor, keys: list[Tensor] | None) -> Tensor:
        """Gives the parameters their gradients and returns the loss, () float32, detached.

        The batch is cut into accumulation_steps parts, whose gradients add up one after another:

            loss = sum over the parts of rows of the part / rows of the batch * mean loss of it
        """
        parts = part_sizes(len(idx), self.config.accumulation_steps)
        if len(parts) == 1:
            return self._part_loss_and_grads(idx, targets, None if keys is None else keys[0], None)
        losses = []
        batches = zip(idx.split(parts), targets.split(parts), strict=True)
        for i, (part, wanted) in enumerate(batches):
            if not parts[i]:
                continue  # a batch of fewer rows than parts
            weight = torch.full((), parts[i] / len(idx), device=self.device)
            key = None if keys is None else keys[i]
            losses.append(weight * self._part_loss_and_grads(part, wanted, key, weight))
        return torch.stack(losses).sum()

    def _part_loss_and_grads(
        self, idx: Tensor, targets: Tensor, key: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        """Adds the gradients of a part's loss times `weight` (None: 1); returns the loss itself."""
        options: dict[str, Any] = {"seed": key}
        if self.config.label_smoothing:  # which a loss of the user's own need not know
            options["label_smoothing"] = self.config.label_smoothing
        with _autocast(self.device, self.config.precision):
            if self.model is self.gpt:
                loss = self.gpt.loss(idx, targets, **options)
            else:
                loss = self.model(idx, targets=targets, **options)
        if weight is None:
            weight = one(loss.device) if loss.dtype == torch.float32 else None
        loss.backward(weight if weight is None else weight.to(loss.dtype))
        return loss.detach()

    def drop_grads(self) -> None:
        """Frees the gradients. (torch's zero_grad takes as long as a small model's update.)"""
        for param in self.parameters:
            param.grad = None

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def averaged(self) -> GPT:
        """The model of the weights' running means, which it shares; without `ema`, the model."""
        averages = self.optimizer.averages
        if not averages:
            return self.gpt
        known, model = self._averaged or ([], None)
        if model is None or any(a is not b for a, b in zip(known, averages, strict=True)):
            model = with_weights(self.gpt, self.parameters, averages)
            self._averaged = averages, model
        return model

    def evaluate(self, ids: Tensor) -> Evaluation:
        """Computes the mean loss over the text `ids`, see `evaluate`, of the model `averaged`."""
        return evaluate(self.averaged, ids, self.config.precision)

    def fit(
        self,
        train_ids: Tensor,
        val_ids: Tensor | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool = False,
        callbacks: Sequence[Callback] = (),
        extra: dict[str, Any] | None = None,
        fingerprint: str | None = None,
    ) -> TrainResult:
        """Trains for `config.steps` or `config.epochs`, with evaluations and checkpoints.

        The directory `out` holds the last checkpoint and, in `best`, that of the evaluation with
        the smallest held-out loss; with `config.ema` both are of the mean weights. They are written
        at each evaluation, at the intervals `config.save_every` and `config.save_minutes` and at
        the end. If a save fails, training continues with a warning, except after the last step.
        `out` is locked against other runs; if several processes train one model, pass it to only
        one.

        The first Ctrl-C, SIGTERM or SIGHUP ends the run after the current step; a second one takes
        effect at once, without a save. Signals that the program handles or ignores keep their
        handlers; outside the main thread, all signals do.

        Args:
            train_ids: (N,) int64 or smaller integers, more than block_size tokens. Of a mapped file
                no more is read than the windows.
            val_ids: (M,) the same of the held-out text, more than block_size tokens, or None.
            tokenizer: stored in the checkpoint.
            out: directory of the run; None writes nothing.
            resume: continue the interrupted run in `out`; the results are bitwise those of an
                uninterrupted run.
            overwrite: replace the run in `out`.
            progress: show a progress bar and the evaluations on stderr.
            callbacks: what else watches the run.
            extra: JSON-serialisable values, stored in the checkpoint with those of training.
            fingerprint: what the run knows its text by when it is resumed; None hashes all tokens.

        Returns:
            The model and the history, one row per evaluation: `step`, `epoch` (passes over the
            windows so far), `train_loss` (mean over the steps since the previous row), `val_loss`,
            `perplexity`, `tokens_per_s`, `seconds` (of training, without evaluations), `lr`.

        Raises:
            ConfigError: neither steps nor epochs are set, another run is being trained in `out`, or
                see `gptfast.training.run.check`.
            DataError: a text is not longer than block_size.
            CheckpointError: `out` cannot be written or read, or a checkpoint cannot hold the model.
            UnsavedError: the last save failed; the error's `result` has the trained model.
            TrainError: the loss or a weight is not finite; the last checkpoint is kept.
            TypeError: `extra` is not JSON-serialisable.
        """
        if self.config.steps is None and self.config.epochs is None:
            raise ConfigError("a run needs a number of steps or of epochs, got neither")
        json.dumps(extra)  # raises TypeError now rather than at the first save
        if out is not None:
            check_storable(self.gpt)
        check_lengths(self.gpt.config.block_size, train_ids, val_ids)
        directory = RunDirectory(out)
        watching: list[Callback] = [ProgressBar()] if progress else []
        if self.config.sample is not None:
            watching.append(Sampler(self.config.sample, tokenizer, shown=progress))
        watching += [Records(), *callbacks]
        given = tokenizer, extra or {}, watching, progress, fingerprint
        loop = Loop(self, directory, train_ids, val_ids, *given)
        self.generator.manual_seed(self.config.seed)
        self.steps_done = 0
        self.graphs.clear()  # an earlier call's are of another text
        with _threads(self.config.threads), directory.opened(resume, overwrite):
            if resume:
                loop.load()
            directory.start(loop.state.history, resume)
            try:
                with first_interrupt() as loop.received_signal:
                    loop.train()
            finally:
                self.model.eval()
                self.graphs.clear()
        return loop.result()

    def note(self) -> str | None:
        """Says whether a step on a GPU is a graph; None for other devices."""
        if self.device.type != "cuda":
            return None
        obstacle = self.graphs.obstacle(self)
        if obstacle is None:
            return "each step is one CUDA graph"
        return f"steps run without a CUDA graph: {obstacle}"


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else check_threads("threads", threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)
