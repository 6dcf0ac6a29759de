import errno
import functools
import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import assert_same_weights, small_model

from gptfast import checkpoint
from gptfast.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load, read_config, save
from gptfast.errors import CheckpointError, ConfigError
from gptfast.integrity import digest
from gptfast.model import GPT
from gptfast.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer.from_text("\nABC")
FILES = {WEIGHTS_NAME, CONFIG_NAME}
make_model = functools.partial(small_model, n_layer=2)


def sum_of(header):
    covered = {name: value for name, value in header.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def names_in(path):
    return {file.name for file in path.iterdir()}


@pytest.fixture
def saved(tmp_path):
    """A valid checkpoint, which tests damage."""
    save(make_model(), TOKENIZER, tmp_path / "run")
    return tmp_path / "run"


# ---- save and load


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
        "version": 2,
        "config": make_model().config.to_dict(),
        "tokenizer": TOKENIZER.to_dict(),
        "extra": header["extra"],
        "weights_sha256": digest(make_model().state_dict()),
        "sha256": sum_of(header),
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


def test_each_tensor_keeps_its_own_dtype(tmp_path):
    model = make_model()
    model.h[1].to(torch.bfloat16)
    model.lm_head.to(torch.float64)
    save(model, None, tmp_path)
    loaded, _ = load(tmp_path)
    assert_same_weights(loaded, model)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32, torch.bfloat16, torch.float64}
    assert all(param.requires_grad for param in loaded.parameters())


def test_loaded_weights_are_not_the_files(saved):
    model, _ = load(saved)
    with open(saved / WEIGHTS_NAME, "r+b") as file:
        file.write(b"\xff" * (saved / WEIGHTS_NAME).stat().st_size)
    assert_same_weights(model, make_model())


def test_halves_of_surrogate_pairs_stay_two_characters(tmp_path):
    tokenizer = CharTokenizer(("a", "\ud83d", "\ude00", "😀"))
    save(make_model(), tokenizer, tmp_path)
    assert load(tmp_path)[1] == tokenizer


# ---- ties are stored as they are


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[1, 2, 3, 4, 2]]))


def test_a_tie_that_was_undone_is_stored_as_undone(tmp_path):
    model = make_model(tie_weights=True)
    model.load_state_dict(make_model(seed=3).state_dict(), assign=True)
    save(model, None, tmp_path)
    loaded, _ = load(tmp_path)
    assert not loaded.config.tie_weights
    assert_same_weights(loaded, model)
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("by", ["parameter", "memory"])
def test_a_tie_that_was_made_by_hand_is_stored_as_one(tmp_path, by):
    model = make_model()
    weight = model.wte.weight
    model.lm_head.weight = weight if by == "parameter" else torch.nn.Parameter(weight.detach())
    save(model, None, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS_NAME)
    loaded, _ = load(tmp_path)
    assert loaded.config.tie_weights and loaded.lm_head.weight is loaded.wte.weight
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_layers_that_share_their_weights_are_written_out(tmp_path):
    model = make_model()
    model.h[1] = model.h[0]
    model.h[1].ln_2.weight = model.h[1].ln_1.weight
    with pytest.raises(CheckpointError, match="h.1 has layer=0, expected 1"):
        save(model, None, tmp_path)  # its dropout masks would differ
    model = make_model()
    model.h[1].mlp = model.h[0].mlp
    save(model, None, tmp_path)
    loaded, _ = load(tmp_path)
    assert_same_weights(loaded, model)
    assert torch.equal(logits_of(loaded), logits_of(model))


# ---- wrapped models, and models that no configuration describes


def test_a_wrapped_model_is_saved_as_what_it_wraps(tmp_path, saved):
    plain = [(saved / name).read_bytes() for name in sorted(FILES)]
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel
        for wrapped in (
            torch.compile(make_model()),
            parallel(make_model()),
            torch.compile(parallel(make_model())),
            parallel(torch.compile(make_model())),
        ):
            save(wrapped, TOKENIZER, tmp_path / "wrapped")
            assert [(tmp_path / "wrapped" / name).read_bytes() for name in sorted(FILES)] == plain
    finally:
        torch.distributed.destroy_process_group()


class OtherNorm(torch.nn.LayerNorm):
    pass


class WiderGPT(GPT):
    def loss(self, idx, targets):
        return super().loss(idx, targets) + 1


class NamedGPT(GPT):
    def title(self):
        return "mine"


class LoRA(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, torch.nn.Linear(16, 2)


def prune(model):
    torch.nn.utils.prune.l1_unstructured(model.h[0].mlp.c_fc, "weight", 0.5)


def weight_norm(model):
    torch.nn.utils.parametrizations.weight_norm(model.h[1].attn.c_proj)


def set_to(name, make):
    """Returns a change that sets the attribute of this name."""

    def change(model):
        owner, _, last = name.rpartition(".")
        owner = model.get_submodule(owner)
        setattr(owner, last, make(getattr(owner, last)))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (prune, r"it has unexpected h.0.mlp.c_fc.weight_mask and 1 more"),
        (weight_norm, "h.1.attn.c_proj is a ParametrizedLinear, expected a Linear"),
        (set_to("h.0.attn.c_attn", LoRA), "h.0.attn.c_attn is a LoRA, expected a Linear"),
        (
            set_to("lm_head", lambda old: torch.nn.Linear(16, 5)),
            "it has unexpected lm_head.bias",
        ),
        (
            set_to("lm_head", lambda old: torch.nn.Linear(16, 6, bias=False)),
            "lm_head has out_features=6, expected 5",
        ),
        (
            set_to("wte.weight", lambda old: torch.nn.Parameter(torch.ones(6, 16))),
            r"wte.weight has shape \(6, 16\), expected \(5, 16\)",
        ),
        (set_to("ln_f.eps", lambda old: 1e-3), "ln_f has eps=0.001, expected 1e-05"),
        (set_to("h.1.mlp.gelu", lambda old: "tanh"), "h.1.mlp has gelu='tanh', expected 'erf'"),
        (set_to("h.0.ln_2", lambda old: OtherNorm(16)), "h.0.ln_2 is a OtherNorm"),
        (set_to("h.0.mlp.forward", lambda old: torch.relu), "h.0.mlp has a forward of its own"),
        (lambda model: model.h.append(make_model().h[0]), r"has unexpected h.2.\S+ and 11 more"),
        (lambda model: model.h.__delitem__(1), "it lacks h.1;"),
        (lambda model: model.to("meta"), "wte.weight is a Tensor of float32 on meta"),
        (lambda model: model.to(torch.float8_e5m2), "is a Tensor of float8_e5m2 on cpu"),
        (lambda model: setattr(model, "__class__", WiderGPT), "WiderGPT has a loss of its own"),
    ],
)
def test_what_would_load_as_another_model_is_not_saved(saved, change, message):
    model = make_model(seed=1)
    change(model)
    with pytest.raises(CheckpointError, match=f"would load as another one: .*{message}") as caught:
        save(torch.compile(model), TOKENIZER, saved)
    assert "\n" not in str(caught.value)
    assert_is_old(saved)


def test_what_is_no_gpt_is_not_saved(saved):
    with pytest.raises(ConfigError, match="expected a GPT"):
        save(torch.nn.Linear(2, 2), None, saved)
    assert_is_old(saved)


def test_hooks_and_methods_beside_a_gpts_own_do_not_stop_a_save(tmp_path):
    torch.manual_seed(0)
    model = NamedGPT(make_model().config)
    model.h[0].register_forward_hook(lambda *args: None)
    model.h[0].mlp.register_forward_hook(lambda *args: None)
    model.h[0].watched = True
    save(model, None, tmp_path)
    assert_same_weights(load(tmp_path)[0], model)


# ---- a save that fails leaves the old checkpoint


def assert_is_old(path):
    assert names_in(path) == FILES
    model, tokenizer = load(path)
    assert tokenizer == TOKENIZER
    assert_same_weights(model, make_model(seed=0))


def fail_on_call(monkeypatch, name, call, error):
    """Makes the given call (1, 2, …) of `os.<name>` fail; the others work."""
    real, calls = getattr(os, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)


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


# ---- the format


OLD = Path(__file__).parent / "fixtures" / "checkpoint-v1"
OLD_SUM = 26.694151530396994  # sum of its weights, by the code that wrote it, as the logits
OLD_LOGITS = [-0.0107631, -0.3599181, 0.3200006, 0.5957331, 1.2662663]


def test_a_checkpoint_of_version_1_still_loads():
    assert read_config(OLD)["version"] == 1
    model, tokenizer = load(OLD)
    assert tokenizer == TOKENIZER
    assert sum(param.double().sum().item() for param in model.parameters()) == pytest.approx(
        OLD_SUM, abs=1e-9
    )
    assert logits_of(model)[0, -1].tolist() == pytest.approx(OLD_LOGITS, abs=1e-5)


def test_a_changed_byte_is_found(saved):
    file = saved / WEIGHTS_NAME
    content = bytearray(file.read_bytes())
    text = content.index(b"n_layer")  # a name and a value of the header, two bytes of the data
    for place in (text, content.index(b"2", text), content.index(b"}}", text) + 40, -1):
        content[place] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="model.safetensors: the file is damaged"):
            load(saved)
        content[place] ^= 1


# ---- files that are not valid checkpoints


def assert_refused(path, message):
    for read in (load, read_config):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def rewrite(path, change_header=lambda header: None, change_tensors=lambda tensors: None):
    """Rewrites the weights file with other metadata or tensors, correct checksums, and no copy."""
    (path / CONFIG_NAME).unlink()
    with safe_open(path / WEIGHTS_NAME, framework="pt") as opened:
        header = json.loads(opened.metadata()["gptfast"])
    tensors = load_file(path / WEIGHTS_NAME)
    change_tensors(tensors)
    header["weights_sha256"] = digest(tensors)
    change_header(header)
    if "sha256" in header:
        header["sha256"] = sum_of(header)
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
    model, tokenizer = load(saved)
    assert (model.config, tokenizer) == (make_model().config, TOKENIZER)
    assert_same_weights(model, make_model())


def test_foreign_safetensors(saved):
    for metadata in (None, {"format": "pt"}, {"gptfast": '{"format": "other"}'}):
        save_file({"transformer.weight": torch.zeros(3)}, saved / WEIGHTS_NAME, metadata)
        assert_refused(saved, "model.safetensors: not a gptfast checkpoint")


def test_other_version(saved):
    rewrite(saved, lambda header: header.update(version=3))
    assert_refused(saved, "newer gptfast .version 3 .* reads up to 2.: update gptfast")
    for version in (0, "2", True, None):
        save(make_model(), TOKENIZER, saved)
        rewrite(saved, lambda header: header.update(version=version))  # noqa: B023
        assert_refused(saved, f"expected a version from 1 to 2, got {version!r}")


@pytest.mark.parametrize("name", ["config", "tokenizer", "extra", "weights_sha256", "sha256"])
def test_incomplete_header(saved, name):
    rewrite(saved, lambda header: header.pop(name))
    assert_refused(saved, f"damaged .its metadata lack '{name}'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["config"].update(n_experts=8), "n_experts"),
        (lambda h: h["config"].update(n_head=3), "n_head"),
        (lambda h: h["config"].pop("vocab_size"), "configuration is not valid: it has no vocab_s"),
        (lambda h: h.update(config=None), "configuration is not valid"),
        (lambda h: h["tokenizer"].update(kind="bpe"), "expected a tokenizer"),
        (lambda h: h["tokenizer"].update(code_points=[*range(65, 73)]), "tokenizer has 9 ids"),
        (lambda h: h["config"].update(n_layer=10**9), r"lacks h.10.attn.c_attn.bias and \d+ more"),
        (lambda h: h["config"].update(block_size=10**30), "block_size must be"),
        (lambda h: h["config"].update(block_size=10**15), "wpe.weight has shape"),
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


@pytest.mark.parametrize("init", ["torch", "gpt2"])
def test_neither_saving_nor_loading_loads_torchs_compiler(tmp_path, init):
    script = """
        import sys
        from gptfast import GPT, GPTConfig, load, save

        save(GPT(GPTConfig(vocab_size=66, init=sys.argv[2])), None, sys.argv[1])
        load(sys.argv[1])
        assert "torch._dynamo" not in sys.modules
        """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), init]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_save_while_a_checkpoint_is_read_is_no_error(tmp_path, monkeypatch):
    """A run in training may replace both files after the configuration was read."""
    save(make_model(), TOKENIZER, tmp_path, {"step": 1})
    newer, check = make_model(seed=3), checkpoint._check_copy

    def saved_meanwhile(file, header):
        if header["extra"]["step"] == 1:
            save(newer, TOKENIZER, tmp_path, {"step": 2})
        check(file, header)

    monkeypatch.setattr(checkpoint, "_check_copy", saved_meanwhile)
    model, _ = load(tmp_path)
    assert torch.equal(model.wte.weight, newer.wte.weight)
