"""Completion of the command line, by shells that run in a terminal and by what they are told."""

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from gptfast import cli
from gptfast.cli import completion

SECONDS = 60  # after which a shell has hung

# How a shell is started, and what it then reads, so that it completes and says what it would run.
START = {
    "bash": (
        ["bash", "--norc", "--noprofile", "-i"],
        "bind 'set enable-bracketed-paste off'; source ./_gptfast",
    ),
    "zsh": (
        ["zsh", "-f", "-i"],
        "fpath=($PWD $fpath); autoload -Uz compinit; compinit -u -D",
    ),
}
RUN = 'gptfast() { echo "ran <$*>"; }; echo ready'


@pytest.fixture(scope="module")
def words() -> completion.Table:
    return completion.table(cli.cli.command_lines())


@pytest.fixture(scope="module", params=sorted(START))
def shell(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    words: completion.Table,
) -> Path:
    """A folder with the files that tests complete, and `_gptfast`, a shell's script."""
    name = request.param
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    folder = tmp_path_factory.mktemp("files") / name
    (folder / "runs" / "first run").mkdir(parents=True)
    (folder / "text.txt").touch()
    (folder / "run.toml").touch()
    (folder / "_gptfast").write_text(completion.script(name, words))
    (folder / "start").write_text(f"{START[name][1]}\n{RUN}\n")
    return folder


def typed(keys: str, folder: Path) -> str:
    """Types keys, among them TAB, into the shell in a terminal; returns what it would run."""
    command, _ = START[folder.name]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        env = {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "dumb", "COLUMNS": "500"}
        os.execvpe(command[0], command, env)
    shown = ""

    def wait_for(pattern: str) -> re.Match[str]:
        nonlocal shown
        end = time.monotonic() + SECONDS
        while (found := re.search(pattern, shown)) is None:
            ready, _, _ = select.select([terminal], [], [], max(end - time.monotonic(), 0))
            assert ready, f"the shell shows only {shown!r}"
            shown += os.read(terminal, 4096).decode(errors="replace")
        return found

    try:
        os.write(terminal, b". ./start\n")
        wait_for("ready")
        os.write(terminal, f"{keys}\n".encode())
        return wait_for(r"ran <(.*)>")[1]
    finally:
        os.close(terminal)  # the shell gets a SIGHUP
        os.waitpid(process, 0)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("gptfast rep\t--se\t3", "reproduce --seeds 3"),
        (
            "gptfast train shakespeare-n\t--model.no-b\t--backend ref\t",
            "train shakespeare-no-attention --model.no-bias --backend reference",
        ),
        ("gptfast train gpt2 --model.bi\t", "train gpt2 --model.bias"),  # the preset has none
        (
            "gptfast train --conf\trun.t\t--ini\truns/f\t",
            "train --config run.toml --init-from runs/first run",
        ),
        (
            "gptfast data prep\ttext.t\t--out o --tok\tbpe",
            "data prepare text.txt --out o --tokenizer",
        ),
        ("gptfast eval --backend=ref\tru", "eval --backend=reference ru"),
        ("gptfast eval --unknown sk\truns/f\t", "eval --unknown skip runs/first run"),
        ("gptfast compl\tba\t", "completion bash"),
        ("gptfast --ver\t", "--version"),
    ],
)
def test_a_shell_completes_what_is_typed(shell: Path, keys: str, line: str) -> None:
    assert typed(keys, shell).strip().startswith(line)


def test_the_command_prints_the_script(
    capsys: pytest.CaptureFixture[str], words: completion.Table
) -> None:
    for shell in completion.SHELLS:
        assert cli.main(["completion", shell]) == 0
        assert capsys.readouterr().out == completion.script(shell, words)
    assert cli.main(["completion", "csh"]) == 2
    assert "there is no completion for 'csh'; there is one for bash, zsh" in capsys.readouterr().err


def test_bash_offers(tmp_path: Path, words: completion.Table) -> None:
    """Bash's own variables say what was typed, and COMPREPLY what it would show."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    (tmp_path / "gptfast").write_text(completion.script("bash", words))
    ask = 'source ./gptfast; complete -p gptfast; COMP_WORDS=(gptfast "$@"); COMP_CWORD=$#; '
    ask += "_gptfast; echo ${COMPREPLY[*]}"

    def offered(*words: str) -> list[str]:
        command = ["bash", "-c", ask, "bash", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        registered, found = done.stdout.splitlines()
        assert registered == "complete -o bashdefault -o default -F _gptfast gptfast"
        assert done.stderr == ""
        return found.split()

    assert offered("") == [*cli.COMMANDS]
    assert offered("--") == ["--help", "--version"]
    assert "shakespeare-cpu" in offered("train", "") and "--out" not in offered("train", "")
    assert offered("train", "shakespeare-c") == ["shakespeare-cpu"]
    assert offered("train", "abc", "--model.n-") == [
        *("--model.n-layer", "--model.n-head", "--model.n-embd")
    ]
    assert offered("eval", "--backend", "") == ["auto", "fused", "reference"]
    assert offered("eval", "--backend", "=", "f") == ["fused"]
    assert offered("eval", "--backend", "=") == ["auto", "fused", "reference"]
    assert offered("eval", "--backend", "fused", "--unk") == ["--unknown"]
    for words in (["eval", ""], ["train", "abc", "--data", ""], ["nothing", ""]):
        assert offered(*words) == []  # so the shell offers files


@pytest.mark.parametrize("line", ["demo", "generate", "data prepare", "train abc", "train gpt2"])
def test_table_has_the_options_of_the_help(
    capsys: pytest.CaptureFixture[str], words: completion.Table, line: str
) -> None:
    assert cli.main([*line.split(), "--help"]) == 0
    shown = re.findall(r"^[│ ] (?:-h, )?(--\w[\w.-]*)", capsys.readouterr().out, re.M)
    assert set(words[line]) == set(shown)


def test_words_survive_the_quotes_of_a_shell() -> None:
    nothing = cli.commands.Data
    odd = completion.table([("odd", "it's odd: $HOME `id`", nothing), ("odd a:b", "", nothing)])
    assert r"'odd:it'\''s odd: $HOME `id`'" in completion.script("zsh", odd)
    assert r"'a\:b'" in completion.script("zsh", odd)
    for shell in START:
        if shutil.which(shell):
            subprocess.run(
                [shell, "-n"], input=completion.script(shell, odd), text=True, check=True
            )
