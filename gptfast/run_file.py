"""A run's options as a TOML file, `run.toml`: the tables `[run]`, `[model]` and `[train]`.

The keys are the names of the options, with underscores. TOML has no null: an option that is None is
written "None", as on the command line.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptfast.errors import ConfigError, reason

RUN_FILE_NAME = "run.toml"
TABLES = ("run", "model", "train")

Tables = Mapping[str, Mapping[str, Any]]


def read_run_file(path: str | Path) -> dict[str, dict[str, Any]]:
    """Reads a file of options; whether they exist is for its reader to check.

    Returns:
        The options by table; a table that the file lacks is empty.

    Raises:
        ConfigError: The file cannot be read, is not TOML, or has something else than the tables.
    """
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)})") from error
    except ValueError as error:  # of tomllib, or of bytes that are not UTF-8
        raise ConfigError(f"{path}: not a TOML file ({error})") from error
    for name, values in found.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {name} must stand below [run], [model] or [train]")
        if name not in TABLES:
            raise ConfigError(f"{path}: there is no table [{name}]; there are {', '.join(TABLES)}")
    return {
        table: {key: None if value == "None" else value for key, value in values.items()}
        for table in TABLES
        for values in (found.get(table, {}),)
    }


def to_toml(tables: Tables) -> str:
    """Writes tables of texts, numbers, truth values, None, and lists of them."""
    parts = []
    for name, values in tables.items():
        lines = [f"{key} = {_value(value)}" for key, value in values.items()]
        parts.append("\n".join([f"[{name}]", *lines, ""]))
    return "\n".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return float.__repr__(value)  # numpy's floats have a repr of their own
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    # JSON's escapes are TOML's, but TOML also escapes the character DEL.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
