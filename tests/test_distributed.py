"""Two processes that train one model, by gloo on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from pair import Pair
from small_models import assert_same_weights, same_weights
from torch import Tensor, distributed

from gptfast import (
    GPT,
    CheckpointError,
    ConfigError,
    GPTConfig,
    TrainConfig,
    Trainer,
    checkpoint,
    load,
    train,
)
from gptfast.training import reduction, sharding
from gptfast.training.callbacks import Callback
from gptfast.training.distributed import ProcessError, Processes, join, own_device, says

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(),
    reason="this torch has no gloo",
)
CONFIG = GPTConfig(block_size=8, vocab_size=7, n_layer=2, n_head=2, n_embd=16, dropout=0.0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    both = Pair(tmp_path_factory.mktemp("pair"))
    yield both
    both.close()


def make_model(config: GPTConfig = CONFIG) -> GPT:
    return GPT(config, generator=torch.Generator().manual_seed(1))


def processes() -> Processes:
    return join(torch.device("cpu"))


def _sums(sizes: list[int]) -> list[Tensor]:
    rank, results = distributed.get_rank(), []
    for n in sizes:
        x = torch.randn(n, generator=torch.Generator().manual_seed(rank))
        reduction.sum_(x)
        results.append(x)
    return results


def test_sums_are_in_the_order_of_ranks(pair: Pair) -> None:
    sizes = [1, 2, 7, 1000]
    for n, *sums in zip(sizes, *pair(_sums, sizes), strict=True):
        first, second = (torch.randn(n, generator=torch.Generator().manual_seed(r)) for r in (0, 1))
        for found in sums:
            assert torch.equal(found, first + second)


def _agreed() -> list[Any]:
    group = processes()
    group.wait()
    found: list[Any] = [group.gathered(group.rank, 0.1), group.from_first(lambda: group.rank)]

    def fail() -> None:
        raise CheckpointError("no room")

    with pytest.raises(CheckpointError, match="no room"):
        group.from_first(fail)
    return found


def test_processes_agree(pair: Pair) -> None:
    assert pair(_agreed) == 2 * [[[[0.0, 0.1], [1.0, 0.1]], 0]]


def test_one_process_is_alone() -> None:
    group = processes()
    assert (group.rank, group.size, group.first) == (0, 1, True)
    assert group.gathered(1.0) == [[1.0]] and group.from_first(lambda: 5) == 5
    group.wait()


def _gradients(parallel: Any, tied: bool) -> list[Tensor]:
    config = TrainConfig(parallel=parallel)
    model = sharding.shared(make_model(), config, processes())
    rows = torch.arange(24).view(3, 8) % 7
    own = rows[:2] if distributed.get_rank() == 0 else rows[2:]
    loss = model(own, targets=own)
    loss.backward(torch.tensor(len(own) / 3))
    return [sharding.whole(param.grad) for param in model.parameters() if param.grad is not None]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_are_those_of_the_joint_batch(pair: Pair, parallel: str) -> None:
    model, rows = make_model(), torch.arange(24).view(3, 8) % 7
    for part in rows[:2], rows[2:]:
        model.loss(part, part).backward(torch.tensor(len(part) / 3))
    for found in pair(_gradients, parallel, False):
        for own, param in zip(found, model.parameters(), strict=True):
            assert param.grad is not None and torch.equal(own, param.grad)


TEXT = "the quick brown fox jumps over the lazy dog; " * 3
OPTIONS: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 7, "steps": None,
    "epochs": 1, "dropout": 0.2, "val_fraction": 0.3, "text_fraction": 1.0, "clip": None,
}  # fmt: skip
Outcome = tuple[dict[str, Tensor], list[float], list[int]]


def _trained(**options: Any) -> Outcome:
    result = train("abc", text=TEXT, progress=False, **OPTIONS | options)
    return (
        result.model.state_dict(),
        [row["val_loss"] for row in result.history],
        [row["step"] for row in result.history],
    )


def _train(options: dict[str, Any]) -> Outcome:
    return _trained(**options)


def is_same(one: Outcome, other: Outcome) -> bool:
    return same_weights(one[0], other[0]) and one[1:] == other[1:]


DECAYED = {"ema": 0.9, "weight_decay": 0.1, "decayed": "matrices"}


@pytest.mark.parametrize(
    "options",
    [
        {"parallel": "ddp"},
        {"parallel": "fsdp"},
        {"parallel": "ddp", "batch_size": 43},  # the last one has one row, for the first process
        {"parallel": "fsdp", "batch_size": 43, **DECAYED},
        {"parallel": "ddp", "clip": 0.1, "recompute": True, **DECAYED},
        {"parallel": "fsdp", "recompute": True, "label_smoothing": 0.1, "schedule": "cosine"},
        {"parallel": "fsdp", "precision": "bf16"},
    ],
)
def test_two_processes_have_the_bits_of_one_with_two_parts(
    pair: Pair, options: dict[str, Any]
) -> None:
    alone = _trained(accumulation_steps=2, **options)
    for found in pair(_train, options):
        assert is_same(found, alone)


def _close(one: Outcome, other: Outcome) -> None:
    for name, weight in one[0].items():
        torch.testing.assert_close(weight, other[0][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"parallel": "fsdp", "clip": 0.1},  # the norm is summed in another order
        {"parallel": "fsdp", "clip": 0.1, "backend": "reference"},
        {"parallel": "ddp", "accumulation_steps": 2},
        {"parallel": "fsdp", "accumulation_steps": 2},
    ],
)
def test_two_processes_train_as_one(pair: Pair, options: dict[str, Any]) -> None:
    # A bias of keys has no gradient but rounding errors, which AdamW makes as large as any other.
    options = {"bias": False, **options}
    alone = _trained(**options | {"accumulation_steps": 2 * options.get("accumulation_steps", 1)})
    first, second = pair(_train, options)
    assert is_same(first, second)
    _close(first, alone)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(
    pair: Pair, tmp_path: Path, parallel: str
) -> None:
    options = {"steps": 8, "eval_every": 2, **DECAYED, "parallel": parallel}
    undisturbed = _trained(accumulation_steps=2, **options)
    pair(_train, {**options, "steps": 3, "out": tmp_path})
    halfway = {"steps": 5, "out": tmp_path, "resume": True, "accumulation_steps": 2}
    _trained(**options | halfway)
    for found in pair(_train, {**options, "out": tmp_path, "resume": True}):
        assert_same_weights(found[0], undisturbed[0])
    assert_same_weights(load(tmp_path)[0], undisturbed[0])
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3, 4, 5, 6, 8]


class _Stops(Callback):
    def on_step(self, run: Any) -> None:
        assert distributed.get_rank() == 0, "callbacks are the first one's"
        if run.state.step == 3:
            run.stop()


def _ended(out: Path, by_signal: bool) -> tuple[int | None, bool, int]:
    calls, usual = [], Trainer.step_at

    def step_at(trainer: Trainer, ids: Tensor, starts: Tensor) -> Tensor:
        calls.append(1)
        if by_signal and distributed.get_rank() == 1 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(trainer, ids, starts)

    options = {**OPTIONS, "steps": 50, "out": out}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "step_at", step_at)
        callbacks = () if by_signal else (_Stops(),)
        result = train("abc", text=TEXT, progress=False, callbacks=callbacks, **options)
    return result.signal, result.interrupted, len(calls)


def test_a_signal_to_one_process_ends_all_at_one_step(pair: Pair, tmp_path: Path) -> None:
    first, second = pair(_ended, tmp_path, True)
    assert first == second == (signal.SIGTERM, True, 3)
    assert checkpoint.read_config(tmp_path)["extra"]["step"] == 3


def test_a_callback_of_the_first_ends_all(pair: Pair, tmp_path: Path) -> None:
    first, second = pair(_ended, tmp_path, False)
    assert first == second == (None, False, 5)
    assert checkpoint.read_config(tmp_path)["extra"]["step"] == 5


def _refused(**options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        _trained(**options)
    return str(caught.value)


def _refusal(options: dict[str, Any]) -> str:
    return _refused(**options)


def test_a_mistake_is_the_same_sentence_in_all(pair: Pair, tmp_path: Path) -> None:
    pair(_train, {"steps": 1, "out": tmp_path})
    for options in ({"out": tmp_path}, {"out": tmp_path, "resume": True, "lr": 1.0}):
        first, second = pair(_refusal, {"steps": 1, **options})
        assert first == second and str(tmp_path) in first


def _torchrun(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    told = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (told | variables).items():
        monkeypatch.setenv(name, value)


def test_processes_that_do_not_find_each_other_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _torchrun(monkeypatch)
    with pytest.raises(ProcessError, match="^the processes did not find each other: "):
        join(torch.device("cpu"), timedelta(seconds=1))


def test_each_process_of_a_machine_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, chosen = torch.device("cuda"), []
    assert own_device(gpu) == gpu
    _torchrun(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert own_device(gpu) == torch.device("cuda", 1) == chosen[0]
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ConfigError, match="need a GPU each, device 'cuda', got device 'cuda:0' on"):
        own_device(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="^2 processes on this machine need a GPU each"):
        own_device(gpu)


def test_a_sentence_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert says("a mistake") and says("a mistake")  # alone
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _torchrun(monkeypatch, MASTER_PORT=str(store.port))
    assert [says("a mistake"), says("another"), says("a mistake")] == [True, True, False]


COMMAND = "train abc --train.epochs None --train.batch-size 4 --train.save-every 1"


def _launch(out: Path, *options: str) -> "subprocess.Popen[str]":
    text = out.parent / "text.txt"
    text.write_text(TEXT)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + ["-m", "gptfast", *COMMAND.split(), "--data", str(text), "--out", str(out), *options],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _worker(launcher: int, rank: int) -> int:
    """The process of a rank that torchrun has started."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        told = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in told:
            return int(child)
    raise AssertionError(f"torchrun has no process of rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_process_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = _launch(out, "--train.steps", "1000000")
    try:
        while not (out / "model.safetensors").exists():
            assert run.poll() is None, run.communicate()
            time.sleep(0.05)
        os.kill(_worker(run.pid, 1), signal.SIGKILL)
        _, errors = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 1, errors
    [sentence] = [line for line in errors.splitlines() if line.startswith("gptfast: ")]
    assert sentence.startswith("gptfast: another process of the run has ended, or did not answer")
    assert sentence.endswith(f"{out} keeps the last checkpoint, if any")
    step = checkpoint.read_config(out)["extra"]["step"]
    data = str(tmp_path / "text.txt")
    result = train("abc", out, data=data, resume=True, steps=step + 2, batch_size=4, save_every=1)
    assert result.history[-1]["step"] == step + 2
