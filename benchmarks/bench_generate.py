"""Greedy generation: gptfast against the course's loop, torch with a cache, and other engines.

Past the window, the window slides by one token and is recomputed; contenders that cannot do this
are left out. transformers, CTranslate2 and llama.cpp are included where they are installed.
Conversion and packing of the weights are not timed. bench_gpt2.py does the same with GPT-2.
Letters: B batch, T time, C n_embd, V vocab_size, L layers.
"""

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import generation_engines
import generation_peers
import peers
import torch
from command import main
from common import OURS, Case, Row
from generation_peers import Generate, Tokens
from torch import Tensor

import gptfast
from gptfast import GPT, GPTConfig
from gptfast.generation import make_request
from gptfast.generation.api import GOING_ON
from gptfast.generation.engine import Engine, PackedModel
from gptfast.generation.snapshot import snapshot

# A generated token counts as the most probable one up to rounding if its logit in the float64 model
# is at most this far below the largest one, relative to the size of the logits.
NEARLY_MOST_PROBABLE = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.15}
LATENCY_STEPS, LATENCY_SECONDS = 200, 3.0
CAPTURED = "SDPA, static cache, captured"
BANDWIDTH_BYTES = 1 << 29


@dataclass(frozen=True)
class Shape:
    """A model, and the sizes of prompt, continuation and batch."""

    name: str
    model: GPTConfig
    prompt: int
    new: int
    batch: int
    past: bool = False  # past the window: the prompt fills it
    # prompts of any lengths, `prompt` at most; without any, all are random and have `prompt` tokens
    texts: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        if self.new == 1:
            return f"{self.name}, prompt of {self.prompt} tokens"
        return f"{self.name}, batch {self.batch}{', past the window' if self.past else ''}"

    @property
    def lengths(self) -> list[int]:
        """How many tokens each prompt has."""
        return list(map(len, self.texts)) or [self.prompt] * self.batch

    @property
    def tokens(self) -> int:
        """What tokens/s counts: new tokens, or those of the prompts before a single new one."""
        return sum(self.lengths) if self.new == 1 else self.batch * self.new

    @property
    def flops(self) -> float:
        """Useful FLOPs: each token once within the window, the whole window for each slide."""
        m, T = self.model, self.model.block_size
        C, V, L = m.n_embd, m.vocab_size, m.n_layer

        def inside(length: int) -> float:
            seen = range(1, min(length + self.new, T + 1))
            return sum(L * (24 * C * C + 4 * C * t) for t in seen) + self.new * 2 * C * V

        within = sum(map(inside, self.lengths))
        if not self.past:
            return within
        # Per slide: no projection to q, k, v in the first layer, only k and v in the last one.
        layers = T * (L * 24 - 6 - 20) * C * C + 20 * C * C
        attention = (L - 1) * 2 * C * T * (T + 1) + 4 * C * T
        return within + self.batch * (self.new - 1) * (layers + attention)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrices that a step reads, in float32."""
        m = self.model
        return 4 * m.n_embd * (12 * m.n_layer * m.n_embd + m.vocab_size)


S = GPTConfig(block_size=64, vocab_size=66, n_layer=2, n_head=2, n_embd=128)
M = GPTConfig(block_size=256, vocab_size=66, n_layer=6, n_head=6, n_embd=384)
L = GPTConfig(
    block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, gelu="tanh",
    tie_weights=True, padding_idx=None, init="gpt2",
)  # fmt: skip
SHAPES = (
    *(Shape("S", S, 4, 56, batch) for batch in (1, 8, 64)),
    *(Shape("M", M, 16, 32, batch) for batch in (1, 8, 64)),
    *(Shape("S", S, 64, 16, batch, past=True) for batch in (1, 8, 64)),
    *(Shape("M", M, 256, new, batch, past=True) for batch, new in ((1, 12), (8, 4), (64, 2))),
)


@functools.lru_cache(maxsize=1)
def model_of(config: GPTConfig) -> GPT:
    """Makes a random model whose logits differ enough for rounding to change few tokens."""
    torch.manual_seed(0)
    model = GPT(config, backend="fused").eval()
    for param in model.parameters():
        if param.dim() == 2:
            param.data.mul_(2.0)
    return model


def forget_models() -> None:
    """Frees the models, with what gptfast keeps on them."""
    model_of.cache_clear()
    rounded.cache_clear()


def prompts_of(shape: Shape) -> Tokens:
    """Returns the tokens of each prompt."""
    if shape.texts:
        return [list(text) for text in shape.texts]
    generator = torch.Generator().manual_seed(5)
    size = (shape.batch, shape.prompt)
    prompts = torch.randint(1, shape.model.vocab_size, size, generator=generator, device="cpu")
    return prompts.tolist()


def options_of(shape: Shape, dtype: str) -> dict[str, Any]:
    """Returns the options of generate()."""
    return {
        "max_new_tokens": shape.new,
        "temperature": 0.0,
        "dtype": dtype,
        "max_batch": max(256, shape.batch),
        "max_cache_bytes": 16 << 30,
    }


def ready(shape: Shape, dtype: str) -> GPT | PackedModel:
    """Returns the model in the form that is fastest for repeated calls: packed on the CPU."""
    model = model_of(shape.model)
    if not model.wte.weight.is_cuda:
        return gptfast.pack(model, dtype)
    return model if dtype in ("fp32", "int8") else rounded(shape.model, dtype)


@functools.lru_cache(maxsize=1)
def rounded(config: GPTConfig, dtype: str) -> GPT:
    """Returns the model with its weights in this dtype, so that calls need not convert them."""
    return snapshot(model_of(config), dtype)


def ours(shape: Shape, dtype: str) -> Generate:
    """Makes gptfast's contender, gptfast.generate."""
    model, prompts = ready(shape, dtype), prompts_of(shape)
    options = options_of(shape, dtype)
    return lambda: [each.tokens for each in gptfast.generate(model, prompts, **options)]


def makers(shape: Shape, dtype: str) -> dict[str, Callable[[], Generate]]:
    """Returns a builder of each contender; `dtype` is fp32, bf16 or int8."""
    model, prompts, new = model_of(shape.model), prompts_of(shape), shape.new
    found: dict[str, Callable[[], Generate]] = {OURS: lambda: ours(shape, dtype)}
    if shape.name != "L":
        name = "course" if dtype == "fp32" else "course fp32"
        found[name] = lambda: generation_peers.course_loop(model, prompts, new)
    if dtype != "int8" and not shape.texts:
        found["SDPA loop"] = lambda: generation_peers.sdpa_loop(model, dtype, prompts, new)
    if shape.past:
        return found
    if dtype != "int8":
        found["SDPA, cache"] = lambda: generation_peers.sdpa_cache(model, dtype, prompts, new)
    if dtype != "int8" and not shape.texts and model.wte.weight.is_cuda:
        found[CAPTURED] = lambda: generation_peers.static_cache(model, dtype, prompts, new)
    if generation_peers.installed("transformers"):
        torch_dtype = "fp32" if dtype == "fp32" else "bf16"
        found["transformers"] = lambda: generation_peers.transformers_generate(
            model, torch_dtype, prompts, new
        )
    return found | (engines(shape, dtype) if model.wte.weight.is_cpu else {})


def engines(shape: Shape, dtype: str) -> dict[str, Callable[[], Generate]]:
    """Returns a builder of each engine for the CPU; a small model may be faster on one thread."""
    model, prompts, new = model_of(shape.model), prompts_of(shape), shape.new
    most = torch.get_num_threads()
    counts = (1, most) if shape.name == "S" else (most,)
    found: dict[str, Callable[[], Generate]] = {}
    # CTranslate2 has no bfloat16 on processors without AMX. It also converts from transformers.
    if dtype != "bf16" and generation_peers.installed("ctranslate2", "transformers"):
        compute_type = {"fp32": "float32", "int8": "int8_float32"}[dtype]
        make = generation_engines.ctranslate2_generate
        found["CTranslate2"] = lambda: generation_engines.apart(
            make, model, compute_type, prompts, new, counts
        )
    if generation_peers.installed("llama_cpp", "gguf"):
        file_type = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0"}[dtype]
        found["llama.cpp"] = lambda: generation_engines.llama_cpp_generate(
            model, file_type, prompts, new, counts
        )
    return found


def step(shape: Shape, dtype: str, left_out: Collection[str] = ()) -> Case:
    """Makes the case of one model, batch and dtype, without the contenders `left_out`."""
    found = makers(shape, dtype).items()
    contenders = {name: built(name, make) for name, make in found if name not in left_out}
    return Case(
        contenders,
        shape.flops,
        functools.partial(verify, shape, dtype, contenders),
        other_dtype=("course fp32",) if dtype != "fp32" else (),
        # Its OpenMP threads spin for 0.2 seconds after a call.
        rests={"CTranslate2": 0.3},
        details=functools.partial(details, shape, dtype),
    )


def built(name: str, make: Callable[[], Generate]) -> Generate:
    """Makes a contender; another one that cannot be made raises why when it is called."""
    try:
        return make()
    except Exception as error:
        if name == OURS:
            raise
        reason = error

    def fail() -> list[list[int]]:
        raise reason

    return fail


def verify(shape: Shape, dtype: str, contenders: dict[str, Generate]) -> dict[str, str]:
    """Looks whether each contender's tokens are the likeliest up to rounding; see `Case.verify`."""
    wrong = {}
    for name, contender in contenders.items():
        with torch.device("cpu"):  # no other default than a user has
            tokens = contender()
        why = mistake(shape, dtype, name, tokens)
        assert name != OURS or why is None, f"{OURS} {why}"
        if why is not None:
            wrong[name] = why
    return wrong


def mistake(shape: Shape, dtype: str, name: str, tokens: Tokens) -> str | None:
    """Returns what is wrong with a contender's tokens, in the shortest and longest texts."""
    if [len(row) for row in tokens] != [shape.new] * shape.batch:
        return "generates another number of tokens"
    prompts, lengths = prompts_of(shape), shape.lengths
    bound = NEARLY_MOST_PROBABLE["fp32" if name == "course fp32" else dtype]
    rounded = dtype if dtype == "int8" and name in (OURS, "CTranslate2") else None
    in_order = sorted(range(shape.batch), key=lengths.__getitem__)
    for i in dict.fromkeys((in_order[0], in_order[-1])):
        gap = largest_gap(shape, rounded, prompts[i], tokens[i])
        if not gap <= bound:  # also where it is NaN
            return f"takes unlikely tokens: an error of {gap:.3g} in text {i}, above {bound:g}"
    return None


@functools.lru_cache(maxsize=2)
def oracle_of(config: GPTConfig, dtype: str | None) -> peers.SdpaGPT:
    """Returns the model in float64, its weights rounded to `dtype` first."""
    model = snapshot(model_of(config), dtype)
    untied = peers.SdpaGPT(replace(config, tie_weights=False))
    untied.load_state_dict(model.state_dict())
    return untied.double().eval()


def largest_gap(shape: Shape, dtype: str | None, prompt: list[int], new: list[int]) -> float:
    """Returns the largest gap between maximal and chosen logit, relative to the logits' size."""
    text = (*prompt, *new[:-1])
    logits = exact_logits(shape.model, dtype, text, len(new), shape.past)  # (new, V)
    taken = logits.gather(1, torch.tensor(new, device=logits.device)[:, None])
    return float(((logits.amax(1, keepdim=True) - taken) / logits.abs().amax()).max())


@functools.lru_cache(maxsize=4)  # most contenders generate the same text
@torch.no_grad()
def exact_logits(
    config: GPTConfig, dtype: str | None, text: tuple[int, ...], new: int, past: bool
) -> Tensor:
    """Returns the logits of `oracle_of` after each of the last `new` tokens of a text, (new, V)."""
    oracle, T = oracle_of(config, dtype), config.block_size
    idx = torch.tensor(text, device=oracle.wte.weight.device)
    if past:
        windows = idx.unfold(0, T, 1)  # (new, T), since the prompt fills the first one
        return oracle.lm_head(oracle.hidden(windows)[:, -1])
    return oracle.lm_head(oracle.hidden(idx[None])[0, -new:])


def details(shape: Shape, dtype: str, seconds: float) -> dict[str, float]:
    """Measures gptfast's tokens/s, cache size, latencies and fraction of memory bandwidth."""
    packed = ready(shape, dtype)
    found = {"tokens/s": shape.tokens / seconds}
    if not isinstance(packed, PackedModel):
        return found
    start = time.perf_counter()
    request = make_request(packed, prompts_of(shape), **options_of(shape, dtype))
    engine, going = Engine(packed, request), set(range(shape.batch))
    found["cache, MiB"] = engine.cache_bytes / 2**20
    first = time.perf_counter() - start + one_step(engine, going)
    found["first token, ms"] = 1e3 * first
    if shape.new == 1:
        return found
    steps: list[float] = []
    while len(steps) < LATENCY_STEPS and sum(steps) < LATENCY_SECONDS:
        if len(going) < shape.batch:  # a step of fewer texts is another one
            engine, going = Engine(packed, request), set(range(shape.batch))
            one_step(engine, going)
        steps.append(one_step(engine, going))
    size = {"fp32": 1.0, "bf16": 0.5, "int8": 0.25}[dtype] * shape.weight_bytes
    p50 = statistics.median(steps)
    found |= {
        "step p50, ms": 1e3 * p50,
        "step p99, ms": 1e3 * sorted(steps)[math.ceil(0.99 * len(steps)) - 1],
        "steps": len(steps),
    }
    if shape.batch == 1 and not shape.past:
        found["of bandwidth"] = size / p50 / bandwidth()
    return found


def one_step(engine: Engine, going: set[int]) -> float:
    """Runs the engine until each of these texts has another token; returns its passes' seconds.

    Texts that end leave the set. A text that is ahead of others may have several tokens.
    """
    seconds, behind = 0.0, set(going)
    while behind:
        start = time.perf_counter()
        engine.run(0.0)
        seconds += time.perf_counter() - start
        for update in engine.updates():
            if update.tokens:
                behind.discard(update.sequence)
            if update.state not in GOING_ON:
                behind.discard(update.sequence)
                going.discard(update.sequence)
    return seconds


@functools.cache
def bandwidth() -> float:
    """Measures the bytes per second that torch reads from memory, the best of 5 tries."""
    x = torch.ones(BANDWIDTH_BYTES // 4)
    tries = []
    for _ in range(5):
        start = time.perf_counter()
        x.sum()
        tries.append(time.perf_counter() - start)
    return BANDWIDTH_BYTES / min(tries)


def rows(shapes: Iterable[Shape] = SHAPES) -> Iterator[Row]:
    """Yields all rows; int8 ones count as bf16, the dtype of their activations where it is fast."""
    for shape in shapes:
        for dtype in ("fp32", "bf16", "int8"):
            name = f"{shape}, int8" if dtype == "int8" else str(shape)
            quick = shape.name == "S" and shape.batch == 1 and not shape.past
            build = functools.partial(step, shape, dtype)
            yield Row(name, "bf16" if dtype == "int8" else dtype, build, quick)


def run(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit code."""
    return main("generate", __doc__ or "", rows(), argv)


if __name__ == "__main__":
    sys.exit(run())
