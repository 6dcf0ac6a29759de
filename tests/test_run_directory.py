"""The directory of a run: what is in it, full disks, locks, damaged states."""

import errno
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_models import assert_same_weights, small_model
from training_steps import files_in, losses_of, quick, rows_in

from gptfast import checkpoint, files, lock
from gptfast.config import TrainConfig
from gptfast.errors import CheckpointError, ConfigError
from gptfast.training import Trainer, UnsavedError, run


def test_a_run_is_not_replaced_unasked(tmp_path):
    quick(tmp_path / "run", steps=1)
    with pytest.raises(ConfigError, match="run already holds a run"):
        quick(tmp_path / "run", steps=2)
    assert [row["step"] for row in rows_in(tmp_path / "run")] == [1]
    quick(tmp_path / "run", steps=2, overwrite=True)
    assert [row["step"] for row in rows_in(tmp_path / "run")] == [2]
    with pytest.raises(ConfigError, match="not both"):
        quick(tmp_path / "run", overwrite=True, resume=True)


def test_other_files_in_the_directory_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    quick(tmp_path, steps=1)
    quick(tmp_path, steps=1, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert files_in(tmp_path) == {"notes.txt", *run.FILES}


def test_there_must_be_a_run_to_resume(tmp_path):
    with pytest.raises(ConfigError, match="no run to resume"):
        quick(tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="needs the directory"):
        quick(resume=True)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_place_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda *a: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match="file is not a directory"):
            quick(out)
    if os.path.isdir("/proc/self"):  # even root cannot make a directory there
        with pytest.raises(CheckpointError, match="cannot be written there"):
            quick("/proc/self/run")


def test_a_full_disk_keeps_the_state_before(tmp_path, monkeypatch, disk_full):
    quick(tmp_path / "run", steps=4)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", disk_full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            quick(tmp_path / "run", steps=8, resume=True)
    assert files_in(tmp_path / "run") == set(run.FILES)
    result = quick(tmp_path / "run", steps=8, resume=True)
    assert losses_of(result.history) == losses_of(quick(steps=8).history)


def test_a_failed_save_costs_nothing(tmp_path, monkeypatch, disk_full):
    write, failing = files._write, [2, 3]  # of the saves at steps 4, 8, 12

    def full(path, content, durable):
        if path.name.startswith(checkpoint.WEIGHTS_NAME) and path.parent.name != run.BEST_NAME:
            saves.append(1)
            if len(saves) in failing:
                disk_full()
        write(path, content, durable)

    monkeypatch.setattr(files, "_write", full)
    saves = []
    whole = quick()
    with (
        pytest.warns(UserWarning, match="save at step 8 failed, training goes on: .*No space"),
        pytest.raises(UnsavedError, match="at step 12 failed.*`result`: .*No space") as caught,
    ):
        quick(tmp_path / "run")
    result = caught.value.result
    assert isinstance(caught.value, CheckpointError) and "\n" not in str(caught.value)
    assert losses_of(result.history) == losses_of(whole.history) and not result.model.training
    assert_same_weights(result.model, whole.model)
    # History and checkpoint are of step 4, from which the run continues.
    assert [row["step"] for row in rows_in(tmp_path / "run")] == [4]
    assert checkpoint.read_config(tmp_path / "run")["extra"]["step"] == 4
    failing[:] = []
    assert losses_of(quick(tmp_path / "run", resume=True).history) == losses_of(whole.history)


def test_a_save_after_a_failed_one_has_all_rows(tmp_path, monkeypatch, capsys, disk_full):
    save, saves = torch.save, []

    def full(*args):
        saves.append(1)
        if len(saves) == 1:
            disk_full()
        save(*args)

    monkeypatch.setattr(torch, "save", full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning goes to the terminal instead
        quick(tmp_path / "run", progress=True)
    assert "warning: the save at step 4 failed, training goes on: " in capsys.readouterr().err
    assert [row["step"] for row in rows_in(tmp_path / "run")] == [4, 8, 12]


def test_what_cannot_be_saved_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda *a: pytest.fail("trained"))
    trainer = Trainer(small_model(), TrainConfig(steps=1))
    with pytest.raises(TypeError, match="JSON"):
        trainer.fit(torch.ones(20).long(), out=tmp_path / "run", extra={"x": {1, 2}})
    assert not (tmp_path / "run").exists()


LOCKS = pytest.mark.skipif(lock.fcntl is None, reason="this system has no flock")


@LOCKS
def test_two_runs_do_not_share_a_directory(tmp_path, after_step):
    path, refused = tmp_path / "run", []

    def second():
        for options in ({"overwrite": True}, {"resume": True}, {"overwrite": True, "steps": 1}):
            with pytest.raises(ConfigError, match=r"run: another run is being trained there$"):
                quick(path, **options)
            refused.append(1)
        model, _ = checkpoint.load(path)  # reading needs no lock
        assert model.config.n_embd == 16 and len(rows_in(path)) == 1

    after_step(second, 6)
    result = quick(path)
    assert len(refused) == 3 and losses_of(result.history) == losses_of(quick().history)
    assert files_in(path) == set(run.FILES)
    after_step(lambda: None)
    assert quick(path, resume=True, steps=13).history[-1]["step"] == 13


@LOCKS
def test_of_runs_started_at_once_one_trains(tmp_path):
    start = threading.Barrier(4)

    def attempt(seed):
        start.wait()
        try:
            return quick(tmp_path / "run", seed=seed)
        except ConfigError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(attempt, range(4)))
    errors = [result for result in results if isinstance(result, str)]
    assert len(errors) == 3 and all("run" in error for error in errors)
    (only,) = (result for result in results if not isinstance(result, str))
    assert rows_in(tmp_path / "run") == only.history
    assert_same_weights(checkpoint.load(tmp_path / "run")[0], only.model)


@LOCKS
def test_a_dead_process_keeps_no_lock(tmp_path):
    hold = "import fcntl, os, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    path = tmp_path / run.LOCK_NAME
    for ending in ("os.kill(os.getpid(), 9)", "print('held', flush=True); sys.stdin.read()"):
        process = subprocess.Popen(
            [sys.executable, "-c", hold + ending, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if "held" in ending:
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(ConfigError, match="another run is being trained"):
                quick(tmp_path)
            process.kill()
        process.communicate()
        assert path.exists()  # it exists but contains no run
    quick(tmp_path, steps=1)


@LOCKS
@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_takes_runs(tmp_path, monkeypatch, name):
    def flock(*args):
        raise OSError(getattr(errno, name), "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    quick(tmp_path / "run", steps=1)
    assert files_in(tmp_path / "run") == set(run.FILES)


@LOCKS
def test_a_lock_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(CheckpointError, match=r"run: .* \(Read-only file system\)$"):
        quick(tmp_path / "run", steps=1)


@pytest.mark.parametrize("content", [b"", b"not a state", b"PK\x03\x04 torn"])
def test_a_damaged_state_is_one_sentence(tmp_path, content):
    quick(tmp_path / "run", steps=1)
    (tmp_path / "run" / run.STATE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or unreadable") as error:
        quick(tmp_path / "run", steps=2, resume=True)
    assert "\n" not in str(error.value)


def test_a_foreign_state_is_refused(tmp_path):
    quick(tmp_path / "run", steps=1)
    torch.save({"weights": {}}, tmp_path / "run" / run.STATE_NAME)
    with pytest.raises(CheckpointError, match="not a training state of gptfast"):
        quick(tmp_path / "run", steps=2, resume=True)
