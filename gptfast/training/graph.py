"""The training step as one CUDA graph, which the host starts by a single call.

A graph repeats its kernels at the addresses of the capture. So whatever differs from step to step
lies in tensors that stay where they are: the batch, the dropout's key, the optimizer's options. The
host writes them before each replay, and results have the bits of a step without a graph.

`capturable` says which steps can be a graph. A graph is made anew when anything that it depends on
has changed: parameters, what is trained, the optimizer's moments, the model's options.

Letters: B batch, T time, N tokens of a text.
"""

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gptfast import data
from gptfast.captures import captured
from gptfast.training.capturable import Watch, observer, obstacle

if TYPE_CHECKING:
    from gptfast.training.trainer import Trainer

SLOTS = 4  # steps that the host may be ahead of the device
MAX_GRAPHS = 4  # shapes of a batch, the first ones; others run without a graph

Run = Callable[[], Tensor]


class Cuda:
    """The parts of CUDA that a step's graph uses. Tests replace them by their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None  # made at the first use, when the device is in use
        self._pool: Any = None  # the graphs of a trainer share their memory: one runs at a time
        self._pending: list[Callable[[], None]] | None = None

    def host_buffer(self, words: int) -> Tensor:
        """Returns memory that the device can read, (words,) int64."""
        return torch.zeros(words, dtype=torch.int64, pin_memory=True)

    def event(self) -> Any:
        """Returns an event."""
        return torch.cuda.Event()

    def record(self, event: Any) -> None:
        """Records an event on the stream that the device's work is queued on now."""
        event.record(torch.cuda.current_stream(self._device))

    def rehearse(self, run: Run) -> Tensor:
        """Calls `run` on the capture's stream, so that all one-time work precedes the capture."""
        with torch.cuda.device(self._device):
            self._stream = self._stream or torch.cuda.Stream()
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                result = run()
            current.wait_stream(self._stream)
            result.record_stream(current)
            return result

    def capture(self, run: Run) -> Run:
        """Captures `run`; returns a function that replays it and returns its result."""
        with torch.cuda.device(self._device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            self._pending = []
            try:
                with captured(graph, self._pool, self._stream):
                    result = run()
                for action in self._pending:
                    action()
            except RuntimeError:
                self._leave_capture()
                raise
            finally:
                self._pending = None

        def replay() -> Tensor:
            with torch.cuda.device(self._device):
                graph.replay()
            return result

        return replay

    def _leave_capture(self) -> None:
        """Lets torch draw random numbers again, which a failed capture forbids until the next one.

        It captures without the pool, where the failed capture's memory would prevent it.
        """
        number = torch.zeros((), device=self._device)
        with contextlib.suppress(RuntimeError):
            with captured(torch.cuda.CUDAGraph(), None, self._stream):
                number.add_(1.0)

    def after_capture(self, action: Callable[[], None]) -> None:
        """Does this between the capture and the first replay; at once outside of a capture."""
        if self._pending is None:
            action()
        else:
            self._pending.append(action)


class Messages:
    """Sends numbers to the device before each step, without waiting for the device.

    The device reads a pinned buffer some time after the host has written it. So there are SLOTS of
    them, and the host waits only for a buffer that has not been read yet.

    Args:
        numbers: How many options the optimizer has.
        starts: B, how many starts of windows a message has.
        keys: How many keys of dropout masks.
        device: The model's device.
        cuda: See Cuda.
    """

    def __init__(
        self, numbers: int, starts: int, keys: int, device: torch.device, cuda: Cuda
    ) -> None:
        # Aligned to 16 bytes like any tensor: compiled kernels are specialised on alignment.
        first_key = numbers + numbers % 2
        header = first_key + 2 * keys
        words = header + starts
        self._cuda, self._device = cuda, torch.zeros(words, dtype=torch.int64, device=device)
        self._slots = [(cuda.host_buffer(words), cuda.event()) for _ in range(SLOTS)]
        self._sent = 0
        self._first_key = first_key
        self.numbers = self._device[:numbers].view(torch.float64)
        self.keys = [self._device[i] for i in range(first_key, header, 2)]
        self.starts = self._device[header:]

    def send(
        self, numbers: tuple[float, ...], keys: list[Tensor] | None, starts: Tensor | None
    ) -> None:
        """Sends the optimizer's options, the dropout's keys and the starts of windows, if any."""
        buffer, has_been_read = self._slots[self._sent % SLOTS]
        self._sent += 1
        has_been_read.synchronize()
        words = buffer.numpy()
        words[: len(numbers)].view(np.float64)[:] = numbers
        for i, key in enumerate(keys or []):
            words[self._first_key + 2 * i] = key.item()
        if starts is not None:
            words[len(words) - len(starts) :] = starts.numpy()
        self._device.copy_(buffer, non_blocking=True)
        self._cuda.record(has_been_read)


class StepGraph:
    """The step for batches of one shape: done once without a graph, then captured, then replayed.

    Args:
        trainer: The trainer of the step.
        cuda: See Cuda.
        shape: B and T.
        ids: (N,) tokens on the model's device, the text whose windows are trained on; None for
            batches that the caller gives.
    """

    def __init__(
        self, trainer: "Trainer", cuda: Cuda, shape: tuple[int, int], ids: Tensor | None
    ) -> None:
        self._cuda, self._ids = cuda, ids
        B, self._T = shape
        numbers, starts = len(trainer.optimizer.numbers(None)), 0 if ids is None else B
        keys = trainer.config.accumulation_steps
        self._messages = Messages(numbers, starts, keys, trainer.device, cuda)
        if ids is None:
            self._given = torch.zeros(2, *shape, dtype=torch.int64, device=trainer.device)
        self._table_memory: Tensor | None = None
        self._rehearsed = False
        self._replay: Run | None = None

    def prepare(self, trainer: "Trainer") -> None:
        """Captures the step if that is due; trains nothing. Raises RuntimeError if it cannot."""
        if self._rehearsed and self._replay is None:
            self._replay = self._cuda.capture(functools.partial(self._run, trainer))

    def step(
        self, trainer: "Trainer", batch: tuple[Tensor, Tensor] | None, starts: Tensor | None
    ) -> Tensor:
        """Trains on a batch: given as inputs and targets, (B, T) each, or as starts of windows.

        Returns:
            () float32, the loss; the next step does not overwrite it.
        """
        if batch is not None:
            for own, given in zip(self._given, batch, strict=True):
                own.copy_(given, non_blocking=True)
        options = trainer.optimizer.numbers(trainer.config.clip)
        self._messages.send(options, trainer.dropout_keys(), starts)
        if self._replay is None:
            loss = self._cuda.rehearse(functools.partial(self._run, trainer))
            self._rehearsed = True
        else:
            loss = self._replay().clone()
        # Autograd does not see the kernels write.
        torch.autograd.graph.increment_version([*trainer.parameters, *trainer.optimizer.averages])
        return loss

    def _run(self, trainer: "Trainer") -> Tensor:
        messages = self._messages
        if self._ids is None:
            idx, targets = self._given
        else:
            idx, targets = data.gather(self._ids, messages.starts, self._T)
        keys = messages.keys if trainer.gpt.config.dropout > 0.0 else None
        loss = trainer.loss_and_grads(idx, targets, keys)
        table = trainer.optimizer.table(self._table_memory)
        self._table_memory = table.memory  # the capture uses the rehearsal's memory
        self._cuda.after_capture(table.upload)
        table.update(messages.numbers)
        trainer.drop_grads()
        return loss


class StepGraphs:
    """The graphs of a trainer's steps, one per shape of a batch.

    The first batch of a shape runs without a graph, so that a shape that does not come again costs
    nothing. The second rehearses the capture, still without a graph; the third captures. All of
    them are steps of the training.

    Args:
        cuda: See Cuda; None if the model's device has no graphs.
    """

    def __init__(self, cuda: Cuda | None) -> None:
        self._cuda = cuda
        self._failure: str | None = None
        self.clear()

    def clear(self) -> None:
        """Drops all graphs, and their memory."""
        self._graphs: dict[Hashable, StepGraph] = {}
        self._seen: Counter[Hashable] = Counter()
        self._watch: Watch | None = None

    def step(self, trainer: "Trainer", idx: Tensor, targets: Tensor) -> Tensor | None:
        """Trains on a batch by a graph; see Trainer.step.

        Returns:
            The loss; None if the step must be done without a graph, and nothing has been done.
        """
        integers = idx.dtype == targets.dtype == torch.int64
        if not integers or idx.dim() != 2 or idx.shape != targets.shape:
            return None  # the caller raises the error, or takes the reference
        B, T = idx.shape
        graph = self._graph(trainer, (B, T), None)
        return None if graph is None else graph.step(trainer, (idx, targets), None)

    def step_at(self, trainer: "Trainer", ids: Tensor, starts: Tensor) -> Tensor | None:
        """Trains on windows of a text by a graph; see Trainer.step_at, and `step`."""
        shape = len(starts), trainer.gpt.config.block_size
        graph = self._graph(trainer, shape, ids)
        return None if graph is None else graph.step(trainer, None, starts)

    def obstacle(self, trainer: "Trainer") -> str | None:
        """Returns why steps run without a graph; None if they run with one."""
        if self._cuda is None and trainer.config.graph != "off":
            return f"the model is on device {str(trainer.device)!r}"
        return self._failure or obstacle(trainer) or observer()

    def _graph(
        self, trainer: "Trainer", shape: tuple[int, int], ids: Tensor | None
    ) -> StepGraph | None:
        if self._cuda is None or self._failure is not None:
            return None
        if self._watch is None or not self._watch.holds(trainer):
            self.clear()
            if obstacle(trainer) is not None:
                return None
            self._watch = Watch(trainer)
        if observer() is not None:
            return None
        # Gradients left by another backward add to the step's, and are not where the graph's are.
        if any(param.grad is not None for param in trainer.parameters):
            return None
        text = None if ids is None else (ids.data_ptr(), ids.dtype, ids.shape, ids.stride())
        which = shape, text
        graph = self._graphs.get(which)
        if graph is None and self._seen[which] and len(self._graphs) < MAX_GRAPHS:
            graph = self._graphs[which] = StepGraph(trainer, self._cuda, shape, ids)
        self._seen[which] += 1
        if graph is not None:
            try:
                graph.prepare(trainer)
            except RuntimeError as error:
                trainer.drop_grads()
                self._failure = f"the capture failed ({error})"
                self.clear()
                warnings.warn(f"training goes on without a CUDA graph: {error}", stacklevel=4)
                return None
        return graph
