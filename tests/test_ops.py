"""The operators' schemas, fakes and mutation, and the package without optional parts."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import GPT, BackendError, GPTConfig, ops
from gptfast.ops import adamw, select
from gptfast.ops.arguments import Argument, Kind, Table, activation, parameter

# Not a skip of the module: test_triton.py, which needs no extension, takes its cases from here.
pytestmark = pytest.mark.skipif(select.extension() is None, reason=f"{select.extension_error}")

INTERNAL = (adamw.adamw_,)  # no public operation calls it; the import defines it

R = torch.randn
SEED = torch.tensor(7)


def heads(T: int) -> Tensor:
    return R(2, T, 3, 16).transpose(1, 2)  # (B, H, T, D), dense but not contiguous


def cases(device: torch.device | str = "cpu") -> dict[str, tuple[Any, ...]]:
    """Returns arguments for every operator in the namespace, made on this device."""
    with torch.device(device):
        return _cases()


def _cases() -> dict[str, tuple[Any, ...]]:
    q, k, v = heads(9), heads(9), heads(9)
    out, lse = torch.ops.gptfast.attention(q, k, v, 0.25, 0.1, SEED, 1)
    x, ln_w, ln_b, weight, bias = R(2, 9, 32), R(32), R(32), R(20, 32), R(20)
    y, mean, rstd = torch.ops.gptfast.linear(x, ln_w, ln_b, weight, bias, None)
    block = (ln_w, None, R(96, 32), R(96), R(32, 32), None)
    _, *kept = torch.ops.gptfast.self_attention(x, *block, 2, 0.1, 3, 0.1, SEED, 1, True)
    ffn = (ln_w, None, R(64, 32), R(64), R(32, 64), R(32))
    y2, mean2, rstd2, hidden = torch.ops.gptfast.ffn(x, *ffn, "erf", 0.1, SEED, 2, True)
    idx = torch.randint(5, (2, 9))
    tables = (R(5, 32), R(12, 32))
    return {
        "attention": (q, k, v, 0.25, 0.1, SEED, 1),
        "attention_backward": (R(2, 9, 3, 16), q, k, v, out, lse, 0.25, 0.1, SEED, 1),
        "self_attention": (x, *block, 4, 0.1, 3, 0.1, SEED, 1, False),
        "self_attention_backward":
            (R(2, 9, 32), x, *block, *kept, 2, 0.1, 3, 0.1, SEED, 1, 0b1111111),
        "linear": (x.transpose(0, 1), ln_w, ln_b, weight, bias, None),
        "linear_backward": (R(2, 9, 20), x, ln_w, ln_b, mean, rstd, weight, None, 0b11101),
        "ffn": (x, *ffn, "tanh", 0.1, SEED, 2, False),
        "ffn_backward": (R(2, 9, 32), x, *ffn, mean2, rstd2, hidden, "erf", 0.1, SEED, 2, 0b100101),
        "linear_cross_entropy": (x, ln_w, ln_b, R(5, 32), idx, R(2, 9), -100, "mean", 0.1, 0b1011),
        "embedding": (idx, *tables, 0.1, SEED, 0, torch.bfloat16),
        "embedding_backward": (R(2, 9, 32), idx, *tables, 0, 0.1, SEED, 0, 0b11),
        "adamw_": (*([R(20), R(3, 5)] for _ in range(3)), [R(20).abs(), R(3, 5).abs()],
            [torch.ones(()), torch.ones(())], [R(20), R(3, 5)], [0.1, 0.0],
            1e-3, 0.9, 0.99, 1e-8, 1.0, 0.9),
    }  # fmt: skip


NAMES = (
    "attention attention_backward self_attention self_attention_backward"
    " linear linear_backward ffn ffn_backward linear_cross_entropy embedding embedding_backward"
    " adamw_"
).split()


def test_every_operator_has_a_case() -> None:
    defined = {name.removeprefix("gptfast::") for name in torch._C._dispatch_get_all_op_names()
               if name.startswith("gptfast::")}  # fmt: skip
    assert defined == set(NAMES) == set(cases())


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    torch.manual_seed(0)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.gptfast, name).default, cases()[name], test_utils=tests)


@pytest.mark.parametrize("name", NAMES)
def test_operators_check_what_they_are_called_with(name: str) -> None:
    arguments = list(cases()[name])
    wrong = [i for i, each in enumerate(arguments) if isinstance(each, Tensor) and each.dim() > 0]
    for i in wrong:
        bad = [*arguments[:i], arguments[i].to(torch.float64), *arguments[i + 1 :]]
        with pytest.raises(RuntimeError, match=rf"gptfast::{name}: \w+ must"):
            getattr(torch.ops.gptfast, name)(*bad)


def test_empty_weights_are_refused() -> None:
    x, none = R(3, 8), torch.zeros(3, dtype=torch.int64)
    for call in (
        lambda: ops.linear_residual(x, R(0, 8), None, R(3, 0)),
        lambda: ops.linear_residual(R(3, 0), R(8, 0), None, x),
        lambda: ops.linear_cross_entropy(x, R(0, 8), none),
        lambda: ops.layer_norm_ffn(x, R(8), None, R(0, 8), None, R(8, 0), None),
    ):
        with pytest.raises(RuntimeError, match="neither . nor . 0"):
            call()


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_what_is_not_a_number_is_not_hidden(isa: str, bad: float) -> None:
    q, k, v = R(1, 1, 20, 16), R(1, 1, 20, 16), R(1, 1, 20, 16)
    q[0, 0, 7] = bad
    for op in (ops, ops.reference):
        out = op.causal_attention(q, k, v)[0, 0]
        assert out[7].isnan().all() and torch.isfinite(out[:7]).all()
    x, weight, targets = R(40, 16), R(30, 16), torch.randint(30, (40,))
    weight[11, 3] = bad
    for op in (ops, ops.reference):
        assert not op.linear_cross_entropy(x, weight, targets).isfinite()
    x[5, 2] = bad
    for op in (ops, ops.reference):
        assert not op.layer_norm_linear(x, R(16), None, R(8, 16), None)[5].isfinite().any()


@pytest.mark.parametrize("word", (0x7FC00001, 0x7F800001, 0xFFFFFFFF))
def test_any_kind_of_nan_is_not_hidden(isa: str, word: int) -> None:
    bad = torch.tensor(word - 2**32 if word >> 31 else word, dtype=torch.int32).view(torch.float32)
    for T in (5, 20, 200):
        q, k, v = R(1, 1, T, 8), R(1, 1, T, 8), R(1, 1, T, 8)
        k[0, 0, 3, 3] = bad
        out = ops.causal_attention(q, k, v)[0, 0]
        assert out[3:].isnan().all() and torch.isfinite(out[:3]).all()
    x, weight, targets = R(20, 8), R(30, 8), torch.arange(10).repeat(2)
    weight[11, 3] = bad  # of no target
    assert ops.linear_cross_entropy(x, weight, targets).isnan()


def test_the_norm_of_a_constant_row_is_its_bias(isa: str) -> None:
    x = (100 + 0.3 * R(100, 1)).expand(100, 384).contiguous()
    for dtype in (torch.float32, torch.bfloat16):
        ours = ops.layer_norm_linear(x.to(dtype), torch.ones(384), None, torch.eye(384), None)
        assert (ours == 0).all()


def test_a_gradient_that_is_not_there_gives_none() -> None:
    class Stops(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> None:
            return None

    x, heads_of = R(2, 9, 32, requires_grad=True), R(2, 3, 9, 16, requires_grad=True)
    ln_w, w_qkv, w, w1 = R(32), R(96, 32), R(32, 32), R(64, 32)
    idx, table = torch.zeros(2, 9, dtype=torch.int64), R(5, 8, requires_grad=True)
    for out in (
        ops.causal_attention(heads_of, heads_of, heads_of),
        ops.layer_norm_attention(x, ln_w, None, w_qkv, None, w, None, n_head=2),
        ops.layer_norm_linear(x, ln_w, None, w, None),
        ops.linear_residual(x, w, None, R(2, 9, 32)),
        ops.layer_norm_ffn(x, ln_w, None, w1, None, w1.t().contiguous(), None),
        ops.embedding(idx, table, R(9, 8)),
        ops.linear_cross_entropy(x, w, idx),
        ops.linear_cross_entropy(x, w, idx, reduction="none"),
    ):
        Stops.apply(out).sum().backward()
    assert x.grad is heads_of.grad is table.grad is None


def test_numbers_of_a_wrong_kind_are_refused_by_name() -> None:
    q, x, idx = R(1, 1, 4, 8), R(1, 4, 8), torch.zeros(1, 4, dtype=torch.int64)
    block = (R(8), None, R(24, 8), None, R(8, 8), None)
    whole, tables = r"must be a whole number \(int64\), got", (R(5, 8), R(4, 8))
    calls: dict[str, Any] = {
        "layer_norm_attention: n_head " + whole: lambda: ops.layer_norm_attention(
            x,
            *block,
            n_head=2.0,  # type: ignore[arg-type]
        ),
        "causal_attention: stream " + whole: lambda: ops.causal_attention(q, q, q, stream=2**70),
        "embedding: padding_idx " + whole: lambda: ops.embedding(
            idx,
            *tables,
            padding_idx=1.5,  # type: ignore[arg-type]
        ),
        "linear_cross_entropy: ignore_index " + whole: lambda: ops.linear_cross_entropy(
            x,
            R(5, 8),
            idx,
            ignore_index=None,  # type: ignore[arg-type]
        ),
        "embedding: dtype must be a torch.dtype, got 'float32'": lambda: ops.embedding(
            idx,
            *tables,
            dtype="float32",  # type: ignore[arg-type]
        ),
        "causal_attention: dropout_p must be a number, got None": lambda: ops.causal_attention(
            q,
            q,
            q,
            dropout_p=None,  # type: ignore[arg-type]
        ),
        "causal_attention: scale must be a number, got tensor": lambda: ops.causal_attention(
            q,
            q,
            q,
            scale=torch.ones(2),  # type: ignore[arg-type]
        ),
        "linear_cross_entropy: label_smoothing must be a number": lambda: ops.linear_cross_entropy(
            x,
            R(5, 8),
            idx,
            label_smoothing="x",  # type: ignore[arg-type]
        ),
    }
    for message, call in calls.items():
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(BackendError, match="float32 and bfloat16, not float16"):
        ops.embedding(idx, *tables, dtype=torch.float16)


def test_a_seed_has_a_value_where_new_tensors_have_none() -> None:
    q = R(1, 1, 8, 8)
    expected = ops.causal_attention(q, q, q, dropout_p=0.5, seed=3)
    with torch.device("meta"):
        assert torch.equal(ops.causal_attention(q, q, q, dropout_p=0.5, seed=3), expected)
        assert torch.isfinite(ops.causal_attention(q, q, q, dropout_p=0.5)).all()


def test_what_has_no_dimensions_is_refused_by_name() -> None:
    x, scalar, none, F = R(3, 8), torch.tensor(1.0), torch.zeros(3, dtype=torch.int64), R(6, 8)
    empty, heads_of = r"must have at least 1 dimension, got shape \(\)", R(1, 1, 4, 8)
    flat = r"must have 2 dimensions, got shape \(\)"
    calls: dict[str, Any] = {
        f"layer_norm_linear: x {empty}": lambda: ops.layer_norm_linear(scalar, R(8), None, F, None),
        f"linear_residual: x {empty}": lambda: ops.linear_residual(scalar, F, None, x),
        f"layer_norm_ffn: x {empty}": lambda: ops.layer_norm_ffn(
            scalar, R(8), None, F, None, F, None
        ),
        f"linear_cross_entropy: x {empty}": lambda: ops.linear_cross_entropy(scalar, F, none),
        f"layer_norm_linear: weight {flat}": lambda: ops.layer_norm_linear(
            x, R(8), None, scalar, None
        ),
        f"linear_residual: weight {flat}": lambda: ops.linear_residual(x, scalar, None, x),
        f"layer_norm_ffn: w1 {flat}": lambda: ops.layer_norm_ffn(
            x, R(8), None, scalar, None, F, None
        ),
        f"linear_cross_entropy: weight {flat}": lambda: ops.linear_cross_entropy(x, scalar, none),
        f"embedding: wpe {flat}": lambda: ops.embedding(none[None], F, scalar),
        r"causal_attention: k must have 4 dimensions, got shape \(\)": lambda: ops.causal_attention(
            heads_of, scalar, heads_of
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_table_tells_what_it_expects() -> None:
    table = Table(
        "op",
        x=activation("... C"),
        w=parameter("3C C"),
        b=parameter("3C", optional=True),
        y=activation("..."),
        i=Argument(Kind.INDICES, "N C"),
    )
    x, w, y, i = R(2, 5, 4), R(12, 4), R(2, 5), torch.zeros(7, 4, dtype=torch.int64)
    sizes = table.check(x, w, None, y, i)
    assert (sizes["C"], sizes["N"], tuple(sizes["..."])) == (4, 7, (2, 5))
    assert table._check_each((x, w, None, y, i)).items() >= sizes.items()
    wrong: dict[str, tuple[Any, ...]] = {
        r"w must have shape \(12, 4\), got \(4, 4\)": (x, R(4, 4), None, y, i),
        r"b must have shape \(12,\), got \(4,\)": (x, w, R(4), y, i),
        r"y must have shape \(2, 5\), got \(5,\)": (x, w, None, R(5), i),
        r"i must have shape \(7, 4\), got \(7, 3\)": (x, w, None, y, i[:, :3]),
        r"i must have 2 dimensions, got shape \(7,\)": (x, w, None, y, i[:, 0]),
        r"w must be contiguous, got strides \(1, 12\)": (x, R(4, 12).t(), None, y, i),
        r"x must be a floating-point tensor, got torch.int64": (x.long(), w, None, y, i),
        r"w must be torch.float32 or torch.bfloat16, got": (x.bfloat16(), w.double(), None, y, i),
        r"y must be torch.float32, got torch.int64": (x, w, None, y.long(), i),
        r"i must be torch.int64, got torch.float32": (x, w, None, y, R(7, 4)),
        r"i must be on cpu, got meta": (x, w, None, y, i.to("meta")),
    }
    for message, tensors in wrong.items():
        with pytest.raises((TypeError, ValueError), match=f"^op: {message}"):
            table.check(*tensors)


def test_what_is_no_tensor_is_refused_by_name() -> None:
    x, F, q = R(3, 8), R(6, 8), R(1, 1, 4, 8)
    none = torch.zeros(3, dtype=torch.int64)
    calls: dict[str, Any] = {
        "causal_attention: k must be a tensor, got list": lambda: ops.causal_attention(q, [1], q),
        "causal_attention: v must be a tensor, got NoneType": lambda: ops.causal_attention(
            q, q, None
        ),
        "linear_residual: weight must be a tensor, got int": lambda: ops.linear_residual(
            x, 1, None, x
        ),
        "layer_norm_linear: ln_w must be a tensor, got float": lambda: ops.layer_norm_linear(
            x, 1.0, None, F, None
        ),
        "linear_cross_entropy: targets must be a tensor, got list": lambda: (
            ops.linear_cross_entropy(x, F, [0, 1, 2])
        ),
        "embedding: idx must be a tensor, got list": lambda: ops.embedding([[1]], F, F),
    }
    for message, call in calls.items():
        with pytest.raises(TypeError, match=message):
            call()
    assert ops.linear_cross_entropy(x, F, none).isfinite()


FROZEN: dict[str, Any] = {
    "layer_norm_linear": (ops.layer_norm_linear, R(5, 8), R(8), R(8), R(6, 8), R(6)),
    "linear_residual": (ops.linear_residual, R(5, 8), R(6, 8), R(6), R(5, 6)),
    "layer_norm_attention": (
        lambda *inputs: ops.layer_norm_attention(*inputs, n_head=2),
        R(2, 5, 8), R(8), R(8), R(24, 8), R(24), R(8, 8), R(8),
    ),
    "layer_norm_ffn": (ops.layer_norm_ffn, R(5, 8), R(8), R(8), R(32, 8), R(32), R(8, 32), R(8)),
    "linear_cross_entropy": (
        lambda x, weight, ln_w, ln_b: ops.linear_cross_entropy(
            x, weight, torch.arange(5), ln_w=ln_w, ln_b=ln_b
        ),
        R(5, 8), R(6, 8), R(8), R(8),
    ),
    "causal_attention": (ops.causal_attention, R(1, 2, 7, 8), R(1, 2, 7, 8), R(1, 2, 7, 8)),
    "embedding": (
        lambda wte, wpe: ops.embedding(torch.tensor([[1, 0, 3]]), wte, wpe), R(4, 8), R(3, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_frozen_gets_no_gradient_and_changes_none(isa: str, name: str) -> None:
    op, *inputs = FROZEN[name]

    def gradients(frozen: set[int]) -> list[Tensor | None]:
        leaves = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
        op(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    whole = gradients(set())
    assert all(grad is not None for grad in whole)
    everything = set(range(len(inputs)))
    for frozen in [{i} for i in everything] + [everything - {i} for i in everything]:
        for i, (grad, expected) in enumerate(zip(gradients(frozen), whole, strict=True)):
            assert (grad is None) if i in frozen else torch.equal(grad, expected)


def run_python(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_reference_runs_without_the_extension_and_says_why() -> None:
    code = """
import sys
for blocked in ("gptfast._C", "triton", "matplotlib"):
    sys.modules[blocked] = None
import torch, gptfast
model = gptfast.GPT(gptfast.GPTConfig(block_size=8, vocab_size=5, n_embd=16))
print(len(gptfast.generate(model, [[1]], max_new_tokens=12)[0].tokens))
model.loss(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)).backward()
model.backend = "fused"
try:
    model(torch.ones(1, 4, dtype=torch.int64))
except gptfast.BackendError as error:
    print(error)
"""
    count, message = run_python(code).splitlines()
    assert count == "12" and "the compiled extension cannot be loaded" in message


def test_python_threads_share_the_processors() -> None:
    torch.set_num_threads(8)  # more than most machines have, for each Python thread
    model = GPT(GPTConfig(block_size=48, vocab_size=30, n_layer=2, n_head=2, n_embd=64)).eval()
    idx = torch.randint(1, 30, (9, 48))

    def gradients(_: int) -> list[Tensor]:
        return list(torch.autograd.grad(model.loss(idx, idx), list(model.parameters())))

    alone = gradients(0)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(gradients, range(12)):
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_import_needs_no_optional_package() -> None:
    optional = "{'triton', 'matplotlib', 'tokenizers'}"
    code = f"import sys, gptfast; print(sorted({optional} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"


def test_ops_have_the_references_names() -> None:
    names = set(ops.__all__) - {"reference"}
    assert all(callable(getattr(ops.reference, name)) for name in names)


def test_a_gpu_without_triton_is_an_error_that_names_the_extra() -> None:
    code = """
import sys
sys.modules["triton"] = None
import gptfast, torch
from gptfast.ops import select
try:
    select.require_fused("layer_norm_ffn", "cuda", torch.float32)
except gptfast.BackendError as error:
    print(error)
"""
    message = run_python(code)
    assert message.startswith("layer_norm_ffn: the fused kernels cannot run: they need Triton")
    assert "pip install 'gptfast-kernels[gpu]'" in message
