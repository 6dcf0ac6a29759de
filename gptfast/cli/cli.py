"""The command line: finds the command, reads its options by tyro, makes mistakes one sentence."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import tyro

from gptfast.cli import commands
from gptfast.cli.options import EXIT_INTERRUPTED, TYRO_CONFIG, Command
from gptfast.errors import ConfigError, GptfastError

Parsed = TypeVar("Parsed")

EXIT_BAD_INPUT, EXIT_CLOSED_PIPE = 2, 141
MISTAKES = (  # errors that become one sentence
    GptfastError, ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError,
)  # fmt: skip

COMMANDS: dict[str, type] = {
    "demo": commands.Demo,
    "data": commands.Data,
    "train": commands.Train,
    "eval": commands.Eval,
    "generate": commands.Generate,
    "inspect": commands.Inspect,
    "plot": commands.Plot,
    "export": commands.Export,
    "reproduce": commands.Reproduce,
    "info": commands.Info,
    "completion": commands.Completion,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: The arguments without the program's name; None takes the process's own.

    Returns:
        The exit code: 0, 1 where a command says no, 2 for bad input, 130 after Ctrl-C (129 and 143
        where a run ended by SIGHUP and SIGTERM), 141 when the reader of the output has gone.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the terminal cannot show is no error
    try:
        with _warning_by_sentences():
            code = _run(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except SystemExit as error:  # tyro's, after it has shown the help
        return error.code if isinstance(error.code, int) else 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes once more at its exit and would complain there.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                os.dup2(nowhere, stream.fileno())
        return EXIT_CLOSED_PIPE
    except MISTAKES as error:
        if os.environ.get("GPTFAST_DEBUG", "0") != "0":
            raise
        sentence = f"gptfast: {_sentence(error)}"
        if _is_mine_to_say(sentence):
            from gptfast.console import say

            say(sentence)
        return EXIT_BAD_INPUT


@contextlib.contextmanager
def _warning_by_sentences() -> Iterator[None]:
    """Shows gptfast's own warnings without the lines of its source that give them."""
    before = warnings.formatwarning
    home = os.path.dirname(os.path.dirname(__file__))

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, *where: Any, **line: Any
    ) -> str:
        if filename.startswith(home):
            return f"warning: {message}\n"
        return before(message, category, filename, *where, **line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


def _is_mine_to_say(sentence: str) -> bool:
    """Whether no other process of the same run has said it already."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from gptfast.training.distributed import says

    return says(sentence)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        from gptfast import __version__

        print(__version__)
        return 0
    name, options = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise ConfigError(f"there is no command {name!r}; there are {', '.join(COMMANDS)}")
    if name not in CHOOSING:
        return _parse(COMMANDS[name], f"gptfast {name}", options).run()
    choose = CHOOSING[name]
    if not options or options[0] in ("-h", "--help"):
        print(choose.help(name))
        return 0
    return choose.parse(options).run()


def _help() -> str:
    rows = [f"  {name:<11}{command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: gptfast COMMAND [OPTIONS]", "", *rows]
        + ["", "`gptfast COMMAND --help` shows the options of a command."]
        + ["GPTFAST_DEBUG=1 shows where an error came from."]
    )


@dataclass(frozen=True)
class Choosing:
    """A command whose first word says which options it has."""

    word: str  # what that word is
    needed: str  # options without a default
    choices: Callable[[], dict[str, str]]  # the words, and what each does
    commands: Callable[[], dict[str, type]]  # by these words, what has the options
    parse: Callable[[list[str]], Command]

    def help(self, name: str) -> str:
        """What `gptfast NAME --help` shows."""
        choices = self.choices()
        width = max(map(len, choices)) + 2
        return "\n".join(
            [f"usage: gptfast {name} {self.word} {self.needed}[OPTIONS]", ""]
            + [COMMANDS[name].__doc__ or "", ""]
            + [f"  {choice:<{width}}{help}" for choice, help in choices.items()]
            + ["", f"`gptfast {name} {self.word} --help` shows the options."]
        )


def _presets() -> dict[str, str]:
    from gptfast.presets import PRESETS

    return {name: preset.help for name, preset in PRESETS.items()}


def _shells() -> dict[str, str]:
    from gptfast.cli.completion import SHELLS

    return SHELLS


def _train_commands() -> dict[str, type]:
    from gptfast.cli.run_options import RunOptions
    from gptfast.presets import PRESETS

    return {
        name: commands.train_preset(preset, None, RunOptions(None))
        for name, preset in PRESETS.items()
    }


def command_lines() -> Iterator[tuple[str, str, type]]:
    """Yields how each command begins, its help, and the class that has its options."""
    for name, command in COMMANDS.items():
        yield name, command.__doc__ or "", command
        if name in CHOOSING:
            made = CHOOSING[name].commands()
            for word, help in CHOOSING[name].choices().items():
                yield f"{name} {word}", help, made[word]


def _parse_data(arguments: list[str]) -> Command:
    name, options = arguments[0], arguments[1:]
    if name not in commands.DATA:
        raise ConfigError(f"there is no data {name!r}; there are {', '.join(commands.DATA)}")
    return _parse(commands.DATA[name], f"gptfast data {name}", options)


def _parse_completion(arguments: list[str]) -> Command:
    from gptfast.cli.completion import SHELLS, Script

    shell, options = arguments[0], arguments[1:]
    if shell not in SHELLS:
        raise ConfigError(
            f"there is no completion for {shell!r}; there is one for {', '.join(SHELLS)}"
        )
    _parse(commands.Completion, f"gptfast completion {shell}", options)  # it has --help alone
    return Script(shell, command_lines())


def _parse_train(arguments: list[str]) -> Command:
    from gptfast.cli.run_options import ConfigOption, RunOptions
    from gptfast.presets import preset

    others = [each for each in arguments if each not in ("-h", "--help")]
    file = RunOptions(_parse(ConfigOption, "gptfast train", others, ignore_unknown=True).config)
    if not arguments[0].startswith("-"):
        name, options = arguments[0], arguments[1:]
    elif file.preset is not None:
        name, options = file.preset, arguments
    else:
        raise ConfigError(f"the preset comes first: gptfast train PRESET {arguments[0]} ...")
    chosen, prog = preset(name), f"gptfast train {name}"
    source = None
    if others == arguments:
        # The defaults of the model's options depend on where its weights come from.
        start = file.defaults(commands.Train)
        source = _parse(commands.Train, prog, options, start, ignore_unknown=True).source()
    command = commands.train_preset(chosen, source, file)
    return cast(Command, _parse(command, prog, options, file.defaults(command)))


def _parse(
    command: type[Parsed],
    prog: str,
    arguments: Sequence[str],
    default: Parsed | None = None,
    ignore_unknown: bool = False,
) -> Parsed:
    """Runs tyro; its boxes about mistakes become one sentence."""
    box = io.StringIO()
    options: dict[str, Any] = {"prog": prog, "args": arguments, "default": default}
    options["config"] = TYRO_CONFIG
    try:
        with contextlib.redirect_stderr(box):
            if ignore_unknown:
                return tyro.cli(command, return_unknown_args=True, **options)[0]
            return tyro.cli(command, **options)
    except SystemExit as error:
        if error.code != EXIT_BAD_INPUT:
            raise
    raise ConfigError(f"{_message(box.getvalue())} (see {prog} --help)")


def _message(box: str) -> str:
    """What a box of tyro's says before its advice, whether its frame is in Unicode or ASCII."""
    message: list[str] = []
    for line in box.replace("│", " ").splitlines()[1:]:  # the first one is the title
        text = line.strip()
        if not text.strip("─-"):
            if message:  # a rule or an empty line: advice follows
                break
        elif not line.startswith(10 * " "):  # where the help text of an option is
            message.append(text)
    return " ".join(message).rstrip(".")


CHOOSING = {
    "data": Choosing(
        "NAME",
        "",
        lambda: {name: each.__doc__ or "" for name, each in commands.DATA.items()},
        lambda: {**commands.DATA},
        _parse_data,
    ),
    "train": Choosing("PRESET", "--out DIR ", _presets, _train_commands, _parse_train),
    "completion": Choosing(
        "SHELL",
        "",
        _shells,
        lambda: dict.fromkeys(_shells(), commands.Completion),
        _parse_completion,
    ),
}


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        name = f"{error.filename}"
        return f"{name if len(name) < 300 else f'{name[:100]}..'}: {error.strerror}"
    if isinstance(error, MemoryError):
        return ": ".join(["there is not enough memory", *str(error).splitlines()[:1]])
    return (str(error).strip() or type(error).__name__).splitlines()[0]
