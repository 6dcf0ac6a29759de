import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gptfast import checkpoint
from gptfast.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load, read_config, save
from gptfast.config import GPTConfig
from gptfast.errors import CheckpointError, ConfigError
from gptfast.model import GPT
from gptfast.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer.from_text("\nABC")
FILES = {WEIGHTS_NAME, CONFIG_NAME}


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    fields = dict(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=16) | options
    return GPT(GPTConfig(**fields))


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def names_in(path):
    return {file.name for file in path.iterdir()}


@pytest.fixture
def saved(tmp_path):
    """A good checkpoint to be damaged."""
    save(make_model(), TOKENIZER, tmp_path / "run")
    return tmp_path / "run"


# ---- what is saved comes back


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_weights": True},
        {"attention": False},
        {"bias": False},
        {"padding_idx": None, "gelu": "tanh", "dropout": 0.0},
    ],
)
def test_load_gives_back_what_was_saved(tmp_path, options):
    model = make_model(**options)
    save(model, TOKENIZER, tmp_path / "deep" / "run")
    assert names_in(tmp_path / "deep" / "run") == FILES
    loaded, tokenizer = load(str(tmp_path / "deep" / "run"))
    assert loaded.config == model.config
    assert tokenizer == TOKENIZER
    assert_same_weights(loaded, model)
    assert not loaded.training
    idx = torch.tensor([[1, 2, 3, 4, 2]])
    with torch.no_grad():
        assert torch.equal(loaded(idx), model.eval()(idx))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "device 'cuda': torch finds no CUDA device here"),
        (torch.device("cuda:7"), "device 'cuda:7': torch finds no CUDA device here"),
        ("meta", "device 'meta' keeps no numbers; 'cpu' and 'cuda' do"),
        ("banana", "device must be 'cpu' or 'cuda', got 'banana'"),
        (None, "device must be 'cpu' or 'cuda', got None"),
        ("xla", "device 'xla': torch cannot use it here"),
        ("hpu", "device 'hpu': torch cannot use it here"),
    ],
)
def test_a_device_that_is_not_there_is_one_sentence(tmp_path, device, message):
    save(make_model(), None, tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, device)
    assert str(caught.value) == message


def test_a_gpu_that_is_not_among_those_there(monkeypatch, tmp_path):
    save(make_model(), None, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="device 'cuda:7': torch finds 2 CUDA devices here"):
        load(tmp_path, "cuda:7")


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    save(make_model(tie_weights=True), None, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS_NAME)
    loaded, _ = load(tmp_path)
    assert loaded.lm_head.weight is loaded.wte.weight


def test_bfloat16_model_stays_bfloat16(tmp_path):
    model = make_model().to(torch.bfloat16)
    save(model, None, tmp_path)
    loaded, tokenizer = load(tmp_path)
    assert tokenizer is None
    assert_same_weights(loaded, model)
    assert loaded.wte.weight.dtype == torch.bfloat16


def test_load_leaves_the_random_stream_alone(saved):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load(saved)
    assert torch.equal(torch.rand(3), expected)


def test_extra_is_kept(tmp_path):
    extra = {"step": 400, "val_loss": float("nan"), "preset": "abc", "betas": [0.9, 0.99]}
    save(make_model(), TOKENIZER, tmp_path, extra)
    header = read_config(tmp_path)
    assert repr(header["extra"]) == repr(extra)
    assert header == {
        "format": "gptfast-checkpoint",
        "version": 1,
        "config": make_model().config.to_dict(),
        "tokenizer": TOKENIZER.to_dict(),
        "extra": header["extra"],
    }
    assert repr(json.loads((tmp_path / CONFIG_NAME).read_text())) == repr(header)
    load(tmp_path)


def test_extra_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="extra must be JSON-able: .*PosixPath"):
        save(make_model(), TOKENIZER, tmp_path / "run", {"path": tmp_path})
    assert not (tmp_path / "run").exists()


def test_saving_twice_gives_the_same_bytes_and_keeps_other_files(tmp_path):
    (tmp_path / "history.jsonl").write_text("{}\n")
    contents = []
    for _ in range(2):
        save(make_model(), TOKENIZER, tmp_path)
        contents.append([(tmp_path / name).read_bytes() for name in sorted(FILES)])
    assert contents[0] == contents[1]
    assert names_in(tmp_path) == FILES | {"history.jsonl"}


def test_vocabularies_must_fit(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer has 6 ids, more than .* vocab_size 5"):
        save(make_model(), CharTokenizer.from_text("abcde"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    save(make_model(vocab_size=8), TOKENIZER, tmp_path / "wider")
    assert load(tmp_path / "wider")[0].config.vocab_size == 8


# ---- a save that fails leaves the old checkpoint


def assert_is_old(path):
    assert names_in(path) == FILES
    model, tokenizer = load(path)
    assert tokenizer == TOKENIZER
    assert_same_weights(model, make_model(seed=0))


def fail_on_call(monkeypatch, name, call, error):
    """Let the given call (1, 2, …) of `os.<name>` fail, and do the others."""
    real, calls = getattr(os, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint.os, name, failing)


@pytest.mark.parametrize("call", [1, 2])
def test_full_disk_on_flush_keeps_the_old_checkpoint(saved, monkeypatch, call):
    fail_on_call(monkeypatch, "fsync", call, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(CheckpointError, match="could not be saved .No space left on device."):
        save(make_model(seed=1), TOKENIZER, saved)
    monkeypatch.undo()
    assert_is_old(saved)


def test_interrupt_while_writing_keeps_the_old_checkpoint(saved, monkeypatch):
    fail_on_call(monkeypatch, "fsync", 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        save(make_model(seed=1), TOKENIZER, saved)
    monkeypatch.undo()
    assert_is_old(saved)


@pytest.mark.parametrize(("call", "seed"), [(1, 0), (2, 1)])
def test_stop_between_the_two_renames_never_mixes_two_saves(saved, monkeypatch, call, seed):
    fail_on_call(monkeypatch, "replace", call, OSError(errno.EIO, os.strerror(errno.EIO)))
    options = {"dropout": 0.5} if seed else {}
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(make_model(seed=1, dropout=0.5), TOKENIZER, saved)
    monkeypatch.undo()
    assert names_in(saved) == {WEIGHTS_NAME}
    model, _ = load(saved)
    assert model.config == make_model(**options).config
    assert_same_weights(model, make_model(seed=seed))
    save(make_model(seed=0), TOKENIZER, saved)
    assert_is_old(saved)


def test_real_file_size_limit_keeps_the_old_checkpoint(saved):
    pytest.importorskip("resource")
    script = textwrap.dedent(
        """
        import resource, sys
        from gptfast.checkpoint import load, save
        from gptfast.errors import CheckpointError

        model, tokenizer = load(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            save(model, tokenizer, sys.argv[1], {"step": 1})
        except CheckpointError as error:
            print(error)
        """
    )
    assert (saved / WEIGHTS_NAME).stat().st_size > 10_000
    done = subprocess.run(
        [sys.executable, "-c", script, str(saved)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "could not be saved (File too large)" in done.stdout
    assert_is_old(saved)


def test_leftovers_of_a_killed_process_are_cleared(saved):
    for name in FILES:
        (saved / f"{name}.tmp").write_bytes(b"half")
    load(saved)
    save(make_model(seed=0), TOKENIZER, saved)
    assert_is_old(saved)


def test_path_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match="could not be saved"):
            save(make_model(), TOKENIZER, path)


# ---- what is not a checkpoint, or no longer one


def assert_refused(path, message):
    for read in (load, read_config):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def rewrite(path, change_header=lambda header: None, change_tensors=lambda tensors: None):
    """Rewrite the weights file with another header or other tensors, without the readable copy."""
    (path / CONFIG_NAME).unlink()
    with safe_open(path / WEIGHTS_NAME, framework="pt") as opened:
        header = json.loads(opened.metadata()["gptfast"])
    tensors = load_file(path / WEIGHTS_NAME)
    change_header(header)
    change_tensors(tensors)
    save_file(tensors, path / WEIGHTS_NAME, {"gptfast": json.dumps(header)})


def test_missing_checkpoint(tmp_path):
    assert_refused(tmp_path / "absent", "absent: no such checkpoint")
    assert_refused(tmp_path, "not a checkpoint, it has no model.safetensors")
    (tmp_path / "file").touch()
    assert_refused(tmp_path / "file", "expected a checkpoint directory, got a file")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_weights(saved, keep):
    file = saved / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(saved, "model.safetensors: the file is damaged")


def test_garbage_weights(saved):
    (saved / WEIGHTS_NAME).write_bytes(os.urandom(2000))
    assert_refused(saved, "model.safetensors: the file is damaged")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"format": "gptfast-checkpoint"'])
def test_garbage_json(saved, content):
    (saved / CONFIG_NAME).write_bytes(content)
    assert_refused(saved, "config.json: the file is damaged .not JSON")


def test_json_of_another_save_is_refused_and_can_be_removed(saved, tmp_path):
    save(make_model(n_head=4), TOKENIZER, tmp_path / "other")
    (saved / CONFIG_NAME).write_bytes((tmp_path / "other" / CONFIG_NAME).read_bytes())
    assert_refused(saved, "config.json: not the configuration .* remove it")
    (saved / CONFIG_NAME).unlink()
    assert load(saved)[0].config.n_head == 2


def test_json_may_be_laid_out_otherwise(saved):
    header = json.loads((saved / CONFIG_NAME).read_text())
    (saved / CONFIG_NAME).write_text(json.dumps(dict(reversed(header.items()))))
    load(saved)


def test_foreign_safetensors(saved):
    for metadata in (None, {"format": "pt"}, {"gptfast": '{"format": "other"}'}):
        save_file({"transformer.weight": torch.zeros(3)}, saved / WEIGHTS_NAME, metadata)
        assert_refused(saved, "model.safetensors: not a gptfast checkpoint")


def test_other_version(saved):
    rewrite(saved, lambda header: header.update(version=2))
    assert_refused(saved, "expected checkpoint version 1, got 2")


def test_incomplete_header(saved):
    rewrite(saved, lambda header: header.pop("tokenizer"))
    assert_refused(saved, "damaged .its metadata lack 'tokenizer'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["config"].update(n_experts=8), "n_experts"),
        (lambda h: h["config"].update(n_head=3), "n_head"),
        (lambda h: h.update(config=None), "configuration is not valid"),
        (lambda h: h["tokenizer"].update(kind="bpe"), "expected a tokenizer"),
        (lambda h: h["tokenizer"].update(chars="abcdefgh"), "tokenizer has 9 ids"),
    ],
)
def test_header_that_makes_no_model(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("ln_f.weight"), "lacks ln_f.weight$"),
        (lambda t: t.clear(), r"lacks h.0.attn.c_attn.bias and \d+ more$"),
        (lambda t: t.update(other=torch.zeros(1)), "has unexpected other$"),
        (
            lambda t: t.update({"wte.weight": torch.zeros(6, 16)}),
            r"wte.weight has shape \(6, 16\), expected \(5, 16\)",
        ),
    ],
)
def test_tensors_that_do_not_fit(saved, change, message):
    rewrite(saved, change_tensors=change)
    with pytest.raises(CheckpointError, match=message):
        load(saved)
