"""No operator accesses memory out of bounds: its tensors lie next to a protected page.

All arguments, results and saved tensors have a protected page behind the last element or before the
first. A violation ends the process, so the operators run in a child process, which executes this
file as a script. Its argument is a level, or a side, for a deliberate violation.
"""

import ctypes
import math
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import gptfast
from gptfast import ops
from gptfast.ops import select
from gptfast.training.optimizer import AdamW

SIDES = ("behind", "before")
DTYPES = (torch.float32, torch.bfloat16)
PROT_NONE = 0  # from POSIX; Python's mmap lacks this constant
EMPTY = torch.ops.aten.empty.memory_format


def no_guard_reason() -> str | None:
    """Returns why pages cannot be protected here, or None if they can."""
    try:
        ctypes.CDLL(None).mprotect  # noqa: B018
    except (AttributeError, TypeError, OSError) as error:
        return f"there is no mprotect to guard pages with ({error})"
    return None


def guarded(like: Tensor, side: str) -> Tensor:
    """Makes an uninitialised tensor like this one, with a protected page on one side."""
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    extent = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True))
    size, page = extent * like.element_size(), mmap.PAGESIZE
    pages = math.ceil(size / page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = pages * page - size if side == "behind" else page
    buffer = (ctypes.c_char * size).from_buffer(memory, start)
    address = ctypes.addressof(buffer) - start + (pages * page if side == "behind" else 0)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    if protect(ctypes.c_void_p(address), ctypes.c_size_t(page), PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    flat = torch.frombuffer(buffer, dtype=like.dtype)  # keeps the memory alive
    return flat.as_strided(like.shape, like.stride())


class Guard(TorchDispatchMode):
    """Runs gptfast's operators on copies of their arguments, and allocates, in guarded memory."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.side, self.inside, self.seen = side, False, set[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "gptfast":
            return self.call(func, args)
        if self.inside and func is EMPTY:
            return guarded(torch.empty(*args, **(kwargs or {}), device="meta"), self.side)
        return func(*args, **(kwargs or {}))

    def call(self, func: Any, args: tuple) -> Any:
        self.seen.add(func.name())
        copies = tree_map_only(Tensor, lambda x: guarded(x, self.side).copy_(x), args)
        cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        self.inside = True
        with self:  # intercepts the kernel's allocations too
            result = func.redispatch(cpu, *copies)
        self.inside = False
        for declared, original, copy in zip(func._schema.arguments, args, copies, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write:
                for to, values in zip(*map(listed, (original, copy)), strict=True):
                    to.copy_(values)
        return result


def listed(x: Tensor | list[Tensor]) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else x


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def attention_cases(dtype: torch.dtype) -> Iterator[tuple]:
    times = ((1, 1), (17, 17), (33, 33), (97, 97), (1, 129), (5, 140), (129, 200), (40, 3))
    for i, (Tq, Tk) in enumerate(times):
        for D in (8, 33, 64):
            p = 0.3 * (i % 2)
            q, k, v = normal(2, 2, Tq, D), normal(2, 2, Tk, D), normal(2, Tk, 2, D)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype).transpose(1, 2)
            yield ops.causal_attention, (q, k, v), {"dropout_p": p, "seed": 1}


def self_attention_cases(dtype: torch.dtype, param: torch.dtype) -> Iterator[tuple]:
    for i, T in enumerate((1, 17, 33, 97, 129)):
        for C in (2, 16, 66, 128):
            p = 0.3 * (i % 2)
            shapes = (C,), (C,), (3 * C, C), (3 * C,), (C, C), (C,)
            args = (normal(2, T, C, dtype=dtype), *(normal(*each, dtype=param) for each in shapes))
            dropout = {"dropout_p": p, "proj_dropout_p": 0.3 - p, "proj_stream": 1, "seed": 1}
            yield ops.layer_norm_attention, args, {"n_head": 2, **dropout}


def linear_cases(dtype: torch.dtype, param: torch.dtype) -> Iterator[tuple]:
    for M in (1, 49, 97):
        for K, N in ((1, 1), (5, 3), (31, 17), (64, 64), (193, 15), (19, 530)):
            x, weight, bias = normal(M, K, dtype=dtype), normal(N, K), normal(N)
            weight, bias = weight.to(param), bias.to(param)
            ln_w, ln_b = normal(K, dtype=param), normal(K, dtype=param)
            yield ops.layer_norm_linear, (x, ln_w, ln_b, weight, bias), {}
            if M == 49:
                yield ops.layer_norm_linear, (x, ln_w, None, weight, None), {}
            yield ops.linear_residual, (x, weight, bias, normal(M, N, dtype=dtype)), {}


def ffn_cases(dtype: torch.dtype, param: torch.dtype) -> Iterator[tuple]:
    for M in (1, 49, 97):
        for C, F in ((1, 1), (9, 37), (16, 64), (33, 132), (50, 513)):
            shapes = (C,), (C,), (F, C), (F,), (C, F), (C,)
            params = [normal(*shape, dtype=param) for shape in shapes]
            gelu, p = ("erf", 0.0) if C % 2 else ("tanh", 0.3)
            args = (normal(M, C, dtype=dtype), *params)
            yield ops.layer_norm_ffn, args, {"gelu": gelu, "dropout_p": p, "seed": 1}


def cross_entropy_cases(dtype: torch.dtype, param: torch.dtype) -> Iterator[tuple]:
    for M in (1, 49, 97):
        for K, V in ((1, 1), (33, 5), (64, 66), (7, 1000), (33, 300), (32, 1539)):
            targets = torch.randint(V, (M,))
            targets[M // 3 :: 4] = -100
            args = (normal(M, K, dtype=dtype), normal(V, K, dtype=param), targets)
            norm = {"ln_w": normal(K, dtype=param), "ln_b": normal(K, dtype=param)}
            smoothing = {"label_smoothing": 0.1 if M == 49 else 0.0}
            yield ops.linear_cross_entropy, args, smoothing | (norm if V % 2 else {})


def embedding_cases(dtype: torch.dtype, param: torch.dtype) -> Iterator[tuple]:
    for T in (1, 9, 50):
        for C in (1, 15, 37, 64):
            idx, wte, wpe = torch.randint(7, (2, T)), normal(7, C), normal(T + 2, C)
            options = {"dtype": dtype, "padding_idx": 0, "dropout_p": 0.2, "seed": 1}
            yield ops.embedding, (idx, wte.to(param), wpe.to(param)), options


CASES = linear_cases, self_attention_cases, ffn_cases, cross_entropy_cases, embedding_cases


def all_cases() -> Iterator[tuple]:
    for dtype in DTYPES:
        yield from attention_cases(dtype)
        for param in dict.fromkeys((torch.float32, dtype)):
            for cases in CASES:
                yield from cases(dtype, param)


def run_op(op: Any, args: tuple, options: dict) -> None:
    """Runs the forward that saves nothing, then forward and backward."""
    with torch.no_grad():
        op(*args, **options)
    out = op(*args, **options)
    inputs = (*args, *options.values())
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    # Contiguous, unlike attention's result, which is a transposed view.
    grad = torch.ones_like(out, memory_format=torch.contiguous_format)
    torch.autograd.grad(out, leaves, grad)


def models() -> list[gptfast.GPT]:
    options = {"block_size": 11, "vocab_size": 13, "n_layer": 2, "n_head": 2}
    configs = [
        gptfast.GPTConfig(n_embd=34, **options),
        gptfast.GPTConfig(n_embd=16, bias=False, **options),
        gptfast.GPTConfig(n_embd=32, attention=False, **options),
    ]
    return [gptfast.GPT(config) for config in configs]


def generate(model: gptfast.GPT, dtype: str) -> None:
    """Generates for prompts within and past the window, with all sampling options; then scores."""
    prompts = [[1], [2, 3, 4, 5, 6], list(range(11))]
    options: dict[str, Any] = {"max_new_tokens": 9, "dtype": dtype, "stop": [3], "logprobs": 2}
    gptfast.generate(model, prompts, **options)
    filters: dict[str, Any] = {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    gptfast.generate(model, prompts, num_samples=2, max_batch=4, **filters, **options)
    gptfast.score(model, prompts, dtype=dtype)


def move_weights() -> None:
    """One step of the optimiser over parameters of odd sizes."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((1,), (37,), (5, 129))]
    for param in params:
        param.grad = torch.randn(param.shape)
    AdamW(params, ema=0.9).clipped_step(0.5)


def described(op: Any, args: tuple, options: dict) -> str:
    inputs = {**{str(i): x for i, x in enumerate(args)}, **options}
    shown = {
        k: (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for k, x in inputs.items()
    }
    return f"{op.__name__} of {shown}"


def run_all(level: str) -> None:
    """Runs the cases and prints a line before each; the last line names the operators called."""
    extension = select.extension()
    assert extension is not None
    extension.isa_set(level)
    cases, seen = list(all_cases()), set()
    for side in SIDES:
        with Guard(side) as guard:
            # Accesses before the start are rarer; every fifth case is enough, to save time.
            for op, args, options in cases if side == "behind" else cases[::5]:
                print(side, described(op, args, options), flush=True)
                run_op(op, args, options)
            for model in models():
                for dtype in ("fp32", "bf16", "int8"):
                    print(side, f"generate, {dtype}, {model.config}", flush=True)
                    generate(model, dtype)
            print(side, "a step of the optimiser", flush=True)
            move_weights()
        seen |= guard.seen
    print(*sorted(seen))


def violate(side: str) -> None:
    """Uses a guarded tensor, then accesses a byte next to it."""
    x = guarded(torch.zeros(3, 5), side)
    print(f"{x.fill_(1.0).sum():g}", flush=True)
    ctypes.string_at(x.data_ptr() + (60 if side == "behind" else -1), 1)


def run_child(argument: str) -> tuple[int, list[str]]:
    command = [sys.executable, __file__, argument]
    env = {**os.environ, "PYTHONPATH": str(Path(gptfast.__file__).parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.splitlines() + done.stderr.splitlines()


needs_guard = pytest.mark.skipif(no_guard_reason() is not None, reason=str(no_guard_reason()))


@needs_guard
@pytest.mark.parametrize("side", SIDES)
def test_an_access_beside_a_guarded_tensor_ends_the_process(side: str) -> None:
    code, lines = run_child(side)
    assert (code, lines) == (-signal.SIGSEGV, ["15"])


@needs_guard
def test_operators_stay_within_their_tensors(isa: str) -> None:
    code, lines = run_child(isa)
    assert code != -signal.SIGSEGV, f"an access beside a tensor: {lines[-1]}"
    assert code == 0, "\n".join(lines[-20:])
    known = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gptfast::")}
    assert set(lines[-1].split()) == known


if __name__ == "__main__":
    torch.manual_seed(1)
    (violate if sys.argv[1] in SIDES else run_all)(sys.argv[1])
