"""Options of `gptfast train` that come from a file, `--config run.toml`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from gptfast.cli.commands.train import Train
from gptfast.cli.options import Compute, File
from gptfast.errors import ConfigError

if TYPE_CHECKING:
    from gptfast.config import GPTConfig, TrainConfig

Config = TypeVar("Config", "GPTConfig", "TrainConfig")
Trains = TypeVar("Trains", bound=Train)

ACTS = ("config", "resume", "overwrite")  # requests of one call, not options of a run


@dataclass(frozen=True)
class ConfigOption:
    """The option that is read first, because its file has the defaults of the others."""

    config: File = None


class RunOptions:
    """A file of options, whose values take the place of the defaults.

    Args:
        path: The file; None: there is none.

    Raises:
        ConfigError: The file cannot be read, or says what no option takes.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.preset: str | None = None
        self._tables: dict[str, dict[str, Any]] = {"run": {}, "model": {}, "train": {}}
        if path is None:
            return
        from gptfast.run_file import read_run_file

        self._tables = read_run_file(path)
        name = self._tables["run"].pop("preset", None)
        if not isinstance(name, str | None):
            raise ConfigError(f"{path}, [run]: preset must be a name, got {name!r}")
        self.preset = name

    def configured(self, table: str, config: Config) -> Config:
        """Returns GPTConfig or TrainConfig with the file's values."""
        values = self._tables[table]
        self._check_names(table, values, [field.name for field in fields(config)])
        try:
            return replace(config, **values)
        except ConfigError as error:
            raise ConfigError(f"{self.path}, [{table}]: {error}") from None

    def defaults(self, command: type[Trains]) -> Trains:
        """Returns the command with the file's values, and without those that must be given."""
        compute = get_type_hints(Compute)
        hints = {
            name: hint
            for name, hint in (get_type_hints(Train) | compute).items()
            if name not in (*ACTS, "compute")
        }
        values = self._tables["run"]
        self._check_names("run", values, ["preset", *hints])
        for name, value in values.items():
            if not _fits(value, hints[name]):
                raise ConfigError(
                    f"{self.path}, [run]: {name} must be {_words(hints[name])}, got {value!r}"
                )
        given = {name: _as(value, hints[name]) for name, value in values.items()}
        computing = {name: given.pop(name) for name in compute if name in given}
        return command(**{"out": tyro.MISSING, **given}, compute=Compute(**computing))

    def _check_names(self, table: str, values: Mapping[str, Any], known: list[str]) -> None:
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"{self.path}, [{table}]: there is no option {name!r}; "
                    f"there are {', '.join(known)}"
                )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of TOML (or None) is one for an option of this type."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(_fits(each, get_args(hint)[0]) for each in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str if hint is Path else hint)


def _as(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if isinstance(value, str) and Path in (hint, *get_args(hint)) else value


def _words(hint: Any) -> str:
    """What an option of this type takes, in words."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_words, get_args(hint)))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) is tuple:
        return "a list"
    names = {int: "a whole number", float: "a number", bool: "true or false", NoneType: '"None"'}
    return names.get(hint, "a text")
