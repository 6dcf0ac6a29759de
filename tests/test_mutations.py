"""A thousand damaged runs: each loads as the saved model or fails with a one-sentence error."""

import pickle
import random
import shutil

import pytest
import torch
from small_models import same_weights

from gptfast import checkpoint, data
from gptfast.config import GPTConfig, TrainConfig
from gptfast.errors import GptfastError
from gptfast.model import GPT
from gptfast.tokenizer import CharTokenizer
from gptfast.training import Trainer, run
from gptfast.training.plots import read_history

TEXT = data.abc_corpus()[:100]
TOKENIZER = CharTokenizer.from_text(TEXT)
IDS = TOKENIZER.encode_tensor(TEXT)
SHAPE = GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=4)
OTHER = ("seed", "earlier", "shape")  # other runs, by their difference from "own"
WEIGHTS, CONFIG = checkpoint.WEIGHTS_NAME, checkpoint.CONFIG_NAME
FOREIGN = {
    "nothing": b"",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
    "a page": b"<!DOCTYPE html>\n<html><body>404: not found</body></html>\n",
    "a text": "Ünïcode, and\nsome lines\n".encode(),
    "a number": b"5",
    "a list": b"[1, 2]\n",
    "an object": b'{"step": 1, "train_loss": 2.0}\n',
    "nested lists": b"[" * 100_000,
    "a pickle": pickle.dumps({"format": run.FORMAT, "version": 2}),
    "zeros": bytes(5000),
    "ones": b"\xff" * 5000,
}


def config_of(steps=2, seed=1):
    return TrainConfig(lr=0.1, batch_size=2, steps=steps, eval_every=1, seed=seed)


def train(out, resume=False, shape=SHAPE, **options):
    torch.manual_seed(1)
    trainer = Trainer(GPT(shape), config_of(**options))
    return trainer.fit(IDS, tokenizer=TOKENIZER, out=out, resume=resume)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directories of the runs, by name."""
    root = tmp_path_factory.mktemp("runs")
    train(root / "earlier", steps=1)
    shutil.copytree(root / "earlier", root / "own")
    train(root / "own", resume=True)
    train(root / "seed", seed=2)
    train(root / "shape", shape=GPTConfig(4, 5, n_layer=2, n_head=1, n_embd=4))
    return {name: root / name for name in ("own", *OTHER)}


def sentence_or(call, *args, **options):
    """Returns the result of a call, or its one-sentence error message."""
    try:
        return call(*args, **options)
    except GptfastError as error:
        assert "\n" not in str(error) and str(error)
        return str(error)


def resume(path, number):
    """Returns model and history of a resumed run; only every tenth is really trained and saved."""
    if number % 10 == 0:
        result = train(path, resume=True)
        assert same_weights(checkpoint.load(path)[0], result.model)  # the save replaced the damage
        return result.model, result.history
    model = GPT(SHAPE)
    state, weights, _ = run.RunDirectory(path).load(model, config_of())
    model.load_state_dict(weights)
    return model, state.history


def damage(draw, content, run_files):
    """Damages the bytes of a file in one of many ways; returns the kind and the new bytes."""
    kind = draw.choice(
        ["byte", "byte", "byte", "bit", "bit", "cut", "more", "gap", "swap", "foreign"]
    )
    place = draw.randrange(len(content))
    if kind == "byte":
        return kind, content[:place] + draw.randbytes(1) + content[place + 1 :]
    if kind == "bit":
        changed = bytes([content[place] ^ 1 << draw.randrange(8)])
        return kind, content[:place] + changed + content[place + 1 :]
    if kind == "cut":
        return kind, content[:place]
    if kind == "more":
        return kind, content + draw.randbytes(draw.randrange(1, 99))
    if kind == "gap":
        return kind, content[:place] + content[place + draw.randrange(1, 99) :]
    if kind == "swap":
        return kind, draw.choice(run_files)
    return draw.choice(list(FOREIGN.items()))


def test_a_damaged_file_gives_the_model_that_was_saved_or_a_sentence(tmp_path, runs):
    draw = random.Random(1)
    own, tokenizer = checkpoint.load(runs["own"])
    history = read_history(runs["own"])
    files = {name: (runs["own"] / name).read_bytes() for name in run.FILES}
    refused = 0
    for number in range(700):
        name = draw.choice(run.FILES)
        kind, content = damage(draw, files[name], list(files.values()))
        what = f"{number}: {kind} in {name}"
        path = tmp_path / "run"
        shutil.copytree(runs["own"], path)
        (path / name).write_bytes(content)
        loaded = sentence_or(checkpoint.load, path)
        header = sentence_or(checkpoint.read_config, path)
        if isinstance(loaded, str):
            assert name in loaded and name in (WEIGHTS, CONFIG), what
        else:
            assert same_weights(loaded[0], own) and loaded[1] == tokenizer, what
            assert header == checkpoint.read_config(runs["own"]), what
        sentence_or(read_history, path)
        result = sentence_or(resume, path, number)
        if isinstance(result, str):
            assert name in result and name != run.HISTORY_NAME, what
        else:
            assert same_weights(result[0], own) and result[1] == history, what
        refused += isinstance(loaded, str) or isinstance(result, str)
        shutil.rmtree(path)
    assert 400 < refused < 700


def test_files_of_two_runs_give_one_of_them_whole_or_a_sentence(tmp_path, runs):
    draw = random.Random(2)
    models = {name: checkpoint.load(path)[0] for name, path in runs.items()}
    outcomes = set()
    for number in range(300):
        path = tmp_path / "run"
        path.mkdir()
        other = draw.choice(OTHER)
        of = {name: draw.choice(["own", "own", other, None]) for name in run.FILES}
        what = f"{number}: {of}"
        for name, source in of.items():
            if source:
                shutil.copy(runs[source] / name, path)
        loaded = sentence_or(checkpoint.load, path)
        if of[WEIGHTS] and of[CONFIG] in (of[WEIGHTS], None):
            assert same_weights(loaded[0], models[of[WEIGHTS]]), what
        else:
            assert WEIGHTS in loaded, what
        state = of[run.STATE_NAME]
        # Files of one run (after a crash the state may be of the save before) or the state alone.
        whole = not of[WEIGHTS] or of[CONFIG] in (of[WEIGHTS], None)
        whole &= of[WEIGHTS] in (None, "own", state)
        result = sentence_or(resume, path, number) if state else "not to be resumed"
        if state in ("own", "earlier") and whole:
            wanted = "own" if number % 10 == 0 else state
            assert same_weights(result[0], models[wanted]), what
        else:
            assert isinstance(result, str), what
        outcomes.add((state, of[WEIGHTS], isinstance(result, str)))
        shutil.rmtree(path)
    assert len(outcomes) > 20
