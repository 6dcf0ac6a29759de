"""The command line: the commands, what they print, and how a mistake becomes one sentence."""

from gptfast.cli.cli import COMMANDS, main

__all__ = ["COMMANDS", "main"]
