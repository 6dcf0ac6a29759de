"""The command line: output, exit codes, and one-sentence error messages."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import QUESTION, refused

from gptfast import checkpoint, cli, files
from gptfast.config import GPTConfig
from gptfast.generation.engine import Engine
from gptfast.generation.reference_loop import ReferenceLoop
from gptfast.model import GPT
from gptfast.ops import select
from gptfast.tokenizer import CharTokenizer
from gptfast.training import run

README = Path(__file__).resolve().parents[1] / "README.md"
DOCS = [str(path.relative_to(README.parent)) for path in (README.parent / "docs").rglob("*.md")]
SMALL = ["--train.steps=3", "--train.batch-size=2", "--model.n-embd=16", "--model.n-layer=1"]


@pytest.fixture(scope="session")
def run_path(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A run of three steps on the text."""
    path = tmp_path_factory.mktemp("runs") / "small"
    assert cli.main(["train", "abc", "--data", str(text_file), "--out", str(path), *SMALL]) == 0
    return path


def shell(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gptfast", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_help_names_every_command(capsys):
    assert cli.main([]) == 0
    found = re.findall(r"^  (\w+) +\w", capsys.readouterr().out, re.M)
    assert found == [*cli.COMMANDS] and {"train", "generate", "reproduce"} <= {*found}


@pytest.mark.parametrize(
    "name",
    [
        *("demo", "data prepare", "data shakespeare", "train abc", "eval"),
        *("generate", "inspect", "plot", "export", "reproduce"),
    ],
)
def test_every_option_has_a_help_text(capsys, name):
    assert cli.main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    own = out.split("model options")[0]  # the fields of configs have their own documentation
    options = re.findall(r"^[│ ] (--\w.*?)(?=^[│ ] --|^ *$|^╰|\Z)", own, re.M | re.S)
    assert options
    for option in options:
        words = re.sub(r"\(default.*", "", option.replace("│", " "), flags=re.S).split()
        assert len(words) > 3, option


def test_train_help_lists_the_presets(capsys):
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "  abc " in out and "  shakespeare " in out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    extension = select.extension()
    in_use = "none chosen" if extension is None else extension.isa_current()
    assert re.search(rf"^instruction set +{in_use} *$", out, re.M)
    available = re.search(r"^fused kernels +available *$", out, re.M) is not None
    assert available == (not select.unavailable("cpu", torch.float32))


def test_data_writes_the_corpus_once(capsys, tmp_path):
    path = tmp_path / "new" / "abc.txt"
    sha256 = "bbb7a80ab43426fada8beeb2800fd0102b809d852e49b877dcd1d859f2b036a7"
    for state in ("written", "was there already"):
        assert cli.main(["data", "abc", "--out", str(path)]) == 0
        out = capsys.readouterr().out
        assert f"{path} ({state})" in out and "1,079,918" in out and sha256 in out
    assert path.stat().st_size == 1_079_918
    assert [file.name for file in path.parent.iterdir()] == ["abc.txt"]


def test_data_goes_to_the_data_folder(capsys, tmp_path, monkeypatch, shakespeare_path):
    monkeypatch.setenv("GPTFAST_DATA_DIR", str(tmp_path))
    assert cli.main(["data", "shakespeare", "--from", str(shakespeare_path)]) == 0
    assert (tmp_path / "shakespeare.txt").read_bytes() == shakespeare_path.read_bytes()
    assert "1,115,394" in capsys.readouterr().out


def test_data_leaves_a_file_with_another_content(capsys, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("mine")
    assert "exists with another content" in refused(capsys, "data", "abc", "--out", path)
    assert path.read_text() == "mine"


def test_data_from_another_text(capsys, tmp_path, text_file):
    error = refused(capsys, "data", "shakespeare", "--from", text_file, "--out", tmp_path / "x")
    assert f"{text_file} is not the corpus 'shakespeare'" in error and "sha256" in error
    assert not (tmp_path / "x").exists()


def test_train_writes_a_run(run_path):
    rows = [json.loads(line) for line in (run_path / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3
    model, tokenizer = checkpoint.load(run_path)
    assert (model.config.n_embd, model.config.n_layer) == (16, 1)
    assert tokenizer == CharTokenizer.from_text(QUESTION)


def test_train_resumes_and_plots(capsys, tmp_path, text_file):
    pytest.importorskip("matplotlib")
    common = ["train", "abc", "--data", str(text_file), "--out", str(tmp_path / "run"), *SMALL]
    assert cli.main(common) == 0
    plot = tmp_path / "plot.png"
    assert cli.main([*common, "--train.steps=5", "--resume", "--plot", str(plot)]) == 0
    assert checkpoint.read_config(tmp_path / "run")["extra"]["step"] == 5
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert "\x1b" not in "".join(capsys.readouterr())


def test_epochs_without_the_presets_steps(tmp_path, text_file):
    out = tmp_path / "run"
    arguments = ["--train.epochs=1", "--train.steps=None", "--train.batch-size=64"]
    arguments += ["--model.n-embd=16"]
    assert cli.main(["train", "abc", "--data", str(text_file), "--out", str(out), *arguments]) == 0
    train = checkpoint.read_config(out)["extra"]["train"]
    assert (train["epochs"], train["steps"]) == (1, None)


def test_every_size_of_a_vocabulary_counts(capsys, tmp_path):
    """66 is what Shakespeare has; it must not be taken for an option that was not given."""
    file = tmp_path / "text.txt"
    options = ["--data", str(file), *SMALL, "--train.text-fraction=1"]
    for chars, given, expected in ((10, 66, 66), (10, 67, 67), (10, None, 11), (10, 11, 11)):
        file.write_text("".join(chr(ord("A") + i % chars) for i in range(2000)))
        size = [f"--model.vocab-size={given}"]
        for arguments in [size] if given else [size, []]:
            out = tmp_path / f"{given}{len(arguments)}"
            command = ["train", "shakespeare", "--out", str(out), *options, *arguments]
            assert cli.main(command) == 0
            assert checkpoint.read_config(out)["config"]["vocab_size"] == expected
    file.write_text("".join(chr(ord("A") + i % 80) for i in range(2000)))
    capsys.readouterr()
    for given in (66, 67):
        command = ["train", "shakespeare", "--out", tmp_path / "x", *options]
        error = refused(capsys, *command, f"--model.vocab-size={given}")
        assert error == f"vocab_size must be at least the tokenizer's 81, got {given}"


def test_eval_measures_the_held_out_part_or_a_file(capsys, run_path, text_file):
    shown = []
    for arguments in ([], ["--data", str(text_file)], ["--backend", "reference"]):
        assert cli.main(["eval", str(run_path), *arguments]) == 0
        out = capsys.readouterr().out
        loss, perplexity, bits, characters = (
            float(re.search(rf"^{name} +([\d.,]+)", out, re.M)[1].replace(",", ""))
            for name in ("loss", "perplexity", "bits", "characters")
        )
        assert perplexity == pytest.approx(2.718281828**loss, rel=1e-3)
        assert bits == pytest.approx(loss / 0.69314718, rel=1e-3)
        shown.append((loss, characters))
    history = json.loads((run_path / "history.jsonl").read_text().splitlines()[-1])
    assert shown[0] == (pytest.approx(history["val_loss"], abs=1e-3), len(QUESTION) * 0.2 - 1)
    assert shown[1][1] == len(QUESTION) - 1
    assert shown[2][0] == pytest.approx(shown[0][0], abs=1e-3)


def test_generate_streams_what_generate_gives(capsys, run_path):
    options = ["--max-new-tokens=40", "--top-k=3", "--seed=5", "--threads=1"]
    assert cli.main(["generate", str(run_path), "--prompt", "to be", *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("to be") and len(out) == len("to be") + 40 + 1
    prompts = ["--prompt", "to be", "--prompt", "question"]
    assert cli.main(["generate", str(run_path), *prompts, *options]) == 0
    both = capsys.readouterr().out
    assert both.startswith(f"--- 1 of 2\n{out}--- 2 of 2\nquestion")


def test_generate_is_the_same_by_both_backends(capsys, run_path):
    shown = []
    for backend in ("auto", "reference"):
        options = ["--temperature=0", "--max-new-tokens=30", "--backend", backend]
        assert cli.main(["generate", str(run_path), "--prompt", "to", *options]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_generate_reads_prompts_from_a_file_and_from_standard_input(run_path, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("not to be")
    options = ["--prompt", "-", "--prompt-file", file, "--max-new-tokens=0"]
    done = shell("generate", run_path, *options, input="that is")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "--- 1 of 2\nthat is\n--- 2 of 2\nnot to be\n"


def test_unknown_characters_are_left_out_on_request(capsys, run_path, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(QUESTION)
    assert cli.main(["eval", str(run_path), "--data", str(file)]) == 0
    expected = capsys.readouterr().out
    file.write_text("É" + QUESTION.replace("be", "bße"))
    options = ["--data", str(file), "--unknown", "skip"]
    assert cli.main(["eval", str(run_path), *options]) == 0
    skipped = 1 + QUESTION.count("be")
    line = f"skipped     {skipped:,} characters that the vocabulary lacks\n"
    assert capsys.readouterr().out == expected + line
    shown = []
    for prompt in ("to bé", "to b"):
        options = ["--prompt", prompt, "--unknown", "skip", "--max-new-tokens=5", "--top-k=0"]
        assert cli.main(["generate", str(run_path), *options]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and shown[0].startswith("to b")


def test_a_byte_order_mark_is_no_character_of_a_prompt(run_path, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("not", encoding="utf-8-sig")
    options = ["--prompt", "-", "--prompt-file", file, "--max-new-tokens=0"]
    done = shell("generate", run_path, *options, input="\ufeffthat", encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "--- 1 of 2\nthat\n--- 2 of 2\nnot\n"


def test_generate_stops_before_the_stop(capsys, tmp_path):
    path = tmp_path / "model"
    torch.manual_seed(0)
    config = GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8)
    checkpoint.save(GPT(config), CharTokenizer.from_text("ABCD"), path)
    options = ["--max-new-tokens=200", "--seed=1"]
    assert cli.main(["generate", str(path), "--prompt", "A", *options]) == 0
    whole = capsys.readouterr().out
    stop = whole[50:52]
    assert cli.main(["generate", str(path), "--prompt", "A", *options, "--stop", stop]) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop, 1)] + "\n"


def test_inspect_shows_the_parts_and_the_attention(capsys, run_path):
    assert cli.main(["inspect", str(run_path), "--attention", "to be"]) == 0
    out = capsys.readouterr().out
    model, tokenizer = checkpoint.load(run_path)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert re.search(rf"^total +{total:,}$", out, re.M)
    assert re.search(r"^h\.\*\.attn\.c_attn +48 x 16 +48 +1 +816$", out, re.M)
    assert "n_embd: 16" in out and repr("".join(tokenizer.chars)) in out
    # The first character can only attend to itself; a row has a digit for each it may see.
    nats = r" {2,}\d\.\d\d\n"
    rows = rf"  t 9 {{4}}  0.00\n  o \d\d{nats}    \d{{3}}{nats}  b \d{{4}}{nats}  e \d{{5}}{nats}"
    assert re.search(rf"layer 0, head 1: .* entropy in nats\n    to be\n{rows}", out)


def test_inspect_draws_the_attention(capsys, run_path, tmp_path):
    pytest.importorskip("matplotlib")
    command = ["inspect", str(run_path), "--attention", "to be"]
    assert cli.main(command) == 0
    wanted = capsys.readouterr().out
    pictures = []
    for options in ([], ["--contributions=1"], ["--contributions", "-4"]):
        path = tmp_path / "new" / f"{len(pictures)}.png"
        assert cli.main([*command, *options, "--plot", str(path)]) == 0
        assert capsys.readouterr().out == wanted
        pictures.append(path.read_bytes())
        assert pictures[-1][:4] == b"\x89PNG"
    assert pictures[0] != pictures[1] == pictures[2]


def test_inspect_shows_what_heads_add(capsys, run_path):
    command = ["inspect", str(run_path), "--attention", "to be", "--contributions"]
    assert cli.main([*command, "-1"]) == 0
    out = capsys.readouterr().out.rpartition("what each head adds to the attention's output at ")[2]
    assert out.startswith("position 4, 'e':\n\nlayer 0 ")
    rows = re.findall(r"^  (head \d|bias|sum) +(\S+) +(\S+)$", out, re.M)
    assert [row[0] for row in rows] == ["head 0", "head 1", "bias", "sum"]
    *projections, total = (float(row[2]) for row in rows)
    assert total == float(rows[-1][1]) == pytest.approx(sum(projections), abs=1e-3)
    difference = re.search(r"The terms sum to the output \(largest difference (.+)\)\.\n$", out)
    assert float(difference[1]) < 1e-5
    assert cli.main([*command, "4"]) == 0
    assert capsys.readouterr().out.endswith(out)


def test_inspect_of_a_model_without_attention(capsys, tmp_path):
    config = GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8, attention=False)
    checkpoint.save(GPT(config), CharTokenizer.from_text("ABCD"), tmp_path / "model")
    options = [[], ["--contributions=0"], ["--plot", str(tmp_path / "a.png")]]
    for each in options:
        error = refused(capsys, "inspect", tmp_path / "model", "--attention", "AB", *each)
        assert error == "a model with attention=False has no attention weights"
    assert not (tmp_path / "a.png").exists()


def test_inspect_asks_for_matplotlib_before_any_work(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ["--attention", "A", "--plot", "a.png"]
    assert "pictures need matplotlib" in refused(capsys, "inspect", "missing", *options)
    options = ["--out", "x", "--data", "missing", "--plot", "a.png"]
    assert "pictures need matplotlib" in refused(capsys, "train", "abc", *options)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["teach"], r"there is no command 'teach'; there are demo, data"),
        (["data", "abd"], r"there is no data 'abd'; there are abc, shakespeare, prepare"),
        (["data", "abc", "--from", "x"], r"--from, x \(see gptfast data abc --help\)"),
        (["data", "abc", "--size", "1"], r"--size, 1 \(see gptfast data abc --help\)"),
        (["train", "tiny", "--out", "x"], r"there is no preset 'tiny'; there are abc, gpt2"),
        (["train", "--out", "x", "abc"], r"the preset comes first"),
        (["train", "abc"], r"Missing.*--out"),
        (["train", "abc", "--out", "x", "--model.width", "4"], r"--model.width"),
        (["train", "abc", "--out", "x", "--train.lr", "fast"], r"--train.lr.*'fast'"),
        (["train", "abc", "--out", "x", "--train.lr", "0"], r"lr must be a number above 0"),
        (["train", "abc", "--out", "x", "--train.steps", "-1"], r"steps must be a positive"),
        (["train", "abc", "--out", "x", "--model.n-head", "3"], r"n_embd=128 and n_head=3"),
        (["train", "abc", "--out", "x", "--data", "missing"], r"missing: no such file"),
        (["train", "abc", "--out", "x", "--data", "empty"], r"empty: the file is empty"),
        (["train", "abc", "--out", "x", "--data", "short"], r"shorter than a window.*needs 17"),
        (["train", "abc", "--out", "x", "--data", "latin"], r"expected UTF-8, got byte 0xe9"),
        (["train", "abc", "--out", "x", "--plot", "x.txt"], r"x.txt: a picture's name must"),
        (["train", "abc", "--out", "x", "--resume"], r"there is no run to resume"),
        (["train", "abc", "--out", "empty/x", "--data", "short"], r"empty is not a directory"),
        (
            ["train", "abc", "--out", "x", "--threads", "0"],
            r"--threads must be .* from 1 .*, got 0",
        ),
        (["demo", "--threads", "100000"], r"--threads must be a whole number from 1 to .* 100000"),
        (["demo", "--seed", "-1"], r"seed must be a whole number in \[0, 2\*\*63\), got -1"),
        (["train", "abc", "--out", "x", "--train.threads", "100000"], r"^threads must be a whole"),
        (["train", "abc", "--out", "x", "--device", "meta"], r"device 'meta' keeps no numbers"),
        (["eval", "missing"], r"missing: no such checkpoint"),
        (["generate", "missing", "--prompt", "A"], r"missing: no such checkpoint"),
        (["inspect", "."], r"\.: not a checkpoint, it has no model.safetensors"),
        (["generate", "RUN"], r"there is no prompt"),
        (["generate", "RUN", "--prompt", ""], r"prompt 0 is empty"),
        (["generate", "RUN", "--prompt", "to bé"], r"character 'é' at position 4 \(line 1, col"),
        (["generate", "RUN", "--prompt", "t", "--overflow", "slide"], r"overflow must be.*'slide'"),
        (["generate", "RUN", "--prompt", "t", "--overflow", "error"], r"block_size is 16"),
        (["generate", "RUN", "--prompt", "t", "--temperature", "-1"], r"temperature must be"),
        (["generate", "RUN", "--prompt", "éñ", "--unknown=skip"], r"prompt 0 is empty; a prompt"),
        (["generate", "RUN", "--prompt", "t", "--seed", "-1"], r"seed must be .*, got -1"),
        (["generate", "RUN", "--prompt", "t", f"--seed={2**64}"], r"seed must be .* got 18446"),
        (["generate", "RUN", "--prompt", "t", "--device", "banana"], r"device must be .* 'banana'"),
        (["generate", "RUN", "--prompt", "t", "--top-k", "-1"], r"top_k must be"),
        (["generate", "RUN", "--prompt", "t", "--stop", ""], r"stop must be non-empty"),
        (["generate", "RUN", "--prompt", "t", "--dtype", "fp8"], r"'fp8'.*'bf16'"),
        (["eval", "RUN", "--data", "short"], r"character 'A' at position 0"),
        (["eval", "RUN", "--data", "short", "--unknown", "skip"], r"at least 2 tokens"),
        (["inspect", "RUN", "--attention", "to be or not to be"], r"at most block_size=16"),
        (["inspect", "RUN", "--attention", ""], r"needs at least one character"),
        (["inspect", "missing", "--plot", "a.png"], r"^--plot needs --attention TEXT$"),
        (["inspect", "missing", "--contributions", "0"], r"^--contributions needs --attention"),
        (["inspect", "missing", "--attention=t", "--plot=a.txt"], r"a.txt: a picture's name must"),
        (["inspect", "RUN", "--attention=to", "--contributions=2"], r"0 to 1, or from -2 .* got 2"),
        (["inspect", "RUN", "--attention=to", "--contributions=-3"], r"0 to 1, or .* got -3"),
        (["inspect", "RUN", "--attention=to", "--plot", "empty/a.png"], r"cannot be written"),
    ],
)
def test_a_mistake_gives_one_sentence(capsys, tmp_path, monkeypatch, run_path, arguments, expected):
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    Path("short").write_text("AB\n")
    Path("latin").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    before = {path.name for path in tmp_path.iterdir()}
    error = refused(capsys, *[run_path if each == "RUN" else each for each in arguments])
    assert re.search(expected, error), error
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_run_is_not_replaced_unasked(capsys, run_path, text_file):
    error = refused(capsys, "train", "abc", "--data", text_file, "--out", run_path, *SMALL)
    assert "already holds a run" in error


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x00" * 100, "damaged"),
        (b"", "damaged"),
        (None, "not a gptfast checkpoint"),
    ],
)
def test_damaged_and_foreign_checkpoints(capsys, tmp_path, content, expected):
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    if content is None:
        save_file({"weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    else:
        file.write_bytes(content)
    error = refused(capsys, "generate", tmp_path, "--prompt", "A")
    assert expected in error and str(file) in error


def test_a_truncated_checkpoint(capsys, tmp_path, run_path):
    for file in ("model.safetensors", "config.json"):
        content = (run_path / file).read_bytes()
        (tmp_path / file).write_bytes(content[: len(content) // (2 if "model" in file else 1)])
    assert "damaged" in refused(capsys, "eval", tmp_path)


def test_a_checkpoint_without_tokenizer_takes_no_text(capsys, tmp_path):
    config = GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8)
    checkpoint.save(GPT(config), None, tmp_path)
    assert "has no tokenizer" in refused(capsys, "generate", tmp_path, "--prompt", "A")
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "tokenizer: none" in capsys.readouterr().out


def test_the_traceback_is_there_on_request(monkeypatch):
    monkeypatch.setenv("GPTFAST_DEBUG", "1")
    with pytest.raises(ValueError, match="no command"):
        cli.main(["teach"])


def test_an_interrupt_ends_with_130(monkeypatch):
    def interrupt(self: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.commands.Info, "run", interrupt)
    assert cli.main(["info"]) == 130


@pytest.mark.parametrize("details", ["", "Unable to allocate 15 GiB"])
def test_too_little_memory_is_one_sentence(capsys, monkeypatch, run_path, details):
    def allocate(*_: object, **__: object) -> object:
        raise MemoryError(*filter(None, [details]))

    monkeypatch.setattr(Engine, "__init__", allocate)
    error = refused(capsys, "generate", run_path, "--prompt", "to", "--max-new-tokens", 10**9)
    assert error == "there is not enough memory" + f": {details}" * bool(details)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_tyros_boxes_become_a_sentence_in_any_encoding(encoding):
    done = shell("data", "abc", "--size", env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 2
    assert done.stderr == "gptfast: Unrecognized options: --size (see gptfast data abc --help)\n"


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    done = shell("generate", tmp_path / "none", "--prompt", "A")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"gptfast: {tmp_path / 'none'}: no such checkpoint\n"


@pytest.mark.skipif(os.name != "posix", reason="needs signals and pipes as POSIX has them")
@pytest.mark.parametrize("name", ["SIGINT", "SIGINT ignored", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_the_run(tmp_path, text_file, name):
    out, number = tmp_path / "run", getattr(signal, name.split()[0])
    options = ["--data", text_file, "--out", out, *SMALL, "--train.steps=1000000"]
    command = [sys.executable, "-m", "gptfast", "train", "abc", "--train.eval-every=5"]
    # If a shell started the tests in the background, child processes ignore SIGINT.
    at_start = signal.SIG_IGN if "ignored" in name else signal.SIG_DFL
    process = subprocess.Popen(
        [*command, *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, at_start),
    )
    deadline = time.monotonic() + 60
    while not (out / "model.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr and "saved" not in stdout
    step = checkpoint.read_config(out)["extra"]["step"]
    assert f"interrupted at step {step} " in stderr
    names = {file.name for file in out.iterdir() if file.is_file()}
    assert names - {*run.OTHER_FILES} == set(run.FILES)


def test_a_run_starts_from_another_ones_model(capsys, tmp_path, run_path, text_file):
    common = ["train", "shakespeare", "--data", str(text_file), "--init-from", str(run_path)]
    options = ["--out", str(tmp_path / "run"), "--train.steps=2", "--train.precision=bf16"]
    assert cli.main([*common, *options, "--train.text-fraction=1", "--model.dropout=0.5"]) == 0
    model, tokenizer = checkpoint.load(tmp_path / "run")
    old, known = checkpoint.load(run_path)
    assert (model.config.dropout, tokenizer) == (0.5, known)
    assert replace(model.config, dropout=old.config.dropout) == old.config
    resumed = ["train", "shakespeare", "--data", str(text_file), *options, "--resume"]
    resumed += ["--train.steps=3", "--train.text-fraction=1"]
    assert cli.main(resumed) == 0
    assert checkpoint.load(tmp_path / "run")[0].config == model.config
    capsys.readouterr()
    # The preset's value differs from the model's.
    error = refused(capsys, *common, "--out", tmp_path / "x", "--model.block-size=64")
    assert "the model has block_size=16 and a run from it cannot have block_size=64" in error
    error = refused(capsys, *common[:-1], tmp_path / "none", "--out", tmp_path / "x")
    assert "none: no such checkpoint" in error
    error = refused(capsys, *common[:-1], "--out", tmp_path / "x")
    assert "--init-from" in error


@pytest.mark.parametrize("elsewhere", [True, False])
def test_the_model_of_a_failed_last_save_is_saved_elsewhere(
    capsys, tmp_path, text_file, monkeypatch, disk_full, elsewhere
):
    write, out = files._write, tmp_path / "run"

    def full(path, content, durable):
        if durable and (path.parent == out or not elsewhere):
            disk_full()
        write(path, content, durable)

    monkeypatch.setattr(files, "_write", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arguments = ["train", "abc", "--data", str(text_file), "--out", str(out), *SMALL]
    assert cli.main(arguments) == 2
    stdout, stderr = capsys.readouterr()
    sentence = stderr.splitlines()[-1]
    assert stdout == "" and sentence.startswith(f"gptfast: {out}: the last save failed (")
    assert "No space left on device" in sentence
    if elsewhere:
        place = sentence.rpartition("; the trained model is saved in ")[2]
        assert checkpoint.load(place)[0].config.n_embd == 16
    else:
        assert "and so did one elsewhere (" in sentence


@pytest.mark.parametrize("loop", [Engine, ReferenceLoop])
@pytest.mark.parametrize("prompts", [["to"], ["to", "be"]])
def test_ctrl_c_prints_what_is_generated(capsys, monkeypatch, run_path, loop, prompts):
    calls, run = [], loop.run

    def run_and_press(self, seconds):
        more = run(self, seconds)
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return more

    backend = "--backend=reference" if loop is ReferenceLoop else "--backend=auto"
    options = [backend, *(f"--prompt={prompt}" for prompt in prompts), "--seed=5"]
    command = ["generate", str(run_path), *options]
    assert cli.main([*command, "--max-new-tokens=10"]) == 0
    whole = capsys.readouterr().out
    monkeypatch.setattr(loop, "run", run_and_press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main([*command, "--max-new-tokens=1000000"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert err == "" and len(calls) == 3
    heads = [f"--- {i} of 2\n" for i in (1, 2)] if len(prompts) == 2 else [""]
    parts = re.split(r"--- \d of 2\n", out)[-len(prompts) :]
    wholes = re.split(r"--- \d of 2\n", whole)[-len(prompts) :]
    assert all(head in out for head in heads)
    for prompt, part, expected in zip(prompts, parts, wholes, strict=True):
        shown = part.removesuffix("\n")
        assert len(shown) > len(prompt) and shown[:6] == expected[: len(shown[:6])]


@pytest.mark.skipif(os.name != "posix", reason="needs signals and pipes as POSIX has them")
def test_a_closed_pipe_is_quiet(run_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "gptfast", "generate", str(run_path)]
        + ["--prompt", "to", "--max-new-tokens", "2000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(2) == b"to"
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def documented_tree() -> list[str]:
    """Returns the paths in docs/architecture.md's tree, without folders whose contents follow."""
    page = README.parent / "docs" / "architecture.md"
    block = re.search(r"## The tree\n\n```\n(.*?)```", page.read_text(), re.S)
    assert block is not None
    paths, folders = [], [""]
    for line in block[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        del folders[depth + 1 :]
        if len(line.split()) == 1:  # a folder; its contents follow
            folders.append(folders[depth] + name)
        else:
            paths.append(folders[depth] + name)
    return paths


def test_documented_tree_is_the_tree():
    root, paths = README.parent, documented_tree()
    assert [path for path in paths if not (root / path).exists()] == []
    assert len(set(paths)) == len(paths)
    made = ("_build_info.json", ".so", ".pyd", ".pyc")
    files = [file for folder in ("gptfast", "csrc") for file in (root / folder).rglob("*")]
    present = {str(file.relative_to(root)) for file in files if file.is_file()}
    unlisted = {path for path in present - set(paths) if not path.endswith(made)}
    assert unlisted == set()


def test_readmes_set_up_is_what_ci_runs():
    ci = (README.parent / ".ci" / "run").read_text()
    for line in ("pip install -e . && gptfast demo", 'pip install -e ".[test]" && pytest'):
        assert f"\n{line}\n" in README.read_text()
        assert line in ci


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *sorted(DOCS)])
def test_links_of_the_documents_lead_somewhere(page):
    path = README.parent / page
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_readmes_example_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 1
    done = subprocess.run(
        [sys.executable, "-c", blocks[0]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(README.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) < 1.6
    for line in done.stdout.splitlines()[-2:]:
        found = re.search(r"(-\d+\.\d+) (\d+\.\d+)$", line)
        assert found is not None
        logprob, bits = map(float, found.groups())  # of 4 characters, the first is context
        assert bits == pytest.approx(-logprob / math.log(2) / 3)
    original, copy = (tmp_path / "runs" / name for name in ("example", "copy"))
    weights = [(path / "model.safetensors").read_bytes()[-1000:] for path in (original, copy)]
    assert weights[0] == weights[1]


def test_threads_of_the_command_are_those_of_the_run(text_file, tmp_path):
    options = ["train", "abc", "--data", str(text_file), "--out", str(tmp_path), *SMALL]
    assert cli.main([*options, "--threads", "1"]) == 0
    assert checkpoint.read_config(tmp_path)["extra"]["train"]["threads"] == 1
