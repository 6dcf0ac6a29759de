"""Calls the GPU's kernels on small tensors of odd sizes, for NVIDIA's compute-sanitizer.

`compute-sanitizer --tool memcheck python tests/sanitize_gpu.py` finds reads and writes past a
tensor, `--tool racecheck` races in shared memory. Arguments are names of cases; without one, all
are run. A case returns what it computed. It runs three times, because an operator's second call is
recorded and its third one goes by plan. Each tensor has memory of its own: torch's cache of memory
would hide an overrun. So nothing may be captured as a graph.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import gptfast
from gptfast import GPT, GPTConfig, TrainConfig, Trainer, ops

DEVICE, T, V = "cuda", 70, 67  # T: a tile of 64 and a part of one; V is odd
MANY = 1031  # tokens, whose gradients are gathered and not multiplied
CALLS = 3
SHORT = 33  # a tile of 32 and one row


def gradients_of(y: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Returns a result and the gradients of its sum."""
    return [y.detach(), *torch.autograd.grad(y.sum(), inputs)]


def attention(D: int) -> list[Tensor]:
    """Attention of D columns, forward and backward, with dropout, in both dtypes."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (
            torch.randn(1, 2, T, D, device=DEVICE, dtype=dtype).requires_grad_() for _ in range(3)
        )
        found += gradients_of(ops.causal_attention(q, k, v, dropout_p=0.1, seed=1), q, k, v)
    return found


def ffn() -> list[Tensor]:
    """LN and FFN, forward and backward, with dropout; sizes with and without descriptors."""
    found = []
    for C in (64, 20):
        x, ln_w, w1, w2 = (
            torch.randn(*size, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
            for size in ((SHORT, C), (C,), (4 * C, C), (C, 4 * C))
        )
        y = ops.layer_norm_ffn(x, ln_w, None, w1, None, w2, None, dropout_p=0.1, seed=1)
        found += gradients_of(y, x, ln_w, w1, w2)
    return found


def embedding() -> list[Tensor]:
    """The gradient of an embedding of many tokens, whose rows are sorted by token."""
    wte, wpe = (torch.randn(n, 20, device=DEVICE).requires_grad_() for n in (MANY, SHORT))
    idx = torch.randint(MANY, (2, SHORT), device=DEVICE)
    return gradients_of(ops.embedding(idx, wte, wpe, dropout_p=0.1, seed=1), wte, wpe)


def loss() -> list[Tensor]:
    """Loss with gradients, of a row length that is no multiple of 16 bytes."""
    x, weight = (
        torch.randn(n, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for n in (T, V)
    )
    targets = torch.randint(V, (T,), device=DEVICE)
    return gradients_of(ops.linear_cross_entropy(x, weight, targets), x, weight)


def model_of(head_dim: int) -> GPT:
    """A small model with two heads."""
    sizes = GPTConfig(
        block_size=SHORT, vocab_size=V, n_layer=1, n_head=2, n_embd=2 * head_dim, dropout=0.1
    )
    return GPT(sizes, backend="fused").to(DEVICE)


def train() -> list[Tensor]:
    """A whole step in bfloat16: embedding, layers, loss, clipping and AdamW."""
    found = []
    for head_dim in (32, 64):
        trainer = Trainer(model_of(head_dim), TrainConfig(precision="bf16", graph="off"))
        idx = torch.randint(V, (2, SHORT), device=DEVICE)
        found += [trainer.step(idx, idx), *trainer.parameters]
    return found


def generate() -> list[Tensor]:
    """A prefill and a decode step, with all kinds of sampling, of fewer texts than slots."""
    model, prompts = model_of(32).eval(), [[1, 2, 3], [4], [5] * 20]
    options = {"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1}
    found = []
    for dtype in ("bf16", "fp32"):
        results = gptfast.generate(model, prompts, max_new_tokens=1, dtype=dtype, **options)  # type: ignore[arg-type]
        found += [torch.tensor(each.logprobs) for each in results]
    return found


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "attention-32": functools.partial(attention, 32),
    "attention-64": functools.partial(attention, 64),
    "ffn": ffn,
    "embedding": embedding,
    "loss": loss,
    "train": train,
    "generate": generate,
}


def main(names: Sequence[str]) -> int:
    """Runs the cases."""
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # which torch reads at its first allocation
    for name in names or CASES:
        for _ in range(CALLS):
            CASES[name]()
        torch.cuda.synchronize()
        print(f"{name}: done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
