"""The training step as a graph, simulated: the operators of one step, done again as they were.

A CUDA graph repeats kernels at the addresses of the capture, and no Python. `Recorder` does the
same on the CPU: it notes each operator's tensors, and a replay calls it with them and writes its
results where the first ones were. AdamW runs by the CPU's kernel, or in Triton's interpreter.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from training_steps import assert_same, batch_of, interrupt, losses_of

from gptfast import GPT, ConfigError, GPTConfig, TrainConfig, Trainer
from gptfast.config import Precision
from gptfast.ops import select
from gptfast.ops.adamw import OPTIONS, adamw_
from gptfast.training import graph

pytest.importorskip("triton")
from gptfast.ops.triton import KERNELS, adamw  # noqa: E402

if torch.cuda.is_available() or select.unavailable("cpu", torch.float32):
    pytest.skip("needs Triton's interpreter and the compiled extension", allow_module_level=True)

MODEL = GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_embd=16, bias=False, dropout=0.2)
CONFIG = TrainConfig(lr=1e-2, clip=0.5, batch_size=4, weight_decay=0.1)
IDS = torch.randint(1, 5, (40,), generator=torch.Generator().manual_seed(7))  # 32 windows


class Recorder(TorchDispatchMode):
    """Notes the operators that run, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []
        self.inputs: set[int] = set()  # storages that were there before
        self.own: dict[int, Tensor] = {}  # those of results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note(args, kwargs)
        result = func(*args, **(kwargs or {}))
        results = tensors(result)
        for each in results:
            storage = each.untyped_storage().data_ptr()
            if storage not in self.inputs:
                self.own.setdefault(storage, each)
        if "empty" not in func.name():  # which launches nothing
            self.calls.append((func, args, kwargs or {}, results))
        return result

    def _note(self, args: Any, kwargs: Any) -> None:
        for each in tensors((args, kwargs)):
            storage = each.untyped_storage().data_ptr()
            if storage not in self.own:
                self.inputs.add(storage)

    def replay(self) -> None:
        for each in self.own.values():  # what a step leaves behind must not matter to the next one
            each.fill_(math.nan if each.is_floating_point() else -1)
        for func, args, kwargs, results in self.calls:
            for new, old in zip(tensors(func(*args, **kwargs)), results, strict=True):
                if new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr():
                    old.copy_(new)


def tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_flatten(values)[0] if isinstance(each, Tensor)]


class HostTable:
    """In the place of `adamw.PointerTable`: AdamW by the CPU's kernel, by options in memory."""

    def __init__(self, *args: Any, memory: Tensor | None) -> None:
        *self.tensors, self.groups = args
        self.uploaded = False
        self.memory = torch.zeros(1) if memory is None else memory

    def upload(self) -> None:
        self.uploaded = True

    def update(self, numbers: Tensor) -> Tensor:
        assert self.uploaded
        options, decays = numbers.tolist()[:OPTIONS], numbers.tolist()[OPTIONS:]
        return adamw_(*self.tensors, [decays[group] for group in self.groups], *options)


class Simulated(graph.Cuda):
    """A device whose graphs are recorded operators."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.captures, self.replays = 0, 0
        self.recorder: Recorder | None = None

    def note_updates(self, table: Any) -> Any:
        """A class of tables whose updates are part of a graph."""

        class Noted(table):  # type: ignore[misc]
            def update(own, numbers: Tensor) -> Tensor:  # noqa: N805
                update = super().update
                if self.recorder is None:
                    return update(numbers)
                self.recorder.calls.append((lambda: update(numbers) and None, (), {}, []))
                return torch.tensor(math.nan)

        return Noted

    def host_buffer(self, words: int) -> Tensor:
        return torch.zeros(words, dtype=torch.int64)

    def event(self) -> Any:
        return SimpleNamespace(synchronize=lambda: None, record=lambda _: None)

    def record(self, event: Any) -> None:
        event.record(None)

    def rehearse(self, run: graph.Run) -> Tensor:
        return run()

    def capture(self, run: graph.Run) -> graph.Run:
        self.captures += 1
        self._pending = []
        recorder = self.recorder = Recorder()
        try:
            with recorder:
                result = run()
        finally:
            self.recorder = None
        for action in self._pending:
            action()
        self._pending = None

        def replay() -> Tensor:
            self.replays += 1
            with torch.no_grad():
                recorder.replay()
            return result

        return replay


def trainer_of(cuda: Simulated | None, config: TrainConfig = CONFIG, **options: Any) -> Trainer:
    """A trainer with graphs on this device; None: on the CPU, which has none."""
    trainer = Trainer(
        GPT(replace(MODEL, **options), generator=torch.Generator().manual_seed(3)), config
    )
    trainer.graphs = graph.StepGraphs(cuda)
    return trainer


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    device = Simulated()
    monkeypatch.setattr(adamw, "PointerTable", device.note_updates(HostTable))
    return device


def batch(i: int, B: int = 4, T: int = 8) -> tuple[Tensor, Tensor]:
    return batch_of(i, B, T, MODEL.vocab_size)


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("options", ({}, {"dropout": 0.0, "tie_weights": True, "attention": False}))
def test_steps_have_the_bits_of_those_without_a_graph(
    cuda: Simulated, precision: Precision, options: dict[str, Any]
) -> None:
    config = replace(CONFIG, precision=precision)
    if options:
        config = replace(config, decayed="matrices", ema=0.9)
    captured, plainly = trainer_of(cuda, config, **options), trainer_of(None, config, **options)
    losses = [(captured.step(*batch(i)), plainly.step(*batch(i))) for i in range(6)]
    assert all(torch.equal(a, b) for a, b in losses)  # no step has overwritten an earlier loss
    assert_same(captured, plainly)
    # Two steps without a graph, since the first one makes the moments, and a rehearsal.
    assert (cuda.captures, cuda.replays) == (1, 3)


def test_a_graph_recomputes_and_smooths_as_the_step_does(cuda: Simulated) -> None:
    config = replace(CONFIG, recompute=True, label_smoothing=0.1)
    captured, plainly = trainer_of(cuda, config), trainer_of(None, config)
    for i in range(6):
        assert torch.equal(captured.step(*batch(i)), plainly.step(*batch(i)))
        if i == 4:
            captured.gpt.recompute = False  # is noticed
    assert_same(captured, plainly)
    assert (cuda.captures, cuda.replays) == (1, 2)


def test_a_graph_reads_the_addresses_of_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, library = Simulated(), torch.library.Library("gptfast", "IMPL")
    monkeypatch.setattr(adamw, "PointerTable", cuda.note_updates(adamw.PointerTable))
    library.impl("adamw_", KERNELS["adamw_"], "CPU", allow_override=True)
    try:
        config = replace(CONFIG, decayed="matrices", ema=0.9)
        captured, plainly = trainer_of(cuda, config), trainer_of(None, config)
        for i in range(5):
            assert torch.equal(captured.step(*batch(i)), plainly.step(*batch(i)))
        assert cuda.replays == 2
        assert_same(captured, plainly)
    finally:
        library._destroy()


def test_what_changes_from_outside_counts(cuda: Simulated) -> None:
    """The options of the optimizer and the weights without, what the graph holds with a capture."""
    config = replace(CONFIG, decayed="matrices")
    captured, plainly = trainer_of(cuda, config), trainer_of(None, config)
    captures = []
    for i in range(22):
        for each in (captured, plainly):
            if i == 4:
                for group in each.optimizer.param_groups:
                    group["lr"] = 1e-4
                each.optimizer.param_groups[1]["weight_decay"] = 0.5
                each.gpt.wpe.weight.data.mul_(0.5)
                each.evaluate(IDS)
            if i == 6:
                each.optimizer.load_state_dict(
                    copy.deepcopy(each.optimizer.state_dict())
                )  # moments elsewhere
            if i == 9:
                each.gpt.lm_head.weight.requires_grad_(False)
            if i == 13:
                each.gpt.config = replace(each.gpt.config, dropout=0.5)
            if i == 17:
                for param in each.parameters:
                    each.optimizer.state[param] = {}
        assert torch.equal(captured.step(*batch(i)), plainly.step(*batch(i))), i
        captures.append(cuda.captures)
    assert captures == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 5, 5]
    assert_same(captured, plainly)


def test_moments_loaded_several_times_are_noticed(cuda: Simulated) -> None:
    """The dictionary of the last ones may lie where the first ones' did."""
    captured, plainly = trainer_of(cuda), trainer_of(None)
    for i in range(16):
        if i in (4, 8, 12):
            for each in (captured, plainly):
                state = copy.deepcopy(each.optimizer.state_dict())
                for moments in state["state"].values():
                    moments["exp_avg"].zero_()
                for _ in range(i // 4 + 1):
                    each.optimizer.load_state_dict(copy.deepcopy(state))
        assert torch.equal(captured.step(*batch(i)), plainly.step(*batch(i))), i
    assert_same(captured, plainly)
    assert cuda.captures == 4


@pytest.mark.parametrize("at", (3, 5))  # before the capture, before a replay
def test_gradients_that_were_left_count_once(cuda: Simulated, at: int) -> None:
    captured, plainly = trainer_of(cuda), trainer_of(None)
    for i in range(8):
        if i == at:
            for each in (captured, plainly):
                each.gpt.loss(*batch(99), seed=1).backward()
        assert torch.equal(captured.step(*batch(i)), plainly.step(*batch(i))), i
    assert_same(captured, plainly)
    assert cuda.captures == 1 and all(param.grad is None for param in captured.parameters)


def test_texts_at_one_address_are_told_apart(cuda: Simulated) -> None:
    captured, plainly = trainer_of(cuda), trainer_of(None)
    starts = torch.arange(4)
    for i, ids in enumerate([IDS] * 5 + [IDS[::2]] * 4):
        losses = captured.step_at(ids, starts), plainly.step_at(ids, starts)
        assert torch.equal(*losses), i
    assert_same(captured, plainly)
    assert cuda.captures == 2


def test_the_kernels_writes_are_told_to_autograd(cuda: Simulated) -> None:
    trainer = trainer_of(cuda)
    for i in range(5):
        before = [param._version for param in trainer.parameters]
        trainer.step(*batch(i))
        assert all(param._version > version
                   for param, version in zip(trainer.parameters, before, strict=True))  # fmt: skip


def test_each_shape_has_a_graph_up_to_a_number(
    cuda: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "MAX_GRAPHS", 2)
    captured, plainly = trainer_of(cuda), trainer_of(None)
    shapes = [(4, 8), (3, 8), (4, 5)]
    for i, (B, T) in enumerate(shapes[:1] * 2 + shapes * 4):
        assert torch.equal(captured.step(*batch(i, B, T)), plainly.step(*batch(i, B, T))), i
    assert cuda.captures == 2
    assert_same(captured, plainly)


@pytest.mark.parametrize("cut", (5, 8))
def test_a_run_with_odd_batches_is_resumed_with_the_same_bits(
    cuda: Simulated, tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch has six whole batches and one of two windows, and is cut within or after a graph."""
    config = replace(CONFIG, epochs=2, batch_size=5, eval_every=5)
    plainly = trainer_of(None, config)
    expected = plainly.fit(IDS, IDS[:20])
    interrupt(monkeypatch, cut)
    first = trainer_of(cuda, config).fit(IDS, IDS[:20], out=tmp_path / "run")
    assert first.interrupted and cuda.captures == 1
    resumed = trainer_of(cuda, config)
    result = resumed.fit(IDS, IDS[:20], out=tmp_path / "run", resume=True)
    assert losses_of(result.history) == losses_of(expected.history)
    assert [row["step"] for row in result.history] == [5, 10, 14]
    assert_same(resumed, plainly)
    assert not resumed.graphs._graphs  # their memory is not kept after the run


class Own(GPT):
    """A class of a user's."""


def hooked(trainer: Trainer) -> None:
    trainer.gpt.h[0].register_forward_hook(lambda *args: None)


def hooked_backward(trainer: Trainer) -> None:
    trainer.gpt.ln_f.register_full_backward_hook(lambda *args: None)


def hooked_gradient(trainer: Trainer) -> None:
    trainer.gpt.wpe.weight.register_hook(lambda grad: None)


def of_another_class(trainer: Trainer) -> None:
    trainer.gpt.__class__ = Own


def with_dropout_of_its_own(trainer: Trainer) -> None:
    trainer.gpt.h[0].mlp = nn.Sequential(trainer.gpt.h[0].mlp, nn.Dropout(0.1))


def inside_a_wrapper(trainer: Trainer) -> None:
    trainer.model = nn.DataParallel(trainer.gpt)


def by_the_reference(trainer: Trainer) -> None:
    trainer.gpt.backend = "reference"


def with_amsgrad(trainer: Trainer) -> None:
    trainer.optimizer.param_groups[0]["amsgrad"] = True


def switched_off(trainer: Trainer) -> None:
    trainer.config = replace(trainer.config, graph="off")


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        (hooked, "h.0 has hooks"),
        (hooked_backward, "ln_f has hooks"),
        (hooked_gradient, "wpe.weight has hooks"),
        (of_another_class, "the model is a .*Own"),
        (with_dropout_of_its_own, r"h.0.mlp is a torch\..*Sequential"),
        (inside_a_wrapper, "the model is inside a DataParallel"),
        (by_the_reference, "the model computes in plain torch"),
        (with_amsgrad, "the optimizer's kernels do not have its options"),
        (switched_off, "graph is 'off'"),
    ),
)
def test_what_a_graph_would_overlook_is_done_without_one(
    cuda: Simulated, change: Callable[[Trainer], None], reason: str
) -> None:
    trainer = trainer_of(cuda)
    assert trainer.graphs.obstacle(trainer) is None
    change(trainer)
    assert re.fullmatch(reason, trainer.graphs.obstacle(trainer) or "")
    for i in range(4):
        trainer.step(*batch(i))
    assert cuda.captures == 0


def test_observers_of_everything_see_every_step(cuda: Simulated) -> None:
    trainer = trainer_of(cuda)
    calls: list[int] = []
    hook = nn.modules.module.register_module_forward_hook(lambda *args: calls.append(1))
    try:
        assert trainer.graphs.obstacle(trainer) == "there are hooks on all modules"
    finally:
        hook.remove()
    with TorchDispatchMode():
        assert trainer.graphs.obstacle(trainer) == "a dispatch mode observes the operators"
    with torch.autograd.detect_anomaly(check_nan=False):
        assert trainer.graphs.obstacle(trainer) == "anomalies are looked for"
    assert trainer.graphs.obstacle(trainer) is None
    assert trainer_of(None).graphs.obstacle(trainer) == "the model is on device 'cpu'"


def test_a_capture_that_fails_is_told_and_costs_nothing(
    cuda: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured, plainly = trainer_of(cuda), trainer_of(None)

    def fail(run: graph.Run) -> graph.Run:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda, "capture", fail)
    with pytest.warns(UserWarning, match="goes on without a CUDA graph: operation not") as caught:
        for i in range(6):
            assert torch.equal(captured.step(*batch(i)), plainly.step(*batch(i)))
    assert len(caught) == 1 and caught[0].filename == __file__
    assert_same(captured, plainly)
    assert "the capture failed" in (captured.graphs.obstacle(captured) or "")


def test_a_wrong_batch_is_refused_as_without_a_graph(cuda: Simulated) -> None:
    trainer = trainer_of(cuda)
    for i in range(4):
        trainer.step(*batch(i))
    idx, targets = batch(0)
    for wrong in (idx.float(), idx[0], idx.int()):
        with pytest.raises(ValueError, match=r"idx must be a \(B, T\) int64 tensor"):
            trainer.step(wrong, targets)
    with pytest.raises(ValueError, match="at most block_size=8 positions"):
        trainer.step(*batch(0, T=9))


@pytest.mark.parametrize("count", (7, 8))
def test_the_host_waits_for_a_buffer_that_has_not_been_read(cuda: Simulated, count: int) -> None:
    waits: list[int] = []
    numbers = itertools.count()

    def event() -> Any:
        own = next(numbers)
        return SimpleNamespace(synchronize=lambda: waits.append(own), record=lambda _: None)

    cuda.event = event  # type: ignore[method-assign]
    messages = graph.Messages(count, 2, 2, torch.device("cpu"), cuda)
    for i in range(graph.SLOTS + 1):
        options = (float(i), 0.9, 0.99, 1e-8, math.inf, 0.0, 0.1, 0.2)[:count]
        keys = [torch.tensor(2**61 + i), torch.tensor(i)]
        messages.send(options, keys, torch.tensor([i, 7]))
        assert messages.numbers.tolist() == list(options)
        assert [key.item() for key in messages.keys] == [2**61 + i, i]
        assert messages.starts.tolist() == [i, 7]
    assert waits == [*range(graph.SLOTS), 0]
    for each in (messages.numbers, *messages.keys, messages.starts):
        # Their kernels are those of tensors at usual addresses.
        assert (each.data_ptr() - messages.numbers.data_ptr()) % 16 == 0


@pytest.mark.parametrize("value", ("on", True, None))
def test_the_option_has_two_values(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"graph must be one of \('auto', 'off'\), got"):
        TrainConfig(graph=value)


def test_a_note_says_whether_there_is_a_graph(cuda: Simulated) -> None:
    trainer = trainer_of(cuda)
    assert trainer.note() is None  # on the CPU there is nothing to say
    trainer.device = torch.device("cuda")
    assert trainer.note() == "each step is one CUDA graph"
    trainer.config = replace(trainer.config, graph="off")
    assert trainer.note() == "steps run without a CUDA graph: graph is 'off'"
