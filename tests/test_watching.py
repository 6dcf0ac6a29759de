"""What watches a run: callbacks, samples, records of the directory, the bar, trackers."""

import functools
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import training_steps
from torch.utils.flop_counter import FlopCounterMode

from gptfast import (
    GPT,
    Callback,
    ConfigError,
    DataError,
    GPTConfig,
    TrainConfig,
    data,
    generate,
)
from gptfast.cli import main
from gptfast.presets import Preset
from gptfast.training import Sampler, TensorBoard, Tracker, WandB, run
from gptfast.training.watching import machine, progress

TEXT = data.abc_corpus()[:600]
TINY = Preset(
    name="tiny",
    model=GPTConfig(block_size=8, n_layer=1, n_head=2, n_embd=8),
    train=TrainConfig(lr=1e-2, batch_size=4, steps=6, eval_every=2),
)
quick = functools.partial(training_steps.quick, chosen=TINY, text=TEXT)


def numbers(history):
    """What of a history does not depend on time."""
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_s", "seconds")} for row in history
    ]


def samples_in(path):
    lines = (path / run.SAMPLES_NAME).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class Notes(Callback):
    """Notes each call; `act` may do something at one of them."""

    def __init__(self, act=None):
        self.calls, self.act = [], act or (lambda what, run: None)

    def _note(self, what, run):
        self.calls.append(f"{what}{run.state.step}")
        self.act(what, run)

    def on_start(self, run):
        self._note("start", run)

    def on_step(self, run):
        assert run.loss > 0
        self._note("step", run)

    def on_evaluation(self, run, row):
        assert row is run.state.history[-1]
        self._note("evaluation", run)

    def on_save(self, run):
        assert (run.path / run.directory.path.joinpath("model.safetensors")).exists()
        self._note("save", run)

    def on_end(self, run):
        self._note("end", run)


# ---- the hooks


def test_a_callback_is_called_in_order(tmp_path):
    notes = Notes()
    quick(tmp_path / "run", steps=4, callbacks=[notes])
    wanted = "start0 step1 step2 evaluation2 save2 step3 step4 evaluation4 save4 end4"
    assert " ".join(notes.calls) == wanted
    quick(tmp_path / "run", steps=5, resume=True, callbacks=[again := Notes()])
    assert " ".join(again.calls) == "start4 step5 evaluation5 save5 end5"


def test_a_callback_that_watches_changes_nothing(tmp_path):
    watched = quick(tmp_path / "run", sample="AB", progress=True, callbacks=[Notes()])
    assert numbers(watched.history) == numbers(quick().history)


@pytest.mark.parametrize(
    "where, ended", [("start", ["end0", "start0"]), ("step", ["end1", "end1"])]
)
def test_an_error_ends_the_run_and_every_callback_that_has_begun(where, ended):
    errors = []

    def act(what, run):
        if what == where:
            raise OSError("full")

    def note_error(what, run):
        if what == "end":
            errors.append(run.error)

    first, second = Notes(note_error), Notes(act)
    with pytest.raises(OSError, match="full"):
        quick(callbacks=[first, second])
    assert [each.calls[-1] for each in (first, second)] == ended
    assert str(errors[0]) == "full"


# ---- samples


def test_samples_are_kept_and_shown(tmp_path, capsys):
    quick(tmp_path / "run", sample="AB", progress=True)
    samples = samples_in(tmp_path / "run")
    assert [each["step"] for each in samples] == [2, 4, 6]
    assert {each["prompt"] for each in samples} == {"AB"}
    assert all(150 < len(each["text"]) <= 200 for each in samples)
    assert f"AB{samples[-1]['text']}" in capsys.readouterr().err


def test_samples_go_on_with_the_run(tmp_path):
    quick(tmp_path / "whole", sample="AB")
    quick(tmp_path / "run", sample="AB", steps=4)
    with open(tmp_path / "run" / run.SAMPLES_NAME, "a") as file:  # after the last save, by a crash
        file.write('{"step": 6, "prompt": "AB", "text": "no"}\n{"step": 8, "pro')
    quick(tmp_path / "run", sample="AB", resume=True)
    assert samples_in(tmp_path / "run") == samples_in(tmp_path / "whole")
    quick(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / run.SAMPLES_NAME).exists()


def test_a_sample_is_what_generate_gives(tmp_path):
    """With the kernels and with the reference, whose model is in training mode then."""
    result = quick(tmp_path / "fused", sample="AB", ema=0.5)
    [own] = generate(
        result.model, ["AB"], tokenizer=result.tokenizer, max_new_tokens=200, temperature=0.8
    )
    assert samples_in(tmp_path / "fused")[-1]["text"] == own.text
    state = torch.get_rng_state()
    quick(tmp_path / "reference", sample="AB", ema=0.5, steps=2, backend="reference")
    assert (
        samples_in(tmp_path / "reference")[0]["text"] == (samples_in(tmp_path / "fused")[0]["text"])
    )
    assert bool((torch.get_rng_state() == state).all())


def test_a_sample_needs_a_text_that_the_tokenizer_knows(tmp_path):
    with pytest.raises(DataError, match="'z'"):
        quick(tmp_path / "run", sample="Az")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        Sampler("A", None)


# ---- the records of the directory


def test_the_directory_explains_the_run(tmp_path):
    path = tmp_path / "run"
    quick(path, sample="AB")
    assert sorted(each.name for each in path.iterdir() if each.name != run.LOCK_NAME) == sorted(
        "best config.json history.jsonl loss.png machine.json model.safetensors run.toml"
        " samples.jsonl training_state.pt".split()
    )
    card = json.loads((path / run.MACHINE_NAME).read_text())
    assert card["torch"] == torch.__version__ and card["threads"] == torch.get_num_threads()
    assert card["peak_gflops"] > 0 and card["processor"] and card["precision"] == "fp32"
    assert (path / run.PLOT_NAME).read_bytes().startswith(b"\x89PNG")


def test_one_evaluation_makes_no_picture(tmp_path):
    quick(tmp_path / "run", eval_every=6)
    assert not (tmp_path / "run" / run.PLOT_NAME).exists()


def test_the_peak_is_measured_once():
    device = torch.device("cpu")
    machine.peak(device, "fp32")
    hits = machine._peak.cache_info().hits
    assert machine.peak(device, "fp32") > 0
    assert machine._peak.cache_info().hits == hits + 1


@pytest.mark.parametrize("attention", [True, False])
def test_the_flops_are_those_that_torch_counts(attention):
    config = GPTConfig(
        block_size=8, vocab_size=11, n_layer=3, n_head=2, n_embd=8, attention=attention, dropout=0.0
    )
    model, tokens = GPT(config, backend="reference"), torch.ones(2, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, tokens).backward()
    masked = 3 * 3 * (4 * 8 * 8 - 2 * 8 * 9) * 16 if attention else 0
    assert counter.get_total_flops() == machine.flops_per_token(config) * 16 + masked


# ---- the bar


def test_the_bar_shows_the_part_of_the_peak(capsys):
    quick(progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "tokens/s" in shown and "% of peak" in shown
    assert "interrupted" not in shown


def test_the_bar_is_updated_few_times_a_second(monkeypatch):
    shown = []
    asked = []
    clock = SimpleNamespace(perf_counter=lambda: 1000.0 + 0.03 * len(asked))
    monkeypatch.setattr(progress, "time", clock)

    class Bar(progress.ProgressBar):
        def on_step(self, run):
            asked.append(run.state.step)
            super().on_step(run)

        def _show(self, run, loss, speed):
            shown.append(run.state.step)

    quick(steps=20, eval_every=20, callbacks=[Bar()])
    assert shown == [1, 5, 9, 13, 17, 20]


# ---- trackers


class Sent(Tracker):
    def __init__(self, every):
        super().__init__(every)
        self.sent = []

    def send(self, step, numbers):
        self.sent.append((step, numbers))


def test_a_tracker_gets_losses_and_rows():
    sent = Sent(2)
    rows = quick(eval_every=3, callbacks=[sent]).history
    assert [(step, "loss/steps" in each) for step, each in sent.sent] == [
        (2, True), (3, False), (4, True), (6, True), (6, False),
    ]  # fmt: skip
    row = sent.sent[1][1]
    assert row["loss/training"] == rows[0]["train_loss"]
    assert row["loss/held-out"] == rows[0]["val_loss"] and row["lr"] == 1e-2


def test_tensorboard_reads_the_run(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path = tmp_path / "run"
    quick(path, steps=2, overwrite=True, callbacks=[TensorBoard(every=1)])
    quick(path, steps=4, overwrite=True, callbacks=[TensorBoard(every=1)])
    quick(path, steps=6, resume=True, callbacks=[TensorBoard(every=1)])
    events = accumulator.EventAccumulator(str(path / "tensorboard")).Reload()
    assert [each.step for each in events.Scalars("loss/steps")] == [1, 2, 3, 4, 5, 6]
    held_out = [each.value for each in events.Scalars("loss/held-out")]
    assert held_out == pytest.approx([row["val_loss"] for row in quick().history])
    with pytest.raises(ConfigError, match="needs a directory"):
        quick(callbacks=[TensorBoard()])


def test_wandb_gets_the_run(tmp_path, monkeypatch):
    opened, logged = [], []

    class Run:
        def log(self, numbers, step):
            logged.append((step, sorted(numbers)))

        def finish(self, exit_code):
            logged.append(exit_code)

    def init(**options):
        opened.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    quick(tmp_path / "run", steps=2, callbacks=[WandB("project", every=2)])
    quick(tmp_path / "run", steps=4, resume=True, callbacks=[WandB("project")])
    assert opened[0]["id"] == opened[1]["id"] and opened[0]["project"] == "project"
    assert opened[0]["config"]["train"]["lr"] == 1e-2 and opened[0]["name"] == "run"
    json.dumps(opened[0]["config"])
    assert logged[0] == (2, ["loss/steps"]) and logged[1][0] == 2 and logged[2] == 0


def test_wandb_itself_takes_the_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    quick(tmp_path / "run", steps=2, callbacks=[WandB("project", every=1)])
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    "module, make, extra",
    [
        ("torch.utils.tensorboard", TensorBoard, "tensorboard"),
        ("wandb", lambda: WandB("project"), "wandb"),
    ],
)
def test_a_missing_package_is_one_sentence(monkeypatch, module, make, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"is missing: pip install 'gptfast-kernels\[{extra}\]'"):
        make()


# ---- the command line


def test_the_command_line_tracks_and_compares(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    text, runs = tmp_path / "text.txt", [tmp_path / "a", tmp_path / "b"]
    text.write_text(TEXT)
    small = "--train.steps=2 --train.eval-every=1 --model.n-embd=8 --model.n-layer=1".split()
    for path in runs:
        command = ["train", "abc", "--data", str(text), "--out", str(path), "--tensorboard"]
        assert main([*command, *small, "--train.sample=A"]) == 0
        assert list((path / "tensorboard").iterdir()) and samples_in(path)
    for show in ("loss", "perplexity", "lr"):
        picture = tmp_path / f"{show}.png"
        assert main(["plot", *map(str, runs), "--out", str(picture), "--show", show]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(["plot", "--out", "x.png"]) == 2
    assert "there is no run" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", "abc", "--out", str(tmp_path / "c"), "--wandb", "p", *small]) == 2
    assert "gptfast-kernels[wandb]" in capsys.readouterr().err and not (tmp_path / "c").exists()
