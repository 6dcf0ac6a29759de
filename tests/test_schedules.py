"""Learning-rate schedules, gradient accumulation, early stopping, the best checkpoint."""

import copy
import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
import training_steps
from small_models import assert_same_weights, same_weights
from training_steps import losses_of

from gptfast import checkpoint, generation
from gptfast.config import GPTConfig, TrainConfig
from gptfast.errors import CheckpointError, ConfigError
from gptfast.model import GPT
from gptfast.presets import Preset
from gptfast.training import Trainer, TrainError, evaluate, run
from gptfast.training.callbacks import Callback
from gptfast.training.schedule import learning_rate, part_sizes
from gptfast.training.state import RunState

TEXT = "AABCBBC\n\nBCABCCA\n\nCAAACB\n\n" * 40
SHAPE = GPTConfig(block_size=8, n_layer=1, n_embd=16, dropout=0.1)
TINY = Preset("tiny", SHAPE, TrainConfig(lr=0.01, batch_size=4, steps=12, eval_every=4))
quick = functools.partial(training_steps.quick, chosen=TINY, text=TEXT)


def rates(total, **options):
    config = TrainConfig(lr=1.0, **options)
    return [learning_rate(config, step, total) for step in range(total)]


# ---- schedules


def test_without_a_schedule_all_steps_have_one_rate() -> None:
    assert rates(5) == [1.0] * 5


def test_a_warm_up_grows_along_a_line() -> None:
    assert rates(6, warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_line_reaches_the_smallest_rate_in_the_last_step() -> None:
    found = rates(7, schedule="linear", warmup_steps=2, min_lr=0.2)
    assert found == pytest.approx([1 / 3, 2 / 3, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_cosine_is_torchs() -> None:
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.1)
    for rate in rates(11, schedule="cosine", min_lr=0.1):
        assert rate == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_wsd_is_stable_and_then_decays() -> None:
    found = rates(10, schedule="wsd", decay_steps=4)
    assert found == pytest.approx([1.0] * 6 + [0.75, 0.5, 0.25, 0.0])
    assert rates(30, schedule="wsd")[-4:] == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("total, warmup", [(1, 0), (1, 5), (3, 3), (4, 9)])
def test_runs_shorter_than_the_warm_up_have_finite_rates(schedule, total, warmup) -> None:
    found = rates(total, schedule=schedule, warmup_steps=warmup, min_lr=0.1)
    assert all(0.0 < rate <= 1.0 for rate in found)


def test_a_schedule_needs_an_end() -> None:
    config = TrainConfig(schedule="cosine")
    with pytest.raises(ConfigError, match="schedule 'cosine' needs the number of steps, got none"):
        Trainer(GPT(dataclasses.replace(SHAPE, vocab_size=5)), config).step(*batch(2))


def test_the_history_has_the_rates_and_the_optimizer_used_them() -> None:
    options = {"schedule": "cosine", "warmup_steps": 3, "min_lr": 0.001}
    result = quick(**options)
    config = dataclasses.replace(TINY.train, **options)
    expected = [learning_rate(config, row["step"] - 1, 12) for row in result.history]
    assert [row["lr"] for row in result.history] == expected
    constant = quick()
    assert result.history[-1]["train_loss"] != constant.history[-1]["train_loss"]


def test_a_run_with_a_schedule_resumes_to_the_same_bits(tmp_path) -> None:
    options = {"schedule": "cosine", "warmup_steps": 3, "accumulation_steps": 3}
    whole = quick(tmp_path / "whole", **options)
    path = tmp_path / "run"
    with pytest.raises(Aborted):
        quick(path, save_every=5, callbacks=[AbortAt(7)], **options)
    result = quick(path, resume=True, **options)
    assert_same_weights(whole.model, result.model)
    assert losses_of(whole.history) == losses_of(result.history)


def test_the_end_of_a_decay_cannot_be_moved(tmp_path) -> None:
    quick(tmp_path, schedule="linear")
    with pytest.raises(ConfigError, match="started with steps=12 and cannot go on with steps=20"):
        quick(tmp_path, schedule="linear", steps=20, resume=True)


# ---- gradient accumulation


def batch(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(1, 5, (2, rows, 8), generator=generator)
    return x, y


def accumulated(parts, rows):
    """The loss and the gradients of a batch in so many parts."""
    shape = dataclasses.replace(SHAPE, vocab_size=5, dropout=0.0)
    model = GPT(shape, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(model, TrainConfig(accumulation_steps=parts))
    loss = trainer.loss_and_grads(*batch(rows), None)
    return loss.item(), torch.cat([param.grad.flatten() for param in model.parameters()])


# (Not the weights after a step: AdamW divides a gradient that is mathematically 0, as that of the
# keys' bias, by itself.)
@pytest.mark.parametrize("parts, rows", [(2, 8), (3, 8), (8, 8), (8, 5)])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(parts, rows) -> None:
    expected, whole = accumulated(1, rows)
    loss, grads = accumulated(parts, rows)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (grads - whole).abs().max() < 1e-6 * whole.abs().max()
    again = accumulated(parts, rows)
    assert again[0] == loss and torch.equal(again[1], grads)


def test_each_part_has_dropout_masks_of_its_own() -> None:
    trainer = Trainer(GPT(dataclasses.replace(SHAPE, vocab_size=5)), TrainConfig())
    one = trainer.dropout_keys()
    trainer = Trainer(trainer.gpt, TrainConfig(accumulation_steps=4))
    keys = [key.item() for key in trainer.dropout_keys()]
    assert len(set(keys)) == 4 and keys[0] == one[0].item()


def test_parts_are_as_equal_as_possible() -> None:
    assert part_sizes(10, 4) == [3, 3, 2, 2] and part_sizes(2, 3) == [1, 1, 0]


def test_more_parts_than_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="accumulation_steps must be at most batch_size=4, got 5"):
        TrainConfig(batch_size=4, accumulation_steps=5)


# ---- the best checkpoint, early stopping, the mean of the weights


class Aborted(Exception):
    pass


class AbortAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, run):
        if run.state.step == self.step:
            raise Aborted


class Spoil(Callback):
    """Spoils the weights after an evaluation, so that no later one is better."""

    def __init__(self, step):
        self.step = step

    def on_evaluation(self, run, row):
        if row["step"] == self.step:
            with torch.no_grad():
                run.trainer.gpt.lm_head.weight.mul_(30.0)


class Forget(Callback):
    """Spoils the weights after the second evaluation, so that the first two are the best."""

    def __init__(self):
        self.evaluations = 0

    def on_evaluation(self, run, row):
        self.evaluations += 1

    def on_save(self, run):
        if self.evaluations == 2:
            with torch.no_grad():
                run.trainer.gpt.lm_head.weight.mul_(30.0)


def held_out_loss(path):
    model, tokenizer = checkpoint.load(path)
    ids = tokenizer.encode_tensor(TEXT)
    return evaluate(model, ids[int(len(ids) * 0.9) :]).loss


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path) -> None:
    callback = Forget()
    result = quick(tmp_path, callbacks=[callback], lr=1e-3, eval_every=2)
    best = min(result.history, key=lambda row: row["val_loss"])
    assert best["step"] <= 4 and result.best == best
    assert held_out_loss(tmp_path) == pytest.approx(result.history[-1]["val_loss"], rel=1e-6)
    assert checkpoint.read_config(tmp_path / "best")["extra"]["step"] == best["step"]
    assert held_out_loss(tmp_path / "best") == pytest.approx(best["val_loss"], rel=1e-6)


def test_a_best_checkpoint_that_cannot_be_saved_is_not_the_best(tmp_path, monkeypatch) -> None:
    save = checkpoint.save

    def full(model, tokenizer, path, extra=None):
        if extra["step"] == 8:
            raise CheckpointError("the disk is full")
        save(model, tokenizer, path, extra)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.warns(UserWarning, match="the save at step 8 failed, training goes on"):
        result = quick(tmp_path, callbacks=[Spoil(8)])
    four, eight, twelve = (row["val_loss"] for row in result.history)
    assert eight < four < twelve
    assert result.best["step"] == 4
    assert checkpoint.read_config(tmp_path / "best")["extra"]["step"] == 4


def test_a_best_checkpoint_that_was_saved_stays_the_best(tmp_path, monkeypatch, disk_full) -> None:
    """Also where the training state, which comes after it, could not be."""
    save = run.save_sealed

    def full(content, file):
        if content["state"]["step"] == 8:
            disk_full()
        save(content, file)

    monkeypatch.setattr(run, "save_sealed", full)
    with pytest.warns(UserWarning, match="the save at step 8 failed, training goes on"):
        result = quick(tmp_path, callbacks=[Spoil(8)])
    assert result.best["step"] == 8
    assert checkpoint.read_config(tmp_path / "best")["extra"]["step"] == 8


def test_patience_counts_on_where_the_best_could_not_be_saved() -> None:
    state = RunState()
    for step, loss in enumerate((3.0, 3.5, 2.5), 1):
        before = state.best
        state.step = step
        state.is_best(loss)
    state.unsaved_best(before)
    assert state.best == (3.0, 1, 2)


def test_without_held_out_text_there_is_no_best(tmp_path) -> None:
    result = quick(tmp_path, val_fraction=0.0)
    assert result.best is None and not (tmp_path / "best").exists()


def test_a_new_run_removes_the_best_of_the_old_one(tmp_path) -> None:
    quick(tmp_path)
    quick(tmp_path, val_fraction=0.0, overwrite=True)
    assert not list((tmp_path / "best").glob("*"))


def test_the_last_evaluation_is_compared_on_the_same_tokens(tmp_path) -> None:
    part = quick(tmp_path, eval_tokens=20)
    state = torch.load(tmp_path / "training_state.pt")["state"]
    limited = {row["step"]: row["val_loss"] for row in part.history[:-1]}
    assert state["best_loss"] == limited.get(state["best_step"], state["best_loss"])
    assert state["best_loss"] != part.history[-1]["val_loss"]


def test_a_run_ends_when_nothing_gets_better(tmp_path) -> None:
    options = {"steps": 100, "patience": 2, "eval_every": 1}
    result = quick(tmp_path, callbacks=[Forget()], **options)
    last = result.history[-1]["step"]
    assert last < 100 and not result.interrupted
    assert [row["step"] for row in result.history][-3] == result.best["step"]
    again = quick(tmp_path, resume=True, **options)  # there is nothing left to do
    assert again.history == result.history
    assert quick(tmp_path, resume=True, **options | {"patience": 4}).history[-1]["step"] > last


def test_a_callback_can_end_a_run(tmp_path) -> None:
    class StopAt(Callback):
        def on_step(self, run):
            if run.state.step == 5:
                run.stop()

    result = quick(tmp_path, callbacks=[StopAt()], save_every=1)
    assert not result.interrupted
    assert checkpoint.read_config(tmp_path)["extra"]["step"] in (5, 6)
    resumed = quick(tmp_path, resume=True)
    assert losses_of(resumed.history) == losses_of(quick().history)


def test_callbacks_see_the_run() -> None:
    class Note(Callback):
        def __init__(self):
            self.seen = []

        def on_start(self, run):
            self.seen.append(("start", run.state.step, run.total))

        def on_step(self, run):
            assert math.isfinite(run.loss)
            self.seen.append(("step", run.state.step))

        def on_evaluation(self, run, row):
            self.seen.append(("evaluation", row["step"]))

        def on_save(self, run):
            self.seen.append(("save", run.state.step))

        def on_end(self, run):
            self.seen.append(("end", run.state.step))

    note = Note()
    quick(steps=3, eval_every=2, callbacks=[note])
    assert note.seen == [
        *(("start", 0, 3), ("step", 1), ("step", 2), ("evaluation", 2)),
        *(("step", 3), ("evaluation", 3), ("end", 3)),
    ]


def test_the_mean_weights_are_evaluated_and_loaded(tmp_path) -> None:
    plain = quick()
    result = quick(tmp_path, ema=0.9)
    # The same steps; other weights are evaluated.
    assert [row["train_loss"] for row in result.history] == [
        row["train_loss"] for row in plain.history
    ]
    assert not same_weights(result.model, plain.model)
    loaded, _ = checkpoint.load(tmp_path)
    assert_same_weights(loaded, result.model)
    assert held_out_loss(tmp_path) == pytest.approx(result.history[-1]["val_loss"], rel=1e-6)
    state = torch.load(tmp_path / "training_state.pt")
    assert_same_weights(state["weights"], plain.model)
    assert_same_weights(quick(tmp_path, ema=0.9, resume=True).model, result.model)


def test_the_mean_weights_follow_their_recurrence() -> None:
    model = GPT(dataclasses.replace(SHAPE, vocab_size=5))
    trainer = Trainer(model, TrainConfig(ema=0.5))
    mean = model.wte.weight.detach().clone()
    for step in range(1, 6):
        trainer.step(*batch(4, seed=step))
        kept = min(0.5, (1 + step) / (10 + step))
        mean = kept * mean + (1 - kept) * model.wte.weight.detach()
    assert torch.allclose(trainer.averaged.wte.weight, mean, atol=1e-7)
    assert trainer.averaged is trainer.averaged and trainer.averaged is not model


def test_what_the_mean_weights_write_is_not_kept_from_an_earlier_step() -> None:
    """Generation keeps prepared weights until they change."""
    trainer = Trainer(GPT(dataclasses.replace(SHAPE, vocab_size=5)), TrainConfig(ema=0.5, lr=0.1))
    seen = set()
    for step in range(3):
        trainer.step(*batch(8, seed=step))
        (scored,) = generation.score(trainer.averaged, [[1, 2, 3, 4, 1, 2]])
        assert scored.logprob == pytest.approx(
            generation.score(copy.deepcopy(trainer.averaged), [[1, 2, 3, 4, 1, 2]])[0].logprob
        )
        seen.add(scored.logprob)
    assert len(seen) == 3


def test_history_is_json(tmp_path) -> None:
    quick(tmp_path, schedule="wsd")
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == [0.01, 0.01, 0.0]


def test_options_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="patience needs held-out text, got val_fraction=0"):
        TrainConfig(patience=2, val_fraction=0)
    with pytest.raises(ConfigError, match="decay_steps belongs to schedule 'wsd', got 'cosine'"):
        TrainConfig(decay_steps=2, schedule="cosine")
    with pytest.raises(ConfigError, match="min_lr must be 0 in a constant schedule, got 0.0001"):
        TrainConfig(min_lr=1e-4)


def test_numbers_of_numpy_can_be_saved_and_resumed(tmp_path) -> None:
    options = {"lr": np.float64(0.01), "clip": np.float64(1.0), "betas": [np.float64(0.9), 0.99]}
    quick(tmp_path, save_every=5, **options)
    assert type(TrainConfig(**options).lr) is float
    assert quick(tmp_path, resume=True, steps=14, **options).history[-1]["step"] == 14


def test_a_held_out_loss_that_is_not_finite_keeps_the_checkpoint_before(tmp_path) -> None:
    class Overflow(Callback):
        def on_step(self, run):
            if run.state.step == 4:  # before its evaluation
                with torch.no_grad():  # finite weights, logits that are not
                    run.trainer.gpt.lm_head.weight.fill_(3e38)
                    run.trainer.gpt.ln_f.weight.fill_(3e38)

    with pytest.raises(TrainError, match="the held-out loss became"):
        quick(tmp_path, callbacks=[Overflow()], save_every=1)
    model, _ = checkpoint.load(tmp_path)
    assert all(bool(param.isfinite().all()) for param in model.parameters())
    quick(tmp_path, resume=True, steps=14)  # the state can be read


def test_another_number_of_compared_tokens_begins_the_comparison_anew(tmp_path) -> None:
    quick(tmp_path, eval_tokens=20)
    quick(tmp_path, resume=True, steps=16, eval_tokens=30)
    state = torch.load(tmp_path / "training_state.pt")["state"]
    assert state["best_step"] == 16
