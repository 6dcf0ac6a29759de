"""Writes the options of a run to its directory; `gptfast train --config` trains it again."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gptfast.errors import CheckpointError, reason
from gptfast.files import write_atomic
from gptfast.presets import PRESETS, Preset
from gptfast.run_file import RUN_FILE_NAME, to_toml
from gptfast.training.callbacks import Callback

if TYPE_CHECKING:
    from gptfast.training.loop import Loop


class RunFileWriter(Callback):
    """Writes `run.toml` at the start.

    Args:
        options: The table `[run]`; what is None is left out.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = {name: value for name, value in options.items() if value is not None}

    def on_start(self, run: "Loop") -> None:
        """Writes the file. Raises CheckpointError if it cannot be written."""
        if run.path is None:
            return
        file = run.path / RUN_FILE_NAME
        tables = {"run": self._options, "model": run.trainer.gpt.config.to_dict()}
        content = to_toml(tables | {"train": asdict(run.config)})
        try:
            write_atomic({file: content.encode("utf-8", "replace")})
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be written ({reason(error)})") from error


def options_of(
    recipe: Preset, origin: Mapping[str, str | None], own_tokenizer: bool
) -> dict[str, str | None]:
    """Returns where a run's text and first weights come from, for the file of its options.

    If only Python can give the text or tokenizer, we leave out the preset as well, so that `gptfast
    train` refuses the file instead of training on another text.

    Args:
        recipe: The run's preset.
        origin: `preset`, `data` and `init_from`; the first two are None for a text given as such.
        own_tokenizer: Whether the tokenizer comes from none of these.
    """
    known = PRESETS.get(recipe.name)
    has_text = origin["data"] is not None or known is not None and known.text is recipe.text
    return {**origin} if has_text and not own_tokenizer else {"init_from": origin["init_from"]}
