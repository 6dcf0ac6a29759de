"""Scripts by which a shell completes the command line: `gptfast completion SHELL`.

A script is a table of words, which takes no Python when the user presses TAB, and a function that
looks them up. A place in the table is what the line begins with, such as "", "train" or
"train abc"; with an option at its end, such as "eval --backend", it holds the option's choices. The
shell offers files where the table has nothing, and where a word is no option and the place has only
options, because such words are paths here.
"""

import ast
import contextlib
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tyro

from gptfast.cli.options import TYRO_CONFIG
from gptfast.errors import ConfigError

Table = dict[str, dict[str, str]]  # by place, the words that may come next and their help
CommandLine = tuple[str, str, type]  # how a command begins, its help, what has its options

SHELLS = {
    "bash": "for the file ~/.local/share/bash-completion/completions/gptfast",
    "zsh": "for a file _gptfast in a folder of $fpath",
}

BASH = """\
# Completes gptfast in bash. Made by `gptfast completion bash`.
_gptfast_words() {
    case $1 in
@WORDS@
    esac
}

_gptfast() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} place= words= hidden=
    if [[ $cur == '=' ]]; then # bash takes --option=value for three words
        cur=
    elif [[ $prev == '=' ]]; then
        prev=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    if ((COMP_CWORD > 1)); then
        place=${COMP_WORDS[1]}
    fi
    if ((COMP_CWORD > 2)) && [[ ${COMP_WORDS[2]} != -* ]]; then
        words=$(_gptfast_words "$place ${COMP_WORDS[2]}")
        place+=${words:+ ${COMP_WORDS[2]}}
    fi
    if [[ $prev == -* ]]; then
        words=$(_gptfast_words "$place $prev")
    else
        words=
    fi
    if [[ $cur != -* ]]; then
        hidden='-*'
    fi
    COMPREPLY=($(compgen -W "${words:-$(_gptfast_words "$place")}" -X "$hidden" -- "$cur"))
}

complete -o bashdefault -o default -F _gptfast gptfast
"""

ZSH = """\
#compdef gptfast
# Completes gptfast in zsh. Made by `gptfast completion zsh`.
_gptfast_words() {
    case $1 in
@WORDS@
    esac
}

_gptfast() {
    local cur=$words[CURRENT] prev=$words[CURRENT-1] place=
    local -a found
    if [[ $cur == -*=* ]]; then
        prev=${cur%%=*} cur=
        compset -P '*='
    fi
    if (( CURRENT > 2 )); then
        place=$words[2]
    fi
    if (( CURRENT > 3 )) && [[ $words[3] != -* && -n $(_gptfast_words "$place $words[3]") ]]; then
        place+=" $words[3]"
    fi
    if [[ $prev == -* ]]; then
        found=(${(f)"$(_gptfast_words "$place $prev")"})
    fi
    if (( ! $#found )); then
        found=(${(f)"$(_gptfast_words "$place")"})
    fi
    if [[ $cur != -* ]]; then
        found=(${found:#-*})
    fi
    _describe gptfast found || _files
}

if [[ $funcstack[1] == _gptfast ]]; then # a file of $fpath is the body of the function
    _gptfast "$@"
else
    compdef _gptfast gptfast
fi
"""


@dataclass(frozen=True)
class Script:
    """The command that prints a shell's script."""

    shell: str
    lines: Iterable[CommandLine]

    def run(self) -> int:
        """Prints the script."""
        print(script(self.shell, table(self.lines)), end="")
        return 0


def table(lines: Iterable[CommandLine]) -> Table:
    """Makes the table of all commands, those that hold others before them."""
    found: Table = {"": {"--help": "show the commands", "--version": "show the version"}}
    for line, help, command in lines:
        place, _, word = line.rpartition(" ")
        found[place][word] = help
        words = found.setdefault(line, {})
        for option in _options(command):
            for flag in option["flags"]:
                words[flag] = _help(option["description"])
                if "choices" in option:
                    found[f"{line} {flag}"] = dict.fromkeys(sorted(option["choices"]), "")
    return found


def script(shell: str, words: Table) -> str:
    """Writes the script of a shell of SHELLS."""
    template, say = {"bash": (BASH, _bash_words), "zsh": (ZSH, _zsh_words)}[shell]
    places: dict[str, list[str]] = {}  # by what they say: presets, for example, share options
    for place, each in words.items():
        places.setdefault(say(each), []).append(_quoted(place))
    cases = (f"        {' | '.join(same)}) {said} ;;" for said, same in places.items())
    return template.replace("@WORDS@", "\n".join(cases))


def _bash_words(words: Mapping[str, str]) -> str:
    return f"echo {_quoted(' '.join(words))}"


def _zsh_words(words: Mapping[str, str]) -> str:
    described = (word.replace(":", r"\:") + f":{help}" * bool(help) for word, help in words.items())
    return " ".join(["print -rl --", *map(_quoted, described)])


def _quoted(text: str) -> str:
    return "'" + text.replace("'", r"'\''") + "'"


def _options(command: type) -> list[dict[str, Any]]:
    """The options of a command: `flags`, `description`, and `choices` where they are few.

    tyro has them in the script for bash that it writes, as a Python literal. (Its parser for
    argparse has them too, but is deprecated.)
    """
    written = io.StringIO()
    arguments = ["--tyro-write-completion", "bash", "-"]
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        tyro.cli(command, prog="gptfast", args=arguments, config=TYRO_CONFIG)
    found = re.search(r"^COMPLETION_SPEC = (\{.+\})$", written.getvalue(), re.M)
    if found is None:
        raise ConfigError("the installed tyro does not say which options there are: update it")
    options: list[dict[str, Any]] = ast.literal_eval(found[1])["options"]
    for option in options:
        option["flags"] = [flag for flag in option["flags"] if flag.startswith("--")]
    return options


def _help(description: str) -> str:
    """Returns the help in a description by tyro, "METAVAR • help (default: value)"."""
    text = " ".join(description.partition(" • ")[2].split() or description.split())
    return re.sub(r" ?\((default: .*|required|repeatable)\)$", "", text)
