"""Tokenizers as llama.cpp has them: GPT-2's byte-level encoding, by tokens and merges.

A token is written in GPT-2's symbols, one for each byte. llama.cpp cuts a text into words as GPT-2
does, starts with the symbols of their bytes and applies the merges. It drops symbols that end up
as no token. So

- a BPETokenizer that cuts texts as GPT-2's goes over as it is;
- a character's token consists of its bytes, which merges join from the first one on. They join
  nothing else: in UTF-8 the byte that begins a character is never one that continues another. What
  is joined on the way needs no id.

llama.cpp also needs an id that ends a text, and takes some character's where none is named. This is
the tokenizer's own, else an id that stands for no text, such as padding. Such ids get a type that
no text encodes to and that writes nothing.
"""

from typing import NamedTuple

from gptfast.bpe import BPETokenizer
from gptfast.bpe_files import BYTE_SYMBOLS
from gptfast.errors import CheckpointError
from gptfast.tokenizer import Tokenizer

NORMAL, CONTROL, UNUSED = 1, 3, 5  # llama.cpp's types of tokens

_SYMBOL_OF_BYTE = {ord(byte): chr(symbol) for symbol, byte in BYTE_SYMBOLS.items()}


class Tokens(NamedTuple):
    """A tokenizer in llama.cpp's terms."""

    texts: list[str]  # of each id, in symbols
    types: list[int]
    merges: list[str]  # of two parts each, the first to be applied first
    end: int  # the id that ends a text


def tokens_of(tokenizer: Tokenizer, vocab_size: int) -> Tokens:
    """Translates a CharTokenizer or a BPETokenizer.

    Args:
        tokenizer: The tokenizer to translate.
        vocab_size: V, the model's, which may have more ids.

    Raises:
        CheckpointError: The tokenizer would give other tokens in llama.cpp.
    """
    end = _end_of(tokenizer, vocab_size)
    if isinstance(tokenizer, BPETokenizer):
        named, merges = _pairs(tokenizer)
    else:
        named, merges = _characters(tokenizer)
    ids = range(vocab_size)
    texts = [named[i][0] if i in named else f"[PAD{i}]" for i in ids]
    types = [named[i][1] if i in named else UNUSED for i in ids]
    if len(set(texts)) < len(texts):
        twice = next(text for i, text in enumerate(texts) if text in texts[:i])
        raise CheckpointError(f"llama.cpp has one id for each token, and {twice!r} has two")
    # llama.cpp insists on a merge, and this one joins what is no symbol.
    return Tokens(texts, types, merges or [f"{texts[end]} {texts[end]}"], end)


def _end_of(tokenizer: Tokenizer, vocab_size: int) -> int:
    if tokenizer.end_of_text is not None:
        return tokenizer.end_of_text
    pieces = tokenizer.pieces
    for i in range(vocab_size):
        if i >= len(pieces) or not pieces[i]:
            return i
    raise CheckpointError(
        f"llama.cpp needs an id that ends a text, and each of the tokenizer's {len(pieces)} ids "
        "stands for text: gptfast.export writes the model alone with tokenizer=None"
    )


def _characters(tokenizer: Tokenizer) -> tuple[dict[int, tuple[str, int]], list[str]]:
    """The token and type of each id that writes a character, and the merges."""
    named = {}
    merges: dict[str, None] = {}
    for i, piece in enumerate(tokenizer.pieces):
        try:
            char = piece.decode("utf-8")
        except UnicodeDecodeError:
            half = piece.decode("utf-8", "surrogatepass")
            raise CheckpointError(
                f"llama.cpp reads UTF-8, which does not have the tokenizer's character {half!r}"
            ) from None
        if not char:
            continue
        symbols = piece.decode("latin-1").translate(_SYMBOL_OF_BYTE)
        named[i] = symbols, NORMAL
        merges |= {f"{symbols[:n]} {symbols[n]}": None for n in range(1, len(symbols))}
    return named, [*merges]


def _pairs(tokenizer: BPETokenizer) -> tuple[dict[int, tuple[str, int]], list[str]]:
    """The token and type of each id of a byte-pair encoding, and its merges."""
    parsed = tokenizer.parsed
    if not parsed.by_words or parsed.ignores_merges:
        raise CheckpointError(
            "llama.cpp's tokenizer of GPT-2 cuts texts into words as GPT-2 does, and this "
            "tokenizer does not"
        )
    named = {i: (token, NORMAL) for token, i in parsed.vocabulary.items()}
    named |= {i: (token, CONTROL) for token, i in parsed.special.items()}
    return named, [" ".join(pair) for pair in parsed.merges]
