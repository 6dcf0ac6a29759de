"""The trainer: one training step, and whole runs.

Letters: B batch, T time, N tokens of a text. `run.py` describes the files of a run's directory.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptfast import data
from gptfast.checks import check_is, dtype_name
from gptfast.config import TrainConfig
from gptfast.errors import ConfigError, DataError
from gptfast.model import GPT, unwrapped
from gptfast.ops.cross_entropy import one
from gptfast.ops.random import seed_tensor
from gptfast.storable import check_storable
from gptfast.threads import check_threads, local_processes, use_usable_threads
from gptfast.tokenizer import Tokenizer, check_kept
from gptfast.training.averages import with_weights
from gptfast.training.callbacks import Callback
from gptfast.training.distributed import ALONE, Processes
from gptfast.training.evaluation import Evaluation, autocast, evaluate
from gptfast.training.graph import Cuda, StepGraphs
from gptfast.training.loop import Loop
from gptfast.training.optimizer import AdamW, weight_groups
from gptfast.training.result import TrainResult
from gptfast.training.run import RunDirectory
from gptfast.training.schedule import is_constant, learning_rate, part_sizes
from gptfast.training.sharding import (
    exchanged,
    is_sharded,
    reshard,
    shared,
    unsummed,
    whole_model,
    whole_state,
)
from gptfast.training.signals import first_interrupt
from gptfast.training.watching.progress import ProgressBar
from gptfast.training.watching.records import Records
from gptfast.training.watching.sampler import Sampler


def check_lengths(block_size: int, train_ids: Tensor, val_ids: Tensor | None) -> None:
    """Raises DataError if the training or the held-out text is shorter than a window."""
    for part, ids in (("training", train_ids), ("held-out", val_ids)):
        if ids is not None:
            check_is(f"the {part} part of the text", ids, Tensor, "a tensor of tokens")
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
        model: A GPT with float32 weights, which remain the master weights with "bf16". `step` calls
            a wrapper of torch.compile or DistributedDataParallel, if there is one.
        config: The training options.
        processes: Those that train the model together, each with the same arguments and calls.
            Every one computes a part of each batch, and `config.parallel` says how the model is
            shared. The parts, and their dropout masks, are those of as many accumulation steps.

    Raises:
        ConfigError: A trained weight is neither float32 nor float64, or all weights are frozen.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, processes: Processes = ALONE) -> None:
        check_is("config", config, TrainConfig, "a TrainConfig")
        self.model = model = shared(model, config, processes)
        self.config, self.processes = config, processes
        self.gpt = gpt = unwrapped(model)
        self.device = gpt.main_weight.device
        self.generator = torch.Generator().manual_seed(config.seed)
        trained = {name: param for name, param in gpt.named_parameters() if param.requires_grad}
        for name, param in trained.items():
            if param.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    "training needs float32 weights (precision='bf16' lowers activations alone), "
                    f"got {dtype_name(param.dtype)} for {name}"
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
        self.sharded = is_sharded(gpt)  # whether this process has a part of every weight
        self.total_steps = config.steps  # None: the schedule knows no end

    def step(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Trains on one batch: forward pass, backward pass, gradient clipping, AdamW.

        On a GPU the step is a CUDA graph from the third batch of a shape on, see `TrainConfig`;
        weights and losses have the same bits without it. The call does not wait for the step.

        Args:
            idx: (B, T) int64.
            targets: (B, T) int64, the token after each position.

        Returns:
            () float32, the loss before the update, detached. Later steps do not overwrite it. Each
            of several processes gets its share; the sum of the shares is the loss.
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

    def _own_parts(self) -> slice:
        """Which parts of a batch this process computes."""
        first, count = self.processes.rank, self.config.accumulation_steps
        return slice(first * count, (first + 1) * count)

    def dropout_keys(self) -> list[Tensor] | None:
        """Draws a step's keys of dropout masks, one per accumulated part; None without dropout.

        Each is () int64 on the CPU. Those of the other processes' parts are drawn as well.
        """
        if self.gpt.config.dropout == 0.0:
            return None
        count = self.processes.size * self.config.accumulation_steps
        return [seed_tensor(None, self.generator) for _ in range(count)][self._own_parts()]

    def loss_and_grads(self, idx: Tensor, targets: Tensor, keys: list[Tensor] | None) -> Tensor:
        """Gives the parameters their gradients and returns the loss, () float32, detached.

        The batch is cut into accumulation_steps parts, whose gradients add up one after another:

            loss = sum over the parts of rows of the part / rows of the batch * mean loss of it

        Of several processes each has as many parts, and the gradients of all add up.
        """
        sizes = part_sizes(len(idx), self.processes.size * self.config.accumulation_steps)
        if len(sizes) == 1:
            return self._part_loss_and_grads(idx, targets, None if keys is None else keys[0], None)
        losses, own = [], self._own_parts()
        batches = list(zip(idx.split(sizes), targets.split(sizes), strict=True))[own]
        for i, (part, wanted) in enumerate(batches):
            weight = torch.full((), len(part) / len(idx), device=self.device)
            if not len(part):  # a batch of fewer rows than parts
                if self.processes.size == 1:
                    continue
                # The others wait for the gradients of this process, which are zero.
                part = wanted = idx.new_zeros(1, idx.shape[1])
            key = None if keys is None else keys[i]
            with nullcontext() if i == len(batches) - 1 else unsummed(self.model):
                losses.append(weight * self._part_loss_and_grads(part, wanted, key, weight))
        return torch.stack(losses).sum()

    def _part_loss_and_grads(
        self, idx: Tensor, targets: Tensor, key: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        """Adds the gradients of a part's loss times `weight` (None: 1); returns the loss itself."""
        options: dict[str, Any] = {"seed": key}
        if self.config.label_smoothing:  # a user's own loss need not take it
            options["label_smoothing"] = self.config.label_smoothing
        with autocast(self.device, self.config.precision):
            if self.model is self.gpt and not self.sharded:
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
        """A view of the model whose weights are the running means; without `ema` the model itself.

        It shares the means' memory. For a sharded model it is the last copy by `whole_models`.
        """
        if self.sharded:
            return self.whole_models()[1] if self._averaged is None else self._averaged[1]
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
        if not self.sharded:
            return evaluate(self.averaged, ids, self.config.precision, self.processes)
        with exchanged(self.parameters, self.optimizer.averages):
            result = evaluate(self.gpt, ids, self.config.precision, self.processes)
            reshard(self.gpt)
        return result

    def whole(self) -> tuple[GPT, GPT, dict[str, Any]]:
        """Returns the model, `averaged`, and the optimizer's state_dict, none of them in parts.

        All processes must call it.
        """
        state = self.optimizer.state_dict()
        return *self.whole_models(), whole_state(state) if self.sharded else state

    def whole_models(self) -> tuple[GPT, GPT]:
        """Returns the model and `averaged`, not in parts. All processes must call it."""
        if not self.sharded:
            return self.gpt, self.averaged
        model = averaged = whole_model(self.gpt)
        if self.optimizer.averages:
            with exchanged(self.parameters, self.optimizer.averages):
                averaged = whole_model(self.gpt)
        self._averaged = [], averaged
        return model, averaged

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

        The directory `out` holds the last checkpoint and, in `best`, the checkpoint of the
        evaluation with the smallest held-out loss; with `config.ema` both hold the mean weights.
        They are written at each evaluation, at the intervals `config.save_every` and
        `config.save_minutes` and at the end. If a save fails, training continues with a warning,
        except after the last step. `out` is locked against other runs. With several processes, only
        the first one writes, shows and calls callbacks.

        The first Ctrl-C, SIGTERM or SIGHUP ends the run after the current step; a second one takes
        effect at once, without a save. Signals that the program handles or ignores keep their
        handlers; outside the main thread, all signals do.

        Args:
            train_ids: (N,) int64 or smaller integers, more than block_size tokens. Only the
                windows of a mapped file are read.
            val_ids: (M,) the same of the held-out text, more than block_size tokens, or None.
            tokenizer: Stored in the checkpoint.
            out: Directory of the run; None writes nothing.
            resume: Continue the interrupted run in `out`; the results are bitwise those of an
                uninterrupted run.
            overwrite: Replace the run in `out`.
            progress: Show a progress bar and the evaluations, on stderr or in the notebook.
            callbacks: What else watches the run.
            extra: JSON-serialisable values, stored in the checkpoint along with training's own.
            fingerprint: Identifies the text when the run is resumed; None hashes all tokens.

        Returns:
            The model and the history, one row per evaluation: `step`, `epoch` (passes over the
            windows so far), `train_loss` (mean over the steps since the previous row), `val_loss`,
            `perplexity`, `tokens_per_s`, `seconds` (of training, without evaluations), `lr`.

        Raises:
            ConfigError: Neither steps nor epochs are set, another run is being trained in `out`, or
                see `gptfast.training.run.check`.
            DataError: A text is not longer than block_size.
            CheckpointError: `out` cannot be written or read, or a checkpoint cannot hold the model.
            UnsavedError: The last save failed; the error's `result` has the trained model.
            TrainError: The loss or a weight is not finite; the last checkpoint is kept.
            ProcessError: Another process of the run has ended; the last checkpoint is kept.
            TypeError: `extra` is not JSON-serialisable.
        """
        if self.config.steps is None and self.config.epochs is None:
            raise ConfigError("a run needs a number of steps or of epochs, got neither")
        json.dumps(extra)  # raises TypeError now rather than at the first save
        if out is not None:
            check_kept(tokenizer)
        if out is not None and not self.sharded:
            check_storable(self.gpt)
        check_lengths(self.gpt.config.block_size, train_ids, val_ids)
        processes = self.processes
        directory = RunDirectory(out, writes=processes.first)
        watching: list[Callback] = [ProgressBar()] if progress else []
        if self.config.sample is not None:
            watching.append(Sampler(self.config.sample, tokenizer, shown=progress))
        watching += [Records(), *callbacks]
        given = tokenizer, extra or {}, watching, progress, fingerprint
        loop = Loop(self, directory, train_ids, val_ids, *given)
        kept = "nothing was saved" if out is None else f"{out} keeps the last checkpoint, if any"
        self.generator.manual_seed(self.config.seed)
        self.steps_done = 0
        self.graphs.clear()  # an earlier call's are of another text
        with _threads(self.config.threads), ExitStack() as held:
            processes.from_first(
                lambda: held.enter_context(directory.opened(resume, overwrite)) and None
            )
            if resume:
                loop.load()
            processes.from_first(lambda: directory.start(loop.state.history, resume))
            try:
                with first_interrupt() as loop.received_signal, processes.losses_noticed(kept):
                    processes.wait()
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
    if threads is not None:
        torch.set_num_threads(check_threads("threads", threads))
    elif local_processes() > 1:
        use_usable_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
