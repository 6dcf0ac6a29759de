"""Generation by GPT-2 124M: gptfast against torch, transformers, CTranslate2 and llama.cpp.

All have the same random weights, which the engines load from files in their own formats. Prompts
are paragraphs of a text as byte pairs, of different lengths, the same for all. The rows "prompt of
900 tokens" time its first token: tokens/s are those of the prompt. See bench_generate.py.
"""

import sys
from collections.abc import Iterator

import bench_generate
from bench_generate import L, Shape
from command import main
from common import Row

from gptfast import BPETokenizer, DataError

BATCHES = {1: 64, 8: 32, 64: 16}  # new tokens per text by number of texts
SHORTEST, LONGEST = 8, 128  # tokens of a prompt
LONG_PROMPT = 900


def shapes(text: str) -> Iterator[Shape]:
    """Yields a shape per batch, and one for the first token after a long prompt.

    Raises:
        ConfigError: The library tokenizers is missing.
        DataError: The text is too short.
    """
    tokenizer = BPETokenizer.train(text, L.vocab_size)
    prompts = prompts_in(text, tokenizer, max(BATCHES))
    for batch, new in BATCHES.items():
        chosen = prompts[:batch]
        yield Shape("L", L, max(map(len, chosen)), new, batch, texts=chosen)
    ids = tokenizer.encode(text)
    middle = max(0, len(ids) - LONG_PROMPT) // 2
    prompt = tuple(ids[middle : middle + LONG_PROMPT])
    if len(prompt) < LONG_PROMPT:
        raise DataError(f"--data: the text has {len(prompt)} tokens, but {LONG_PROMPT} are needed")
    yield Shape("L", L, LONG_PROMPT, 1, 1, texts=(prompt,))


def prompts_in(text: str, tokenizer: BPETokenizer, count: int) -> tuple[tuple[int, ...], ...]:
    """Returns paragraphs of SHORTEST to LONGEST tokens, evenly spaced over the text."""
    paragraphs = (tuple(tokenizer.encode(each)) for each in text.split("\n\n"))
    fitting = [each for each in paragraphs if SHORTEST <= len(each) <= LONGEST]
    if len(fitting) < count:
        raise DataError(
            f"--data: the text has {len(fitting)} paragraphs of {SHORTEST} to {LONGEST} tokens,"
            f" but {count} are needed"
        )
    return tuple(fitting[i * len(fitting) // count] for i in range(count))


def rows(text: str) -> Iterator[Row]:
    """Yields all rows of the script; `text` is where the prompts come from."""
    return bench_generate.rows(shapes(text))


def run(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit code."""
    return main("gpt2", __doc__ or "", rows, argv)


if __name__ == "__main__":
    sys.exit(run())
