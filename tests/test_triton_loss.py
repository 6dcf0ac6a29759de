"""The Triton kernels of the loss and of the embedding by blocks, and how many they launch.

tests/test_triton.py has the cases that need no more than the public functions.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import test_triton
import torch
from launches import Launches
from test_cross_entropy import norm_case
from test_embedding import fused, plain, tables
from test_triton import DEVICE, DTYPES, there
from torch import Tensor
from torch.nn import functional as F

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing import check_op

triton = pytest.importorskip("triton")
from gptfast.ops.triton import cross_entropy, embedding  # noqa: E402

where = test_triton.where
pytestmark = test_triton.needs_numbers


def few_rows(monkeypatch: pytest.MonkeyPatch, rows: int = 16) -> None:
    """Makes blocks of `rows` rows."""
    monkeypatch.setattr(cross_entropy, "ROWS_MULTIPLE", rows)
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("M", (1, 15, 16, 17, 40))
def test_loss_in_blocks_of_rows(
    M: int, reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_rows(monkeypatch)
    monkeypatch.setattr(cross_entropy, "ROW_BYTES", 256)
    inputs = there(*norm_case(M, 48, 150))
    assert inputs[2] is not None
    inputs[2][1::3] = -100

    def reduced(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, targets: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return op(x, weight, targets, ln_w=w, ln_b=b, reduction=reduction)

        return call

    def torch_own(x: Tensor, weight: Tensor, targets: Tensor, w: Tensor, b: Tensor) -> Tensor:
        logits = F.linear(F.layer_norm(x, x.shape[-1:], w, b), weight).float()
        return F.cross_entropy(logits, targets, reduction=reduction)

    both = reduced(ops.linear_cross_entropy), reduced(reference.linear_cross_entropy)
    check_op(*both, torch_own, inputs, dtype)


def test_weights_of_tokens_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for each in ("whole", "blocks"):
        if each == "blocks":
            few_rows(monkeypatch)
            monkeypatch.setattr(cross_entropy, "COUNT_READS", 0)  # a kernel counts the targets
        x, weight, targets, ln_w, ln_b = norm_case(60, 48, 300)
        targets[::4] = -100
        token_weights = torch.linspace(0.0, 2.0, 60, device=DEVICE)
        leaves = [t.to(DEVICE).requires_grad_() for t in (x, weight, ln_w, ln_b)]
        loss = ops.linear_cross_entropy(
            *leaves[:2], targets.to(DEVICE), ln_w=leaves[2], ln_b=leaves[3],
            token_weights=token_weights,
        )  # fmt: skip
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "reduction"), ((15, "none"), (40, "mean")))
def test_label_smoothing_in_blocks_of_rows(
    M: int, reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_rows(monkeypatch)
    monkeypatch.setattr(cross_entropy, "ROW_BYTES", 256)
    inputs = there(*norm_case(M, 48, 150)[:3])
    assert inputs[2] is not None
    inputs[2][1::3] = -100

    def torch_own(x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets, **options)

    both = ops.linear_cross_entropy, reference.linear_cross_entropy
    check_op(*both, torch_own, inputs, dtype, reduction=reduction, label_smoothing=0.3)


@pytest.mark.parametrize("V", (5, 300))
def test_logits_of_minus_infinity(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "ROW_BYTES", 256)
    x, weight = torch.ones(3, 16, device=DEVICE), torch.zeros(V, 16, device=DEVICE)
    weight[: V - 2] = -torch.inf  # more than the first block of columns
    targets = torch.full((3,), V - 1, device=DEVICE)
    loss = ops.linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(loss.cpu(), torch.tensor(2.0).log())
    for smoothing in (0.0, 0.1):  # the target's logit, too, or one that a smoothed target has
        wrong = ops.linear_cross_entropy(x, weight, 0 * targets, label_smoothing=smoothing)
        assert wrong == torch.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", (0.0, 0.2))
@pytest.mark.parametrize("V", (62, 64, 65, 126, 129, 190, 257))
def test_whole_blocks_of_columns_and_the_last_one(
    V: int, smoothing: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "ROW_BYTES", 256)
    x, weight, _, _, _ = norm_case(V, 48, V)
    targets = torch.arange(V)  # each column is a target once
    targets[1::7] = -100
    inputs = there(x, weight, targets)

    def torch_own(x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets, **options)

    both = ops.linear_cross_entropy, reference.linear_cross_entropy
    check_op(*both, torch_own, inputs, dtype, label_smoothing=smoothing)


@pytest.mark.parametrize("value", (torch.inf, -100.0))
def test_gradients_of_rows_that_do_not_count_are_0(value: float) -> None:
    """Also where the logits are infinite, or exp(s_j - 0) would not be small."""
    x, weight, targets, _, _ = norm_case(4, 16, 300)
    x[1], targets[1] = value, -100
    leaves = [t.to(DEVICE).requires_grad_() for t in (x, weight.abs())]
    loss = ops.linear_cross_entropy(*leaves, targets.to(DEVICE))
    dx, dweight = torch.autograd.grad(loss, leaves)
    assert torch.isfinite(loss) and torch.isfinite(dx).all() and (dx[1] == 0).all()
    assert value == torch.inf or torch.isfinite(dweight).all()  # 0 times inf is NaN in a product


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
@pytest.mark.parametrize(
    ("B", "T", "V", "C"), ((1, 1, 2, 8), (2, 5, 130, 16), (9, 33, 66, 40), (70, 3, 130, 140))
)
def test_embedding_of_a_large_vocabulary(
    B: int, T: int, V: int, C: int, dropout_p: float, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(embedding, "ONE_HOT", 0)
    monkeypatch.setattr(embedding, "ORDER_BLOCK", 64)
    monkeypatch.setattr(embedding, "TILE", 16)
    idx = torch.randint(V, (B, T), generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    idx[0, 0] = 0
    options = {"padding_idx": 0, "dropout_p": dropout_p, "seed": 3}
    check_op(fused, plain, plain, there(*tables(V, 40, C), idx), dtype, **options)


def test_rows_are_ordered_by_token() -> None:
    V, M = 300, 1000
    idx = torch.randint(V, (M,), generator=torch.Generator().manual_seed(1)) // 7 * 7
    idx[5:400] = 140  # more rows of one token than a program lists at a time
    idx = idx.to(DEVICE)
    lists, order = torch.empty(2, M, dtype=torch.int32, device=DEVICE)
    starts = torch.empty(V + 1, dtype=torch.int32, device=DEVICE)
    sizes = {"TOKENS": 128, "BLOCK": 256, "TILE": 64}
    embedding.order_kernel[(triton.cdiv(V, 128),)](idx, lists, order, starts, M, V, **sizes)
    tokens, expected = idx.sort(stable=True)
    assert torch.equal(order.long(), expected)
    bounds = torch.arange(V + 1, device=DEVICE)
    assert torch.equal(starts.long(), torch.searchsorted(tokens, bounds))


def launched(monkeypatch: pytest.MonkeyPatch, kernel: Any, *args: Any) -> list[str]:
    with Launches(monkeypatch) as launches:
        kernel(*args)
    return launches.names


def test_launches_of_the_loss(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "cuda":
        pytest.skip("counted in the interpreter")
    x, weight, targets, ln_w, ln_b = norm_case(64, 32, 65)
    args: Any = (x, ln_w, ln_b, weight, targets, None, -100, "mean", 0.0, 0b1111)
    names = launched(monkeypatch, cross_entropy.linear_cross_entropy, *args)
    # In two bytes cast_kernel comes first, which also pads the weight.
    assert names[:6] == ["layer_norm_kernel", "addmm", "loss_kernel", "addmm", "addmm", "sum"]
    assert names[6] == "norm_grad_kernel" and len(names) <= 9


@pytest.mark.parametrize(("one_hot", "most"), ((embedding.ONE_HOT, 2), (0, 4)))
def test_launches_of_the_embedding(
    one_hot: int, most: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "cuda":
        pytest.skip("counted in the interpreter")
    monkeypatch.setattr(embedding, "ONE_HOT", one_hot)
    (wte, wpe), seed = tables(65, 40, 16), torch.tensor(1)
    idx = torch.ones(2, 33, dtype=torch.int64)
    args: Any = (idx, wte, wpe, 0.2, seed, 0, torch.float32)
    assert launched(monkeypatch, embedding.embedding, *args) == ["embedding_kernel"]
    backward: Any = (torch.ones(2, 33, 16), idx, wte, wpe, -1, 0.2, seed, 0, 0b11)
    assert len(launched(monkeypatch, embedding.embedding_backward, *backward)) <= most


OUT_OF_RANGE = """
import torch
from gptfast import ops
wte, idx = torch.randn(7, 16, device="cuda"), torch.ones(2, 7, dtype=torch.int64, device="cuda")
calls = {
    "embedding": lambda: ops.embedding(idx, wte, wte),
    "loss": lambda: ops.linear_cross_entropy(wte, wte, idx[0]),
}
call = calls["%s"]
call()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    call()
graph.replay()
torch.cuda.synchronize()
print("as it should be", flush=True)
idx[0, 3] = 7
graph.replay()
torch.cuda.synchronize()
print("not noticed")
"""


@pytest.mark.parametrize("op", ("embedding", "loss"))
def test_an_index_out_of_range_stops_a_captured_step(op: str, where: str) -> None:
    if where != "cuda":
        pytest.skip("needs a GPU")
    command = [sys.executable, "-c", OUT_OF_RANGE % op]
    found = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True)
    assert found.returncode != 0 and found.stdout.split("\n")[0] == "as it should be", found.stderr
    assert "not noticed" not in found.stdout
    assert "must be in [0, vocab_size)" in found.stderr
