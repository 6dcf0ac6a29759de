"""Where a run's tokens come from: a text, a text file, a preset's text, or a folder of tokens."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from gptfast.checks import check_path
from gptfast.data import read_text
from gptfast.data.texts import blocks_of, stream_text
from gptfast.data.token_files import TokenFile, open_tokens
from gptfast.data.tokens import char_tokenizer, encoded
from gptfast.encoding import Unknown
from gptfast.errors import ConfigError
from gptfast.presets import Preset
from gptfast.tokenizer import Tokenizer
from gptfast.training import run


@dataclass(frozen=True)
class Source:
    """The tokens of a run, not read yet: exactly one of the first two is there."""

    blocks: Callable[[], Iterable[str]] | None  # gives the text in pieces, each time anew
    file: TokenFile | None  # a folder of tokens
    preset: str | None  # with `data`, where `held_out` finds the text again: nowhere if both None
    data: str | None

    def tokenizer(self) -> Tokenizer:
        """Returns the folder's tokenizer, or one of the text's characters."""
        if self.file is not None:
            return self.file.tokenizer
        assert self.blocks is not None
        return char_tokenizer(self.blocks())

    def ids(self, tokenizer: Tokenizer, unknown: Unknown = "error") -> Tensor:
        """Returns the tokens, (N,) of the smallest dtype that holds them.

        Raises:
            ConfigError: The folder's tokens are another tokenizer's.
            DataError: The text cannot be read, or has characters that the tokenizer lacks.
        """
        if self.file is None:
            assert self.blocks is not None
            return encoded(tokenizer, self.blocks(), unknown)
        if self.file.tokenizer.to_dict() != tokenizer.to_dict():
            raise ConfigError(f"{self.file.path}: its tokens are those of another tokenizer")
        return self.file.ids

    def fingerprint(self, train_ids: Tensor, val_ids: Tensor | None) -> str:
        """Returns the name by which a resumed run recognises its text; does not read a folder."""
        named = run.fingerprint if self.file is None else self.file.fingerprint
        return named(train_ids, val_ids)


def source_of_text(recipe: Preset | None, text: str | None, data: str | Path | None) -> Source:
    """Finds the tokens of a run.

    Args:
        recipe: The preset, which has the text where `text` and `data` are None.
        text: The text itself.
        data: A UTF-8 text file, or a folder of tokens.

    Raises:
        ConfigError: Both are given, or the preset has no text of its own.
        DataError: The file or folder cannot be read.
    """
    if text is not None:
        if data is not None:
            raise ConfigError("give the text or a file with it, not both")
        return Source(partial(blocks_of, text), None, None, None)
    name = None if recipe is None else recipe.name
    if data is None:
        if recipe is None or recipe.text is None:
            who = "the run" if name is None else f"the preset {name!r}"
            raise ConfigError(f"{who} has no text of its own: give one (data)")
        return Source(partial(blocks_of, recipe.text()), None, name, None)
    path = check_path("data", data)
    noted = str(path.absolute())
    if path.is_dir():
        return Source(None, open_tokens(path), name, noted)
    blocks: Callable[[], Iterable[str]] = partial(stream_text, path)
    if not path.is_file():  # a pipe can be read once
        blocks = partial(blocks_of, read_text(path))
    return Source(blocks, None, name, noted)
