"""What tests of the command line share: a text, and commands that do as they are told or refuse."""

import pytest

from gptfast import cli

QUESTION = "to be or not to be, that is the question\n" * 20


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command, which must succeed; returns what it prints."""
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command, which must refuse; returns its one line, without the program's name."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gptfast: ") and err.count("\n") == 1 and err.endswith("\n")
    return err[len("gptfast: ") : -1]
