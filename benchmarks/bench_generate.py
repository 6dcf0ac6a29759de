"""Greedy generation: gptfast against the course's loop, torch with a cache, and other engines.

Past the window, the window slides by one token and is recomputed; contenders that cannot do this
are left out. transformers, CTranslate2 and llama.cpp are included where they are installed.
Conversion and packing of the weights are not timed.
Letters: B batch, T time, C n_embd, V vocab_size, L layers.
"""

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import generation_engines
import generation_peers
import peers
import torch
from command import main
from common import OURS, Case, Row
from generation_peers import Generate
from torch import Tensor

import gptfast
from gptfast import GPT, GPTConfig
from gptfast.generation import make_request
from gptfast.generation.engine import Engine, PackedModel
from gptfast.generation.snapshot import snapshot

# A generated token counts as the most probable one up to rounding if its logit in the float64 model
# is at most this far below the largest one, relative to the size of the logits.
NEARLY_MOST_PROBABLE = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.15}
VERIFIED_TEXTS, LATENCY_STEPS, LATENCY_SECONDS = 2, 200, 3.0
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

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}{', past the window' if self.past else ''}"

    @property
    def flops(self) -> float:
        """Useful FLOPs: each token once within the window, the whole window for each slide."""
        m, T = self.model, self.model.block_size
        C, V, L = m.n_embd, m.vocab_size, m.n_layer
        seen = range(1, self.prompt + self.new)
        prefill = sum(L * (24 * C * C + 4 * C * t) for t in seen if t <= T) + self.new * 2 * C * V
        if not self.past:
            return self.batch * prefill
        # Per slide: no projection to q, k, v in the first layer, only k and v in the last one.
        layers = T * (L * 24 - 6 - 20) * C * C + 20 * C * C
        attention = (L - 1) * 2 * C * T * (T + 1) + 4 * C * T
        return self.batch * (prefill + (self.new - 1) * (layers + attention))

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
    *(Shape("L", L, 32, 16, batch) for batch in (1, 8, 64)),
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


def prompt_of(shape: Shape) -> Tensor:
    """Returns random tokens, (B, T)."""
    generator = torch.Generator().manual_seed(5)
    size = (shape.batch, shape.prompt)
    prompt = torch.randint(1, shape.model.vocab_size, size, generator=generator, device="cpu")
    return prompt.to(torch.get_default_device())


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
    model, prompts = ready(shape, dtype), prompt_of(shape).tolist()
    options = options_of(shape, dtype)
    return lambda: [each.tokens for each in gptfast.generate(model, prompts, **options)]


def makers(shape: Shape, dtype: str) -> dict[str, Callable[[], Generate]]:
    """Returns a builder of each contender; `dtype` is fp32, bf16 or int8."""
    model, prompt, new = model_of(shape.model), prompt_of(shape), shape.new
    found: dict[str, Callable[[], Generate]] = {OURS: lambda: ours(shape, dtype)}
    torch_dtype = "fp32" if dtype == "fp32" else "bf16"
    if shape.name != "L":
        name = "course" if dtype == "fp32" else "course fp32"
        found[name] = lambda: generation_peers.course_loop(model, prompt, new)
    if dtype != "int8" and not (shape.name == "L" and shape.batch > 8):  # minutes per call
        found["SDPA loop"] = lambda: generation_peers.sdpa_loop(model, dtype, prompt, new)
    if shape.past:
        return found
    if dtype != "int8":
        found["SDPA, cache"] = lambda: generation_peers.sdpa_cache(model, dtype, prompt, new)
    if dtype != "int8" and model.wte.weight.is_cuda:
        found[CAPTURED] = lambda: generation_peers.static_cache(model, dtype, prompt, new)
    if generation_peers.installed("transformers"):
        found["transformers"] = lambda: generation_peers.transformers_generate(
            model, torch_dtype, prompt, new
        )
    # CTranslate2 has no bfloat16 on processors without AMX, and needs another build for GPUs.
    on_cpu = model.wte.weight.is_cpu
    # A small model may be faster on one thread.
    most = torch.get_num_threads()
    counts = (1, most) if shape.name == "S" else (most,)
    if on_cpu and dtype != "bf16" and generation_peers.installed("ctranslate2"):
        kind = {"fp32": "float32", "int8": "int8_float32"}[dtype]
        make = generation_engines.ctranslate2_generate
        found["CTranslate2"] = lambda: generation_engines.fastest(
            lambda threads: generation_engines.apart(make, model, kind, prompt, new, threads),
            counts,
        )
    if on_cpu and generation_peers.installed("llama_cpp", "gguf"):
        file_type = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0"}[dtype]
        found["llama.cpp"] = lambda: generation_engines.fastest(
            lambda threads: generation_engines.llama_cpp_generate(
                model, file_type, prompt, new, threads
            ),
            counts,
        )
    return found


def step(shape: Shape, dtype: str, left_out: Collection[str] = ()) -> Case:
    """Makes the case of one model, batch and dtype, without the contenders `left_out`."""
    found = makers(shape, dtype).items()
    contenders = {name: make() for name, make in found if name not in left_out}
    return Case(
        contenders,
        shape.flops,
        functools.partial(verify, shape, dtype, contenders),
        other_dtype=("course fp32",) if dtype != "fp32" else (),
        # Its OpenMP threads spin for 0.2 seconds after a call.
        rests={"CTranslate2": 0.3},
        details=functools.partial(details, shape, dtype),
    )


def verify(shape: Shape, dtype: str, contenders: dict[str, Generate]) -> None:
    """Asserts that each contender's tokens are the most probable ones up to rounding."""
    exact = oracle_of(shape.model, None)
    rounded = oracle_of(shape.model, "int8") if dtype == "int8" else exact
    prompt, rows = prompt_of(shape).tolist(), range(min(VERIFIED_TEXTS, shape.batch))
    for name, contender in contenders.items():
        kind = "fp32" if name == "course fp32" else dtype
        oracle = rounded if name in (OURS, "CTranslate2") else exact
        with torch.device("cpu"):  # no other default than a user has
            tokens = contender()
        assert [len(row) for row in tokens] == [shape.new] * shape.batch, f"{name}: other lengths"
        for row in rows:
            gap = largest_gap(oracle, prompt[row], tokens[row], shape)
            assert gap <= NEARLY_MOST_PROBABLE[kind], (
                f"{name} takes unlikely tokens: an error of {gap:.3g} in text {row}"
            )


@functools.lru_cache(maxsize=2)
def oracle_of(config: GPTConfig, dtype: str | None) -> peers.SdpaGPT:
    """Returns the model in float64, its weights rounded to `dtype` first."""
    model = snapshot(model_of(config), dtype)
    untied = peers.SdpaGPT(replace(config, tie_weights=False))
    untied.load_state_dict(model.state_dict())
    return untied.double().eval()


@torch.no_grad()
def largest_gap(oracle: peers.SdpaGPT, prompt: list[int], new: list[int], shape: Shape) -> float:
    """Returns the largest gap between maximal and chosen logit, relative to the logits' size."""
    device, T = oracle.wte.weight.device, shape.model.block_size
    text = torch.tensor([*prompt, *new], device=device)
    if shape.past:
        windows = text[:-1].unfold(0, T, 1)  # (new, T), since the prompt fills the first one
        hidden = oracle.hidden(windows)[:, -1]  # (new, C)
    else:
        hidden = oracle.hidden(text[None, :-1])[0, len(prompt) - 1 :]
    logits = oracle.lm_head(hidden)  # (new, V)
    taken = logits.gather(1, torch.tensor(new, device=device)[:, None])
    return float(((logits.amax(1, keepdim=True) - taken) / logits.abs().amax()).max())


def details(shape: Shape, dtype: str, seconds: float) -> dict[str, float]:
    """Measures gptfast's tokens/s, cache size, latencies and fraction of memory bandwidth."""
    packed = ready(shape, dtype)
    if not isinstance(packed, PackedModel):
        return {"tokens/s": shape.batch * shape.new / seconds}
    start = time.perf_counter()
    request = make_request(packed, prompt_of(shape).tolist(), **options_of(shape, dtype))
    engine = Engine(packed, request)
    found = {
        "tokens/s": shape.batch * shape.new / seconds,
        "cache, MiB": engine.cache_bytes / 2**20,
    }
    first = time.perf_counter() - start + one_step(engine, shape.batch)
    steps: list[float] = []
    while len(steps) < LATENCY_STEPS and sum(steps) < LATENCY_SECONDS:
        if steps and len(steps) % (shape.new - 1) == 0:
            engine = Engine(packed, request)
            one_step(engine, shape.batch)
        steps.append(one_step(engine, shape.batch))
    size = {"fp32": 1.0, "bf16": 0.5, "int8": 0.25}[dtype] * shape.weight_bytes
    p50 = statistics.median(steps)
    found |= {
        "first token, ms": 1e3 * first,
        "step p50, ms": 1e3 * p50,
        "step p99, ms": 1e3 * sorted(steps)[math.ceil(0.99 * len(steps)) - 1],
        "steps": len(steps),
    }
    if shape.batch == 1 and not shape.past:
        found["of bandwidth"] = size / p50 / bandwidth()
    return found


def one_step(engine: Engine, texts: int) -> float:
    """Runs the engine until each text has another token; returns the seconds of its passes."""
    seconds, advanced = 0.0, set[int]()
    while len(advanced) < texts:
        start = time.perf_counter()
        engine.run(0.0)
        seconds += time.perf_counter() - start
        advanced |= {update.sequence for update in engine.updates() if update.tokens}
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


def rows() -> Iterator[Row]:
    """Yields all rows; int8 ones count as bf16, the dtype of their activations where it is fast."""
    for shape in SHAPES:
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
