"""What tests of generation share: models, prompts, and a call that Ctrl-C interrupts."""

import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
from small_models import model_of

from gptfast import GPT, CharTokenizer, GPTConfig

MODELS = {
    "course": GPTConfig(block_size=16, vocab_size=5, n_embd=32),
    "odd": GPTConfig(block_size=37, vocab_size=30, n_layer=3, n_embd=51, n_head=3, bias=False),
    "no attention": GPTConfig(block_size=8, vocab_size=9, n_embd=20, attention=False),
    "tanh, tied": GPTConfig(
        block_size=12, vocab_size=40, n_embd=48, n_head=4, gelu="tanh", tie_weights=True
    ),
}
TEXT = "the cat sat on the mat.\n"
WIDE = GPTConfig(block_size=8, vocab_size=70, n_layer=2, n_head=4, n_embd=640)


def make(name: str) -> GPT:
    """Makes a model whose logits differ enough for rounding not to change the tokens."""
    return model_of(MODELS[name], scale=1.5)


def text_model() -> tuple[GPT, CharTokenizer]:
    """Makes a model of the characters of TEXT."""
    tokenizer = CharTokenizer.from_text(TEXT)
    config = GPTConfig(block_size=10, vocab_size=tokenizer.vocab_size, n_embd=32)
    return model_of(config, seed=3), tokenizer


def prompts_for(config: GPTConfig) -> list[list[int]]:
    """Returns prompts of five lengths, from one token to more than three windows."""
    generator = torch.Generator().manual_seed(4)
    lengths = (1, 4, config.block_size, 3 * config.block_size + 1, 2)
    return [
        torch.randint(1, config.vocab_size, (n,), generator=generator).tolist() for n in lengths
    ]


def interrupted_soon(call: Callable[[], Any], seconds: float) -> Any:
    """Returns the result of a call that receives Ctrl-C after some seconds.

    Installs Python's handler first, because shells start background jobs with SIGINT ignored.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(seconds, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    try:
        return call()
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
