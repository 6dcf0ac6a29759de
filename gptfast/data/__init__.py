"""Texts and what training reads of them: corpora, files, tokens, windows."""

from gptfast.abc_corpus import abc_corpus, abc_entropy, abc_next_distribution
from gptfast.data.corpora import CORPORA, Corpus, data_dir, shakespeare
from gptfast.data.texts import read_text
from gptfast.data.windows import (
    EpochWindows,
    as_int64,
    epoch_windows,
    gather,
    placed,
    random_starts,
    random_windows,
)

__all__ = [
    "CORPORA",
    "Corpus",
    "EpochWindows",
    "abc_corpus",
    "abc_entropy",
    "abc_next_distribution",
    "as_int64",
    "data_dir",
    "epoch_windows",
    "gather",
    "placed",
    "random_starts",
    "random_windows",
    "read_text",
    "shakespeare",
]
