"""Models of Hugging Face's hub, without a network: from its cache, and what goes wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import small_gpt2

import gptfast
from gptfast import GPT, BPETokenizer, CheckpointError, ConfigError, cli, formats
from gptfast.formats import huggingface

hub = pytest.importorskip("huggingface_hub", reason="fetches models by Hugging Face's library")
for _name in ("errors", "constants"):  # whose import makes them attributes
    pytest.importorskip(f"huggingface_hub.{_name}")

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40
TOKENIZER = BPETokenizer.train("The cat sat on the mat.\n" * 9, 280)
REMOTE = getattr(hub.errors, "RemoteEntryNotFoundError", hub.errors.EntryNotFoundError)


def model_of(n_layer: int = 1) -> GPT:
    return small_gpt2(seed=n_layer, n_layer=n_layer)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's cache, empty; it asks no network."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def repository(cache: Path, **refs: str) -> Path:
    """Makes a repository in a cache, with a folder per commit; returns that of COMMIT."""
    place = cache / "models--owner--name"
    (place / "refs").mkdir(parents=True)
    for name, commit in refs.items():
        (place / "refs" / name).write_text(commit)
        layers = 1 if commit == COMMIT else 2
        huggingface.write(model_of(layers), TOKENIZER, place / "snapshots" / commit)
    return place / "snapshots" / COMMIT


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("hf:owner/name", 1),
        ("hf:owner/name@main", 1),
        ("hf:owner/name@v2", 2),
        (f"hf:owner/name@{OTHER}", 2),
        (Path("hf:owner/name@v2"), 2),
    ],
)
def test_a_model_in_the_cache(name: Any, layers: int, cache: Path) -> None:
    repository(cache, main=COMMIT, v2=OTHER)
    model, tokenizer = gptfast.load(name)
    assert tokenizer == TOKENIZER == formats.tokenizer_of(name)
    assert model.config.n_layer == layers and model.config == formats.config_of(name)
    for own, expected in zip(model.parameters(), model_of(layers).parameters(), strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_librarys_variables_are_followed(variable: str, tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    repository(cache, main=COMMIT)
    place = tmp_path if variable == "HF_HOME" else cache
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_HUB_OFFLINE": "1", variable: str(place)}
    code = "import gptfast; print(gptfast.load('hf:owner/name')[0].config.n_layer)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_the_commands_take_a_name(cache: Path, tmp_path: Path, capsys: Any) -> None:
    repository(cache, main=COMMIT)
    options = ["--prompt", "The cat", "--max-new-tokens", "3"]
    assert cli.main(["generate", "hf:owner/name", *options]) == 0
    assert capsys.readouterr().out.startswith("The cat")
    assert cli.main(["inspect", "hf:owner/name@main"]) == 0
    assert cli.main(["eval", "hf:owner/name"]) == 2
    sentence = "gptfast: hf:owner/name: it is not known on which text this model was trained: give"
    assert capsys.readouterr().err.startswith(sentence)
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat.\n" * 20)
    assert cli.main(["eval", "hf:owner/name", "--data", str(text)]) == 0
    options = ["--out", str(tmp_path / "tokens"), "--tokenizer", "hf:owner/name"]
    assert cli.main(["data", "prepare", str(text), *options]) == 0
    options = ["--out", str(tmp_path / "run"), "--data", str(text), "--init-from", "hf:owner/name"]
    options += ["--train.steps", "2", "--train.batch-size", "2"]
    assert cli.main(["train", "abc", *options]) == 0
    header = gptfast.checkpoint.read_config(tmp_path / "run")
    assert header["extra"]["init_from"] == "hf:owner/name"
    others = {"attn_proj_dropout": True, "init": "gpt2"}
    assert header["config"] == model_of().config.to_dict() | others
    again = [*options, "--resume", "--train.steps", "3"]
    assert cli.main(["train", "abc", *again]) == 0


# ---- which files are fetched


class Remote:
    """Stands for the hub: gives files, and notes what it is asked."""

    def __init__(self, files: Path) -> None:
        self.files, self.asked = files, []  # type: tuple[Path, list[tuple[str, str | None]]]
        self.missing: type[Exception] = REMOTE

    def hf_hub_download(self, repository: str, name: str, *, revision: str | None) -> str:
        assert repository == "owner/name"
        self.asked.append((name, revision))
        if not (self.files / name).is_file():
            raise failure(self.missing)
        return str(self.files / name)


def failure(kind: type[Exception]) -> Exception:
    """An error of the library."""
    local = issubclass(kind, hub.errors.LocalEntryNotFoundError)
    if local or not issubclass(kind, hub.errors.HfHubHTTPError):
        return kind("the message\nand more")
    answer: Any = SimpleNamespace(headers={}, request=None, status_code=404)
    return kind("the message\nand more", response=answer)  # type: ignore[call-arg]


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A hub with a model."""
    huggingface.write(model_of(), TOKENIZER, tmp_path / "snapshots" / COMMIT)
    found = Remote(tmp_path / "snapshots" / COMMIT)
    monkeypatch.setattr(hub, "hf_hub_download", found.hf_hub_download)
    return found


SETTINGS = ["tokenizer_config.json", "special_tokens_map.json"]


def test_only_what_is_needed_is_fetched_and_all_of_one_commit(remote: Remote) -> None:
    (remote.files / "pytorch_model.bin").touch()
    (remote.files / "vocab.json").touch()
    gptfast.load("hf:owner/name@main")
    names = ["model.safetensors", "tokenizer.json", *SETTINGS]
    assert remote.asked == [("config.json", "main"), *((name, COMMIT) for name in names)]
    remote.asked.clear()
    formats.config_of("hf:owner/name")
    assert [name for name, _ in remote.asked] == ["config.json", "tokenizer.json", *SETTINGS]
    assert remote.asked[0][1] is None


@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_fetched(stem: str, remote: Remote) -> None:
    from safetensors.torch import load_file, save_file

    whole = remote.files / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    first, second = (f"{i}{Path(stem).suffix}" for i in (1, 2))
    for name, part in ((first, [*tensors][:5]), (second, [*tensors][5:])):
        content = {each: tensors[each] for each in part}
        keep: Any = save_file if stem == "model.safetensors" else torch.save
        keep(content, remote.files / name)
    places = dict.fromkeys([*tensors][:5], first) | dict.fromkeys([*tensors][5:], second)
    index = remote.files / f"{stem}.index.json"
    index.write_text(f'{{"weight_map": {places}}}'.replace("'", '"'))
    assert gptfast.load("hf:owner/name")[0].config.n_layer == 1
    asked = [name for name, _ in remote.asked]
    assert asked[asked.index(index.name) + 1 :][:2] == [first, second]
    (remote.files / second).unlink()
    with pytest.raises(CheckpointError, match=f"^hf:owner/name: the repository has no {second}$"):
        gptfast.load("hf:owner/name")


def test_a_model_without_tokenizer(remote: Remote) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (remote.files / name).unlink()
    assert gptfast.load("hf:owner/name")[1] is None
    assert ("vocab.json", COMMIT) in remote.asked
    remote.missing = hub.errors.LocalEntryNotFoundError
    with pytest.warns(UserWarning, match="has no tokenizer, and the hub cannot be reached: the mo"):
        assert gptfast.load("hf:owner/name")[1] is None


def test_a_checkpoint_of_gptfast_on_the_hub(remote: Remote) -> None:
    shutil.rmtree(remote.files)
    gptfast.save(model_of(3), TOKENIZER, remote.files)
    model, tokenizer = gptfast.load("hf:owner/name")
    assert (model.config, tokenizer) == (model_of(3).config, TOKENIZER)
    assert [name for name, _ in remote.asked] == ["config.json", "model.safetensors"]
    assert formats.config_of("hf:owner/name") == model_of(3).config
    assert formats.tokenizer_of("hf:owner/name") == TOKENIZER


# ---- what goes wrong


def refused(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        gptfast.load(name)
    sentence = str(caught.value)
    assert sentence.startswith(f"{name}: ") and "\n" not in sentence


def test_what_the_cache_lacks(cache: Path) -> None:
    ending = ", and HF_HUB_OFFLINE forbids to ask the hub$"
    refused("hf:owner/name", f"the cache {cache} has no config.json{ending}")
    folder = repository(cache, main=COMMIT)
    refused("hf:owner/name@v9", f"has no config.json{ending}")
    (folder / "model.safetensors").rename(folder / "other")
    refused("hf:owner/name", f"has no weights{ending}")
    (folder / "other").rename(folder / "model.safetensors")
    (folder / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match="has no tokenizer, and HF_HUB_OFFLINE forbids to ask the"):
        assert gptfast.load("hf:owner/name")[1] is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", "no such repository, or a private one, which needs `hf auth"),
        ("GatedRepoError", "the repository is gated: ask for access on its page, and log in by"),
        ("RevisionNotFoundError", "the repository has no revision 'v9'$"),
        ("LocalEntryNotFoundError", "has no config.json, and the hub cannot be reached$"),
        ("HfHubHTTPError", "config.json cannot be fetched .the message.$"),
        (REMOTE.__name__, "the repository has no config.json$"),
    ],
)
def test_what_the_hub_refuses(error: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise failure(getattr(hub.errors, error))

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    refused("hf:owner/name@v9", message)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError()])
def test_other_errors(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    refused("hf:owner/name", "config.json cannot be fetched .(.*No space left|ValueError)")


@pytest.mark.parametrize("name", ["hf:", "hf:a/b/c", "hf:a b", "hf:@main", "hf:/etc/passwd"])
def test_names_that_are_none(name: str, cache: Path) -> None:
    refused(name, "not a model of the hub, expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION$")


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths do not need it: they never go to the hub."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"huggingface_hub: pip install 'gptfast-kernels.hub.'$"):
        gptfast.load("hf:owner/name")
    for path in ("owner/name", "openai-community/gpt2", "gpt2", "HF:owner/name", "./hf:owner"):
        with pytest.raises(CheckpointError, match="no such checkpoint$"):
            gptfast.load(path)
    huggingface.write(model_of(), TOKENIZER, tmp_path / "owner" / "name")
    assert gptfast.load("owner/name")[1] == TOKENIZER
