"""What the command line says: help texts, notes on a run, advice in errors."""

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import QUESTION

import gptfast
from gptfast import checkpoint, cli
from gptfast.cli import completion
from gptfast.config import GPTConfig
from gptfast.errors import CheckpointError, DataError
from gptfast.formats import nanogpt
from gptfast.model import GPT

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--train.batch-size=2", "--model.n-embd=16", "--model.n-layer=1", "--model.block-size=8"]


@pytest.fixture(scope="module")
def helps() -> list[tuple[str, str, str]]:
    """How each command begins, each of its options, and the option's help."""
    table = completion.table(cli.cli.command_lines())
    places = [line for line, _, _ in cli.cli.command_lines()]
    return [
        (place, option, help)
        for place in places
        for option, help in table[place].items()
        if option.startswith("--")
    ]


def test_every_option_of_every_command_has_a_help(helps):
    assert ("train shakespeare", "--model.gelu") in {(place, option) for place, option, _ in helps}
    assert [(place, option) for place, option, help in helps if not help.strip()] == []


def test_the_help_of_a_negated_flag_does_not_say_what_the_field_does(helps):
    negated = [each for each in helps if re.match(r"--(\w+\.)?no-", each[1])]
    assert {"--model.no-bias", "--model.no-attention", "--no-stop-at-end"} <= {
        option for _, option, _ in negated
    }
    assert [each for each in negated if not each[2].startswith("whether ")] == []


def test_the_help_of_ema_says_what_it_is_and_what_none_means(helps):
    [help] = {help for _, option, help in helps if option == "--train.ema"}
    assert "mean of the weights" in help and "None: " in help


def trained(text_file: Path, out: Path, *options: str) -> int:
    command = ["train", "shakespeare", "--data", str(text_file), "--out", str(out), *SMALL]
    return cli.main([*command, "--train.steps=2", *options])


def test_a_run_on_a_part_of_the_text_says_so(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(QUESTION * 2)
    assert trained(text, tmp_path / "part") == 0
    said = "uses the first 30 % of text.txt; --train.text-fraction 1 "
    assert capsys.readouterr().err.count(said) == 1
    assert trained(text, tmp_path / "all", "--train.text-fraction=1") == 0
    assert "uses the first" not in capsys.readouterr().err


class Interrupt(gptfast.Callback):
    """Ends the run after the first step. (A shell's background jobs ignore SIGINT.)"""

    def on_step(self, run):
        if run.state.step == 1:
            signal.raise_signal(signal.SIGTERM)


SHORT = {"steps": 4, "n_embd": 8, "n_layer": 1, "block_size": 8, "batch_size": 2}


def test_an_interrupted_run_names_the_command_that_goes_on_with_it(capsys, tmp_path, text_file):
    out = tmp_path / "my run"
    gptfast.train("abc", out, data=text_file, callbacks=[Interrupt()], **SHORT)
    stopped = checkpoint.read_config(out)["extra"]["step"]
    assert stopped < 4
    line = capsys.readouterr().err.splitlines()[-1]
    found = re.fullmatch(
        r"interrupted at step \d of 4, saved in .*; `(.+)` goes on from there", line
    )
    assert found is not None, line
    assert cli.main(shlex.split(found[1])[1:]) == 0
    extra = checkpoint.read_config(out)["extra"]
    assert (extra["step"], extra["data"]) == (4, str(text_file))


def test_an_interrupted_run_whose_text_only_python_has_names_no_command(capsys, tmp_path):
    gptfast.train("abc", tmp_path / "run", text=QUESTION, callbacks=[Interrupt()], **SHORT)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"saved in {tmp_path / 'run'}; resume goes on from there")


def test_no_network_names_options_of_the_commands_that_have_them(tmp_path, monkeypatch, helps):
    import pooch

    def offline(*_, **__):
        raise OSError

    monkeypatch.setenv("GPTFAST_DATA_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(pooch, "retrieve", offline)
    with pytest.raises(DataError) as caught:
        gptfast.data.shakespeare()
    advice = str(caught.value).rpartition("): ")[2]
    assert advice == (
        "give a copy with `gptfast data shakespeare --from FILE`, or with --data FILE to "
        "`gptfast train` or `gptfast reproduce`, "
        "or set GPTFAST_DATA_DIR to a folder that has shakespeare.txt"
    )
    known = {(place.split()[0], option) for place, option, _ in helps}
    assert {("data", "--from"), ("train", "--data"), ("reproduce", "--data")} <= known


def test_nanogpt_names_the_options_of_a_run_that_it_takes(tmp_path):
    own = GPT(GPTConfig(vocab_size=5, n_embd=8, tie_weights=False))
    with pytest.raises(CheckpointError, match=r"--model\.tie-weights and --model\.init gpt2"):
        nanogpt.write(own, None, tmp_path)
    tied = GPT(GPTConfig(vocab_size=5, n_embd=8, tie_weights=True, init="gpt2"))
    with pytest.warns(UserWarning, match="without a tokenizer"):
        nanogpt.write(tied, None, tmp_path)
    assert nanogpt.read(tmp_path)[0].config.tie_weights


@pytest.mark.parametrize(
    "code",
    [
        "import gptfast; gptfast.data.abc_entropy, gptfast.data.shakespeare",
        "import gptfast; gptfast.training.held_out, gptfast.ops.linear",
        "import gptfast; assert {'data', 'ops', 'training'} <= {*dir(gptfast)}",
        "from gptfast.data.prepare import prepare; prepare.__call__",
    ],
)
def test_the_names_of_the_pages_need_no_other_import(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_module_is_loaded_at_its_first_use():
    code = "import sys, gptfast; assert 'gptfast.lm_eval' not in sys.modules\n"
    code += "try: gptfast.lm_eval.GptfastLM\n"
    code += "except AttributeError as error: assert 'lm-eval' in str(error)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
