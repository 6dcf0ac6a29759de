"""Greedy generation by CTranslate2 and llama.cpp from the weights of a gptfast model.

Contenders as in generation_peers.py, from prompts of any lengths; each takes the fastest of its
settings. Some run in a process of their own. Letters: B batch, T time, V vocab_size.
"""

import contextlib
import copy
import logging
import multiprocessing
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import generation_files
import numpy as np
import torch
from generation_peers import Generate, Tokens

from gptfast import GPT

TRIED_CALLS = 3  # to find the fastest setting; of a slow contender one
SLOW_SECONDS = 0.5
# Tokens that llama.cpp computes at once: either may be faster; the second is its default.
UBATCHES = (128, 512)


def apart(make: Callable[..., Generate], model: GPT, *arguments: Any) -> Generate:
    """Runs the contender that `make` builds in a separate process.

    Two OpenMP pools in one process have more threads than there are processors. OpenMP then stops
    spinning at barriers, and all contenders would run at half speed while both pools exist.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    copied = copy.deepcopy(model)  # pickling moves the weights to shared memory
    arguments = (there, torch.get_num_threads(), make, copied, *arguments)
    process = context.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    there.close()

    def run() -> Tokens:
        here.send(None)
        tokens, error = here.recv()
        if error:
            raise RuntimeError(error)
        return tokens

    def stop() -> None:
        here.close()
        process.join()

    weakref.finalize(run, stop)
    return run


def _serve(
    there: Any, threads: int, make: Callable[..., Generate], model: GPT, *arguments: Any
) -> None:
    torch.set_num_threads(threads)
    run: Generate | None = None
    with contextlib.suppress(EOFError):  # the parent closed the pipe
        while True:
            there.recv()
            try:
                run = run or make(model, *arguments)
                there.send((run(), ""))
            except Exception as error:
                there.send(([], f"{type(error).__name__}: {error}"))


def fastest(contenders: Iterable[Generate]) -> Generate:
    """Returns the fastest of these contenders; a call of each comes before those that count."""
    found = list(contenders)
    return min(found, key=_seconds) if len(found) > 1 else found[0]


def _seconds(run: Generate) -> float:
    run()
    best = float("inf")
    for _ in range(TRIED_CALLS):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        if best > SLOW_SECONDS:
            break
    return best


def ctranslate2_generate(
    model: GPT, compute_type: str, prompts: Tokens, new: int, thread_counts: Sequence[int]
) -> Generate:
    """CTranslate2, with all threads on one batch.

    Of prompts of different lengths it computes as many tokens at once as the shortest has, and the
    others one by one. Smaller batches have prompts of similar lengths, because it sorts them.
    """
    import ctranslate2

    texts = [[str(token) for token in prompt] for prompt in prompts]
    B = len(texts)
    sizes = (B,) if len(set(map(len, texts))) == 1 else (B, max(1, B // 8))

    def contender(other: Any, size: int) -> Generate:
        def run() -> Tokens:
            results = other.generate_batch(
                texts,
                max_length=new,
                min_length=new,
                sampling_topk=1,
                include_prompt_in_result=False,
                max_batch_size=size,
                end_token=[],
            )
            return [result.sequences_ids[0] for result in results]

        return run

    with tempfile.TemporaryDirectory() as folder:
        generation_files.write_ctranslate2(model, Path(folder), compute_type)
        engines = [
            ctranslate2.Generator(folder, compute_type=compute_type, intra_threads=threads)
            for threads in thread_counts
        ]
    return fastest(contender(other, size) for other in engines for size in sizes)


def llama_cpp_generate(
    model: GPT, kind: str, prompts: Tokens, new: int, thread_counts: Sequence[int]
) -> Generate:
    """llama.cpp, with one sequence per text.

    `kind` is the type of the matrices: F32, BF16 or Q8_0. Keys and values are float16, the default
    and the fastest. Its GELU is always the tanh approximation, from a float16 table, which changes
    the logits by 5e-4 of their size.
    """
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        generation_files.write_llama_cpp(model, path, kind)
        loaded = _LlamaModel(path, model.config.vocab_size)
    sizes = UBATCHES if sum(map(len, prompts)) > UBATCHES[0] else UBATCHES[1:]
    return fastest(
        _llama_contender(loaded, prompts, new, threads, size)
        for threads in thread_counts
        for size in sizes
    )


class _LlamaModel:
    """A model that llama.cpp has loaded, which is freed with this object."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        import llama_cpp

        self.vocab_size = vocab_size

        params = llama_cpp.llama_model_default_params()
        self.handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.handle, "llama.cpp cannot load the model"
        weakref.finalize(self, llama_cpp.llama_model_free, self.handle)

    def context(self, texts: int, tokens: int, longest: int, threads: int, ubatch: int) -> Any:
        """Makes a context for `tokens` at once, of `texts` that become `longest` at most."""
        import llama_cpp

        options = llama_cpp.llama_context_default_params()
        options.n_seq_max, options.n_batch, options.n_ctx = texts, tokens, texts * longest
        options.n_ubatch = ubatch
        options.n_threads = options.n_threads_batch = threads
        made = llama_cpp.llama_init_from_model(self.handle, options)
        assert made, "llama.cpp cannot make a context"
        return made


def _llama_contender(
    loaded: _LlamaModel, prompts: Tokens, new: int, threads: int, ubatch: int
) -> Generate:
    import llama_cpp

    B, lengths = len(prompts), np.array([len(prompt) for prompt in prompts])
    total, longest = int(lengths.sum()), int(lengths.max()) + new
    context = loaded.context(B, total, longest, threads, ubatch)
    memory = llama_cpp.llama_get_memory(context)
    prefill, step = _llama_batch(prompts), _llama_batch([[0]] * B)
    tokens, positions = (np.ctypeslib.as_array(x, (B,)) for x in (step.token, step.pos))

    def decode(batch: Any) -> None:
        code = llama_cpp.llama_decode(context, batch)
        assert code == 0, f"llama_decode returns {code}"

    decode(prefill)  # from now on the logits' address is fixed
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (B, loaded.vocab_size))

    def run() -> Tokens:
        llama_cpp.llama_memory_clear(memory, False)
        out = np.empty((new, B), dtype=np.int64)
        decode(prefill)
        for i, row in enumerate(out):
            if i > 0:
                tokens[:], positions[:] = out[i - 1], lengths + (i - 1)
                decode(step)
            llama_cpp.llama_get_logits(context)  # synchronises and sorts the rows
            logits.argmax(1, out=row)
        return out.T.tolist()

    def free(_: _LlamaModel) -> None:
        for batch in (prefill, step):
            llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)

    weakref.finalize(run, free, loaded)  # the model must outlive the context
    return run


def _llama_batch(prompts: Tokens) -> Any:
    """Makes a batch of all tokens, a sequence for each prompt, with the logits of its last one."""
    import llama_cpp

    total = sum(map(len, prompts))
    batch = llama_cpp.llama_batch_init(total, 0, 1)
    batch.n_tokens = total
    places = ((n, t) for n, prompt in enumerate(prompts) for t in range(len(prompt)))
    for i, (sequence, position) in enumerate(places):
        prompt = prompts[sequence]
        batch.token[i], batch.pos[i] = prompt[position], position
        batch.logits[i] = position == len(prompt) - 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
    return batch
