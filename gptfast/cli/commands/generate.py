"""`gptfast generate`."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from gptfast.cli.options import (
    EXIT_INTERRUPTED,
    ComputeOptions,
    Count,
    File,
    Fraction,
    Run,
    Texts,
    load_text_model,
    use_threads,
)
from gptfast.errors import ConfigError


@dataclass(frozen=True)
class Generate:
    """Continue one or more prompts; a single one appears as it is generated."""

    run_path: Run  # a run of `gptfast train`, a folder of Hugging Face or nanoGPT, or hf:OWNER/NAME
    compute: ComputeOptions
    # text to continue; - reads it from standard input; '' begins a new text where the tokenizer has
    # an end of texts
    prompt: Texts = ()
    prompt_file: File = None  # a file whose text is a further prompt
    # error: refuse a character that the model does not know; skip: leave it out of the prompt
    unknown: Literal["error", "skip"] = "error"
    max_new_tokens: int = 100  # tokens to generate per prompt
    temperature: float = 1.0  # 0 takes the likeliest token; higher is more random
    top_k: Count = None  # draw from the N likeliest tokens; None or 0: from all
    top_p: Fraction = None  # draw from the likeliest tokens that together have this probability
    min_p: Fraction = None  # draw only tokens with this fraction of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1 makes tokens that came before less likely
    num_samples: int = 1  # texts per prompt
    seed: int = 0  # of the draws, not negative; equal seeds give equal texts
    stop: Texts = ()  # end before this text
    stop_at_end: bool = True  # whether a text ends where the tokenizer's end-of-text token comes
    # what to do past the window: slide it by one token (exact) or by K (faster), end, or refuse
    overflow: Annotated[str, tyro.conf.arg(metavar="recompute|stride:K|stop|error")] = "recompute"
    dtype: Literal["fp32", "bf16", "int8"] | None = None  # of the weights; None: the model's own

    def run(self) -> int:
        """Prints prompts and continuations."""
        from gptfast.generation import generate, stream

        prompts = self._prompts()
        use_threads(self.compute.threads)
        model, tokenizer = load_text_model(self.run_path, self.compute)
        prompts = [tokenizer.decode(tokenizer.encode(text, self.unknown)) for text in prompts]
        names = "max_new_tokens temperature top_k top_p min_p repetition_penalty num_samples seed"
        names += " stop stop_at_end overflow dtype"
        options: dict[str, Any] = {name: getattr(self, name) for name in names.split()}
        options["tokenizer"] = tokenizer
        if len(prompts) == 1 and self.num_samples == 1:
            pieces = stream(model, prompts[0], **options)  # checks all before the first output
            _write([prompts[0]])
            _write(str(piece) for piece in pieces)
            _write(["\n"])
            return 0
        results = generate(model, prompts, **options)
        for i, result in enumerate(results):
            prompt = prompts[i // self.num_samples]
            _write([f"--- {i + 1} of {len(results)}\n{prompt}{result.text}\n"])
        interrupted = any(result.finish_reason == "interrupted" for result in results)
        return EXIT_INTERRUPTED if interrupted else 0

    def _prompts(self) -> list[str]:
        from gptfast.data.texts import read_text, without_byte_order_mark

        if "-" in self.prompt and sys.stdin is None:
            raise ConfigError("--prompt -: there is no standard input")
        prompts = [
            without_byte_order_mark(sys.stdin.read()) if text == "-" else text
            for text in self.prompt
        ]
        if self.prompt_file is not None:
            prompts.append(read_text(self.prompt_file))
        if not prompts:
            raise ConfigError("there is no prompt: give --prompt TEXT or --prompt-file FILE")
        return prompts


def _write(pieces: Iterable[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
