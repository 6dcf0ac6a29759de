"""Fetches models from Hugging Face's hub, into its cache, by its library `huggingface_hub`.

The library's variables say where the cache is and what may be asked (HF_HOME, HF_HUB_CACHE,
HF_HUB_OFFLINE, HF_TOKEN). Files in the cache are not fetched again, and need no network.
"""

import warnings
from pathlib import Path
from typing import Any

from gptfast.bpe_files import JSON_NAME, PAIRS
from gptfast.checkpoint import is_checkpoint
from gptfast.errors import CheckpointError, ConfigError
from gptfast.formats.huggingface_config import CONFIG_NAME
from gptfast.formats.huggingface_tokenizer import ADDED_NAME, SETTINGS_NAME, SPECIAL_NAME
from gptfast.formats.huggingface_weights import INDEX_SUFFIX, WEIGHTS_NAMES, shards


def fetch(name: str, weights: bool = True) -> Path:
    """Fetches a model: its configuration, its tokenizer and its weights, all of one revision.

    If the weights come in several formats, it fetches the first in WEIGHTS_NAMES.

    Args:
        name: "OWNER/NAME", or "OWNER/NAME@REVISION" with a branch, a tag or a commit.
        weights: False leaves the weights out.

    Returns:
        The folder in the cache.

    Raises:
        ConfigError: The library is missing.
        CheckpointError: There is no such repository or revision, it has no model, it is closed to
            the user, or the hub cannot be reached and the cache lacks a file.
    """
    source = _Source(name)
    folder = source.pin()
    if weights:
        _fetch_weights(source)
    if not is_checkpoint(folder):  # which has its tokenizer within
        _fetch_tokenizer(source)
    return folder


def _fetch_weights(source: "_Source") -> None:
    for name in WEIGHTS_NAMES:
        file = source.get(name)
        if file is not None:
            break
    else:
        raise source.lacks("weights")
    if name.endswith(INDEX_SUFFIX):
        for shard in shards(file):
            if source.get(shard) is None:
                raise source.lacks(shard)


def _fetch_tokenizer(source: "_Source") -> None:
    if source.get(JSON_NAME) is None:
        pair = [source.get(name) for name in PAIRS[0]]
        source.get(ADDED_NAME)
        if None in pair and source.unreached is not None:
            warnings.warn(f"{source.lacks('tokenizer')}: the model has none", stacklevel=2)
    for name in (SETTINGS_NAME, SPECIAL_NAME):
        source.get(name)


class _Source:
    """A repository of the hub.

    Args:
        name: As for `fetch`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.repository, _, revision = name.partition("@")
        self.revision = revision or None
        self.unreached: BaseException | None = None  # why a file could not be looked for
        self._hub = _library()

    def pin(self) -> Path:
        """Fetches the configuration; all other files will be of the same commit.

        Returns:
            The folder in the cache.
        """
        file = self.get(CONFIG_NAME)
        if file is None:
            raise self.lacks(CONFIG_NAME)
        self.revision = file.parent.name
        return file.parent

    def get(self, file: str) -> Path | None:
        """Fetches a file; None if it is not there, or not in the cache and the hub is not reached.

        Raises:
            CheckpointError: The repository gives no files.
        """
        errors = self._hub.errors
        try:
            found = self._hub.hf_hub_download(self.repository, file, revision=self.revision)
            return Path(found)
        except errors.LocalEntryNotFoundError as error:
            self.unreached = error.__cause__ or error
            return None
        except errors.EntryNotFoundError:
            return None
        except errors.HFValidationError:
            why = "not a model of the hub, expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION"
        except errors.GatedRepoError:
            why = (
                "the repository is gated: ask for access on its page, and log in by `hf auth login`"
            )
        except errors.RepositoryNotFoundError:
            why = "no such repository, or a private one, which needs `hf auth login`"
        except errors.RevisionNotFoundError:
            why = f"the repository has no revision {self.revision!r}"
        except Exception as error:  # the library passes on errors of its own libraries
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            why = f"{file} cannot be fetched ({first})"
        raise CheckpointError(f"hf:{self.name}: {why}")

    def lacks(self, what: str) -> CheckpointError:
        """Makes the error that something is missing."""
        if self.unreached is None:
            return CheckpointError(f"hf:{self.name}: the repository has no {what}")
        offline = isinstance(self.unreached, self._hub.errors.OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE forbids to ask the hub" if offline else "the hub cannot be reached"
        cache = self._hub.constants.HF_HUB_CACHE
        return CheckpointError(f"hf:{self.name}: the cache {cache} has no {what}, and {why}")


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise ConfigError(
            "models of the hub need the library huggingface_hub: pip install 'gptfast-kernels[hub]'"
        ) from None
    return huggingface_hub
