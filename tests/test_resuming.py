"""Interrupts and resuming, and runs that start from the model of another."""

import shutil
import signal

import pytest
import torch
from small_models import assert_same_weights, small_model
from training_steps import EPOCHS, SIGNALS, TEXT, losses_of, quick, rows_in

from gptfast import checkpoint
from gptfast.config import TrainConfig
from gptfast.errors import CheckpointError, ConfigError, DataError
from gptfast.tokenizer import CharTokenizer
from gptfast.training import Trainer, run

# ---- interrupts and resuming


@pytest.mark.parametrize("options", [{}, EPOCHS])
@pytest.mark.parametrize("pressed", [2, 5, 6, 9])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, ctrl_c, capsys, options, pressed):
    whole = quick(tmp_path / "whole", **options)
    ctrl_c(pressed)
    part = quick(tmp_path / "run", progress=True, **options)
    assert part.interrupted
    assert f"interrupted at step {pressed} of" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same_weights(checkpoint.load(tmp_path / "run")[0], part.model)
    assert [row["step"] for row in rows_in(tmp_path / "run")] == [
        row["step"] for row in whole.history if row["step"] <= pressed
    ]
    torch.manual_seed(99)
    result = quick(tmp_path / "run", resume=True, **options)
    assert not result.interrupted
    saved = rows_in(tmp_path / "run")
    assert losses_of(result.history) == losses_of(whole.history) == losses_of(saved)
    assert_same_weights(result.model, whole.model)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_asks_for_the_end_saves_the_run(tmp_path, press, number):
    before = [signal.getsignal(each) for each in SIGNALS]
    press(number, 5)
    part = quick(tmp_path / "run")
    assert part.interrupted and part.signal == number
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert checkpoint.read_config(tmp_path / "run")["extra"]["step"] == 5
    result = quick(tmp_path / "run", resume=True)
    assert not result.interrupted and result.signal is None
    assert losses_of(result.history) == losses_of(quick().history)


def test_a_signal_in_the_last_step_is_told(press):
    press(signal.SIGTERM, 12)
    result = quick()
    assert not result.interrupted and result.signal == signal.SIGTERM


@pytest.mark.parametrize("number", SIGNALS)
def test_a_programs_own_handlers_are_left_alone(press, number):
    heard = []
    signal.signal(number, lambda *_: heard.append(1))
    press(number, 2, 5)
    result = quick()
    assert (heard, result.interrupted, result.signal) == ([1, 1], False, None)
    signal.signal(number, signal.SIG_IGN)
    assert not quick().interrupted and signal.getsignal(number) == signal.SIG_IGN


def test_a_second_ctrl_c_acts_at_once_and_keeps_the_last_checkpoint(tmp_path, ctrl_c, monkeypatch):
    ctrl_c(6)
    ending = run.RunDirectory.save

    def save(self, *args):
        if args[3].step == 6:
            signal.raise_signal(signal.SIGINT)
        ending(self, *args)

    monkeypatch.setattr(run.RunDirectory, "save", save)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "run")
    assert checkpoint.read_config(tmp_path / "run")["extra"]["step"] == 4


def test_a_finished_run_can_be_made_longer(tmp_path):
    whole = quick(tmp_path / "whole", steps=12)
    quick(tmp_path / "run", steps=8)
    result = quick(tmp_path / "run", steps=12, resume=True)
    assert losses_of(result.history) == losses_of(whole.history)
    again = quick(tmp_path / "run", steps=12, resume=True)
    assert again.history == result.history and not again.interrupted


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": 0.5}, "started with lr=0.01 and cannot go on with lr=0.5"),
        ({"n_layer": 2}, "n_layer=1 and cannot go on with n_layer=2"),
        ({"steps": None, "epochs": 1}, "steps=12 and cannot go on with steps=None"),
        ({"text": TEXT[5:]}, "another text"),
    ],
)
def test_a_run_goes_on_only_as_it_was_started(tmp_path, options, message):
    quick(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        quick(tmp_path / "run", resume=True, **options)


@pytest.mark.parametrize("options", [{}, EPOCHS])
def test_saves_between_evaluations_change_nothing_and_lose_nothing(
    tmp_path, after_step, monkeypatch, options
):
    whole = quick(tmp_path / "whole", **options)
    saved, save = [], run.RunDirectory.save

    def note(self, *args):
        saved.append(args[3].step)
        save(self, *args)

    monkeypatch.setattr(run.RunDirectory, "save", note)
    often = quick(tmp_path / "often", save_every=2, save_minutes=None, **options)
    rows = [row["step"] for row in whole.history]
    assert saved == sorted({*rows, *range(2, rows[-1] + 1, 2)})
    assert losses_of(often.history) == losses_of(whole.history)
    assert_same_weights(often.model, whole.model)

    def stop():
        raise SystemExit

    after_step(stop, 8)
    with pytest.raises(SystemExit):
        quick(tmp_path / "run", save_minutes=1e-9, **options)  # at each step
    assert checkpoint.read_config(tmp_path / "run")["extra"]["step"] == 7
    assert [row["step"] for row in rows_in(tmp_path / "run")] == [n for n in rows if n < 8]
    result = quick(tmp_path / "run", resume=True, **options)
    assert losses_of(result.history) == losses_of(whole.history)
    assert_same_weights(result.model, whole.model)


def test_without_an_interval_only_evaluations_save(monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr(run.RunDirectory, "save", lambda self, *args: saved.append(args[3].step))
    clock = iter(range(0, 10**6, 7 * 60))  # seven minutes pass between two readings
    monkeypatch.setattr("gptfast.training.loop.time.monotonic", lambda: next(clock))
    quick(tmp_path / "none", save_minutes=None, eval_every=12)
    assert saved == [12]
    saved.clear()
    quick(tmp_path / "ten", eval_every=12)  # a save is due after fourteen minutes, not after seven
    assert saved == [2, 4, 6, 8, 10, 12]


def test_a_state_of_before_the_names_were_noted_is_resumed(tmp_path):
    quick(tmp_path / "run", steps=8)
    state = torch.load(tmp_path / "run" / run.STATE_NAME, weights_only=True)
    state["version"] = 1
    del state["resumable"]["trained"], state["train"]["save_every"], state["train"]["save_minutes"]
    torch.save(state, tmp_path / "run" / run.STATE_NAME)
    result = quick(tmp_path / "run", resume=True)
    assert losses_of(result.history) == losses_of(quick().history)


def test_a_run_goes_on_with_the_parameters_that_it_trained(tmp_path):
    def fit(frozen, **options):
        model = small_model()
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        config = TrainConfig(steps=2, batch_size=4)
        return Trainer(model, config).fit(torch.ones(20).long(), out=tmp_path / "run", **options)

    before = small_model().wpe.weight
    assert torch.equal(fit(["wpe.weight"]).model.wpe.weight, before)
    fit(["wpe.weight"], resume=True)
    with pytest.raises(ConfigError, match="started with other parameters frozen"):
        fit(["wte.weight"], resume=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_matrices_alone_decay_and_the_averages_are_resumed(tmp_path, backend):
    def trained(steps, **options):
        config = TrainConfig(steps=steps, batch_size=4, decayed="matrices", ema=0.9, clip=0.1)
        model = small_model()
        model.backend = backend
        trainer = Trainer(model, config)
        trainer.fit(torch.arange(40) % 5, **options)
        return trainer

    whole = trained(6)
    trained(3, out=tmp_path / "run")
    resumed = trained(6, out=tmp_path / "run", resume=True)
    for trainer in whole, resumed:
        for name, param in zip(trainer.names, trainer.parameters, strict=True):
            assert trainer.gpt.get_parameter(name) is param
        groups = trainer.optimizer.param_groups
        decays = [(group["weight_decay"], p.dim() > 1) for group in groups for p in group["params"]]
        assert set(decays) == {(0.01, True), (0.0, False)}
    averages = whole.optimizer.averages
    assert len(averages) == len(whole.parameters)
    for average, again in zip(averages, resumed.optimizer.averages, strict=True):
        assert torch.equal(average, again)


# ---- from the model of another run


def test_a_run_starts_from_the_model_of_another_one(tmp_path):
    quick(tmp_path / "old", n_embd=32, n_head=4, dropout=0.3)
    old, tokenizer = checkpoint.load(tmp_path / "old")
    found = {"init_from": tmp_path / "old", "text": TEXT[100:900]}
    result = quick(tmp_path / "new", steps=4, lr=1e-9, weight_decay=0.0, **found)
    assert result.model.config == old.config and result.tokenizer == tokenizer
    for a, b in zip(result.model.parameters(), old.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    extra = checkpoint.read_config(tmp_path / "new")["extra"]
    assert extra["init_from"] == str(tmp_path / "old") and extra["train"]["lr"] == 1e-9
    other = quick(steps=4, dropout=0.0, precision="bf16", **found)
    assert (other.model.config.dropout, old.config.dropout) == (0.0, 0.3)
    assert checkpoint.read_config(tmp_path / "old")["extra"]["init_from"] is None


@pytest.mark.parametrize("again", [{}, {"init_from": True}])
def test_a_run_from_another_one_is_resumed_by_its_own_state(tmp_path, ctrl_c, again):
    quick(tmp_path / "old", n_embd=32)
    whole = quick(init_from=tmp_path / "old", dropout=0.1)
    ctrl_c(6)
    assert quick(tmp_path / "new", init_from=tmp_path / "old", dropout=0.1).interrupted
    options = {"init_from": tmp_path / "old"} if again else {}
    if not again:
        shutil.rmtree(tmp_path / "old")
    result = quick(tmp_path / "new", resume=True, **options)
    assert losses_of(result.history) == losses_of(whole.history)
    assert_same_weights(result.model, whole.model)
    with pytest.raises(ConfigError, match=r"started with init_from='.*old' and cannot go on with"):
        quick(tmp_path / "new", resume=True, init_from=tmp_path / "another")
    with pytest.raises(ConfigError, match="dropout=0.1 and cannot go on with dropout=0.4"):
        quick(tmp_path / "new", resume=True, dropout=0.4)


def test_what_does_not_fit_the_model_to_start_from_is_refused(tmp_path):
    path, bare = tmp_path / "old", tmp_path / "bare"
    quick(path)
    checkpoint.save(checkpoint.load(path)[0].bfloat16(), None, bare)
    for options, error, message in (
        ({"n_layer": 2}, ConfigError, "the model has n_layer=1 and a run .* have n_layer=2"),
        ({"n_layer": 0}, ConfigError, "n_layer must be a positive whole number, got 0"),
        ({"text": "abc" * 99}, DataError, "character 'a' at position 0"),
        ({"tokenizer": CharTokenizer(("A", "B"))}, ConfigError, "another tokenizer"),
        ({"init_from": tmp_path / "none"}, CheckpointError, "no such checkpoint"),
        ({"init_from": bare}, ConfigError, "the model has no tokenizer"),
        (
            {"init_from": bare, "tokenizer": CharTokenizer.from_text("abcdefgh")},
            ConfigError,
            "another tokenizer",
        ),
    ):
        with pytest.raises(error, match=message):
            quick(tmp_path / "new", **{"init_from": path} | options)
        assert not (tmp_path / "new").exists()
    known = CharTokenizer.from_text(TEXT)
    result = quick(init_from=bare, tokenizer=known, steps=1)  # of weights in bfloat16
    assert result.model.wte.weight.dtype == torch.float32
