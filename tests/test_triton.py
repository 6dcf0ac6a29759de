"""The Triton kernels against the float64 oracle, in Triton's interpreter if there is no GPU.

In the interpreter they run on CPU tensors in place of the compiled kernels, so that the public
functions are tested. A process can use either the interpreter or the compiler: with a GPU, the
cases marked `cuda` run and the others are skipped.
"""

import functools
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import bench_attention
import fake_cuda
import numpy as np
import pytest
import sanitize_gpu
import torch
from peers import ffn as torch_ffn
from small_models import model_of
from test_attention import check_attention, check_large_scores, check_overflow, heads
from test_cross_entropy import (
    case,
    norm_case,
    torch_linear_cross_entropy,
    torch_norm_linear_cross_entropy,
    with_norm,
)
from test_embedding import fused, plain, tables
from test_ffn import block
from test_linear import normal, torch_layer_norm_linear, torch_linear_residual
from test_ops import cases
from test_self_attention import (
    PROJ_DROPOUT,
    assert_bits_of_parts,
    attention_block,
    by_parts,
    torch_layer_norm_attention,
)
from torch import Tensor
from torch.nn import functional as F

from gptfast import GPT, BackendError, DataError, GPTConfig, ops
from gptfast.generation import make_request
from gptfast.generation.reference_loop import ReferenceLoop
from gptfast.model import Backend
from gptfast.ops import reference, select
from gptfast.ops.random import dropout_factors
from gptfast.ops.sampling import Sampling, choose, draws
from gptfast.testing import check_op, run

triton = pytest.importorskip("triton")
from gptfast.generation import device_loop  # noqa: E402
from gptfast.ops import triton as kernels  # noqa: E402
from gptfast.ops.triton import (  # noqa: E402
    attention,
    attention_backward,
    cross_entropy,
    decode,
    launch,
    rows,
)
from gptfast.ops.triton.sampling import kind_of, numbers_of, sample  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def full(*values: Any) -> Any:
    """Marks the values of a case that a GPU, which compiles for each, runs only with --full."""
    return pytest.param(*values, marks=pytest.mark.full)


every_dtype = pytest.mark.parametrize(
    "dtype", (torch.float32, full(torch.float16), torch.bfloat16), ids=str
)


CUDA_ONLY = pytest.param("cuda", marks=pytest.mark.cuda)
# For a test whose course depends on numbers, which fake tensors do not have.
needs_numbers = pytest.mark.parametrize("where", ("interpreter", CUDA_ONLY), indirect=True)


@pytest.fixture(autouse=True, params=("interpreter", "fake", CUDA_ONLY))
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the kernels in the interpreter, not at all (see fake_cuda.py), or on a GPU."""
    kind = request.param
    if (kind == "cuda") != CUDA:
        pytest.skip("Triton compiles on this machine" if CUDA else "torch finds no CUDA device")
    if kind == "fake":
        monkeypatch.setattr(sys.modules[__name__], "DEVICE", fake_cuda.DEVICE)
        dtype = request.node.callspec.params.get("dtype", torch.float32)
        if dtype != torch.float32 or request.node.get_closest_marker("full"):
            pytest.skip("other cases are on the same devices")
        with fake_cuda.on_fake_cuda(kernels.KERNELS):
            yield kind
        return
    if kind == "cuda":
        yield kind
        return
    if request.node.callspec.params.get("dtype") == torch.bfloat16:
        pytest.skip("the interpreter's products of bfloat16 are wrong (triton issue 11584)")
    monkeypatch.setitem(select.FUSED_DTYPES, "cpu", DTYPES)
    monkeypatch.setattr(select, "extension_error", None)  # these kernels need no extension
    library = torch.library.Library("gptfast", "IMPL")
    for name, kernel in kernels.KERNELS.items():
        library.impl(name, kernel, "CPU", allow_override=True)
    yield kind
    library._destroy()


def there(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.to(DEVICE) for x in tensors]


def test_masks_have_the_bits_of_the_reference() -> None:
    x, seed = torch.ones(77, 300, device=DEVICE), torch.tensor(2**61 + 12345)
    for p, stream in ((0.2, 3), (0.5, 2**32 - 5), (1.0, 0)):
        dropout = {
            "seed": seed.to(DEVICE), "substream": stream, "threshold": int(p * 65536 + 0.5),
            "keep_scale": 1 / (1 - int(p * 65536 + 0.5) / 65536) if p < 1 else 0.0,
        }  # fmt: skip
        got = rows.dropped(x, dropout)
        assert torch.equal(got, dropout_factors(p, seed, stream, 1, 77, 300)[0].to(got))


@every_dtype
@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
@pytest.mark.parametrize(
    ("T", "D"), ((1, 16), full(5, 8), (17, 33), (70, 64), full(129, 100), (100, 256))
)
def test_attention(T: int, D: int, dropout_p: float, dtype: torch.dtype) -> None:
    q, k, v = (heads(2, 2, T, D, seed=i).to(DEVICE) for i in range(3))
    if T == 1:  # the only weight is 1, with gradient 0; test_attention.py bounds the rounding
        out = ops.causal_attention(q.to(dtype), k.to(dtype), v.to(dtype))
        # Three products of tf32, which keep 22 of 24 bits, stand for one of float32 on NVIDIA.
        rtol = 4 * torch.finfo(dtype).eps if CUDA and dtype == torch.float32 else 0.0
        assert torch.allclose(out, v.to(dtype), rtol=rtol, atol=0.0)
        return
    check_attention(q, k, v, dtype, dropout_p=dropout_p, seed=5, stream=3)


@pytest.mark.parametrize(("Tq", "Tk"), ((1, 90), (5, 150), (100, 101), (7, 3), (150, 40)))
def test_attention_is_aligned_bottom_right(Tq: int, Tk: int) -> None:
    q, k, v = there(heads(2, 2, Tq, 32), heads(2, 2, Tk, 32, seed=1), heads(2, 2, Tk, 32, seed=2))
    check_attention(q, k, v, torch.float32)


def test_attention_of_strided_and_large_scores() -> None:
    q, k, v = heads(2, 50, 3, 4, 32).to(DEVICE).permute(2, 0, 3, 1, 4)
    column_first = heads(2, 4, 32, 50).to(DEVICE).transpose(2, 3)
    check_attention(column_first, k, v.flip(2), torch.float32, scale=-0.5)
    grad = heads(2, 4, 50, 32, seed=9).to(DEVICE)
    large = 30 * q, 30 * k, v
    oracle = run(reference.causal_attention, large, torch.float64, grad)
    for a, o in zip(run(ops.causal_attention, large, torch.float32, grad), oracle, strict=True):
        assert (a.double() - o).abs().max() <= 2e-3 * o.abs().max()


@every_dtype
@pytest.mark.parametrize("bias", (True, full(False)))
@pytest.mark.parametrize(("B", "T", "C", "H"), ((1, 1, 8, 1), (3, 16, 32, 2), (2, 70, 96, 3)))
def test_layer_norm_attention(
    B: int, T: int, C: int, H: int, bias: bool, dtype: torch.dtype
) -> None:
    args = (ops.layer_norm_attention, reference.layer_norm_attention, torch_layer_norm_attention)
    dropout = PROJ_DROPOUT if T == 70 else {}
    check_op(*args, there(*attention_block(B, T, C, bias)), dtype, n_head=H, **dropout)


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_layer_norm_attention_has_the_bits_of_its_parts(dropout_p: float) -> None:
    inputs, grad = there(*attention_block(3, 70, 96)), normal(3, 70, 96, seed=9).to(DEVICE)
    options = {"n_head": 2, "dropout_p": dropout_p, "seed": 8, "stream": 2}
    whole = run(ops.layer_norm_attention, inputs, torch.float32, grad, **options)
    parts = run(by_parts, inputs, torch.float32, grad, **options)
    for some in (slice(5), slice(6, 7)):
        assert_bits_of_parts(whole[some], parts[some])
    for bias in (5, 7):  # their gradients are summed by kernels that have the terms, in other order
        torch.testing.assert_close(whole[bias], parts[bias], rtol=1e-5, atol=5e-5)
    assert (whole[5][96 : 2 * 96] == 0).all()  # to shift all keys changes no weight
    with torch.no_grad():
        assert torch.equal(ops.layer_norm_attention(*inputs, **options), whole[0])


@pytest.mark.parametrize("shape", ((0, 9, 32), (4, 0, 32)))
def test_layer_norm_attention_of_nothing(shape: tuple[int, ...]) -> None:
    x, *params = there(*attention_block(*shape))
    assert x is not None and params[2] is not None
    leaves = x.requires_grad_(), params[2].requires_grad_()
    out = ops.layer_norm_attention(x, *params, n_head=2)
    dx, dweight = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == dx.shape == shape and (dweight == 0).all()


def configurations(module: Any, *names: str) -> list[Any]:
    """Returns every configuration in these tables of a module, once; of those with the same tiles
    the last one in the interpreter, which knows neither warps nor stages."""
    found = [each for name in names for kind in getattr(module, name).values() for each in kind]
    return list({str(each if CUDA else each.kwargs): each for each in found}.values())


ATTENTION = [
    (kernel, config)
    for kernel, module, table in (
        (attention.forward_kernel, attention, "FORWARD"),
        (attention_backward.query_grad_kernel, attention_backward, "QUERY_GRAD"),
        (attention_backward.key_grads_kernel, attention_backward, "KEY_GRADS"),
    )
    for config in configurations(module, table)
]
BACKWARD = [(kernel, config) for kernel, config in ATTENTION if "grad" in kernel.name]


@pytest.mark.full
@pytest.mark.parametrize(("kernel", "config"), ATTENTION, ids=lambda x: getattr(x, "name", f"{x}"))
def test_attention_in_every_configuration(
    kernel: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "configs", [config])
    q, k, v = (heads(1, 2, 150, 48, seed=i).to(DEVICE) for i in range(3))
    check_attention(q, k, v, torch.float32, dropout_p=0.2, seed=5)


@needs_numbers
@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
@pytest.mark.parametrize(("kernel", "config"), BACKWARD, ids=lambda x: getattr(x, "name", f"{x}"))
def test_sums_of_attention_gradients(
    kernel: Any, config: Any, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the gradients over batch and time, which are made by blocks of rows."""
    monkeypatch.setattr(kernel, "configs", [config])
    monkeypatch.setattr(attention_backward, "MASK_BYTES", 1)  # a head at a time
    B, H, T, D = 2, 2, 70, 24
    q, k, v = (heads(B, H, T, D, seed=i).to(DEVICE) for i in range(3))
    seed = torch.tensor(5, device=DEVICE) if dropout_p else None
    out, lse = attention.attention(q, k, v, 0.3, dropout_p, seed, 1)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    sums = attention_backward.write_grads(
        heads(B, H, T, D, seed=9).to(DEVICE), q, k, v, out.transpose(1, 2), lse, grads, 0.3,
        launch.dropout_args(dropout_p, seed, 1, q.device), True,
    )  # fmt: skip
    got = torch.cat([each.double().sum(0) for each in sums]).view(3, H, D)
    expected = torch.stack([each.double().sum((0, 2)) for each in grads])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_the_tables_of_configurations() -> None:
    """A further entry is for chips that those before it do not fit; kernels agree on `terms`."""
    for kernel in (
        attention.forward_kernel, attention_backward.query_grad_kernel,
        attention_backward.key_grads_kernel,
    ):  # fmt: skip
        for (size, D, *_), configs in kernel.choice.configs.items():
            q = torch.empty(0, dtype=torch.half if size == 2 else torch.float32)
            needs = [kernel.choice._shared({"q": q, "D": D, **x.all_kwargs()}) for x in configs]
            assert needs == sorted(needs, reverse=True)
            assert all(each > launch.MIN_SHARED for each in needs[:-1])
    for configs in attention_backward.KEY_GRADS.values():
        assert all(attention_backward.TERM_ROWS.value % each.kwargs["BM"] == 0 for each in configs)


@needs_numbers
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_descriptors_and_addresses_give_the_same(dtype: torch.dtype) -> None:
    base = heads(2, 3, 90, 3 * 40).to(DEVICE, dtype)
    aligned = [x.contiguous() for x in base.split(40, -1)]
    # Rows of 121 elements: no descriptor can have such a stride.
    others = [F.pad(base, (0, 1))[..., 40 * n : 40 * n + 40] for n in range(3)]
    results = []
    for inputs, described in ((aligned, True), (others, False)):
        q, k, v = leaves = [x.detach().requires_grad_() for x in inputs]
        out = ops.causal_attention(q, k, v, dropout_p=0.2, seed=5)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
        if not CUDA or torch.cuda.get_device_capability() >= (9, 0):
            assert attention.row_tiles(q, k, v) == described
    for a, b in zip(*results, strict=True):
        if CUDA:  # other tiles, other order of sums
            assert (a.float() - b.float()).norm() <= 0.01 * b.float().norm()
        else:
            assert torch.equal(a, b)


@needs_numbers
def test_heads_are_as_wide_as_the_tables_of_configurations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most = select.MAX_HEAD_DIM["cuda"]
    for table in (attention.FORWARD, attention_backward.QUERY_GRAD, attention_backward.KEY_GRADS):
        for D, dtype, tiles in itertools.product((1, 65, most), DTYPES, (False, True)):
            args = {"q": torch.empty(0, dtype=dtype), "D": D, "TILES": tiles}
            assert attention.head_kind(args) in table or tiles and dtype == torch.float32
    (reason,) = select.unavailable("cuda", torch.float32, most + 1)
    assert reason == "head_dim is at most 256 there, not 257"
    monkeypatch.setitem(select.MAX_HEAD_DIM, DEVICE.type, SMALL.head_dim - 1)
    idx = torch.ones(1, 5, dtype=torch.int64, device=DEVICE)
    GPT(SMALL).to(DEVICE)(idx)  # auto selects the reference
    with pytest.raises(BackendError, match="head_dim is at most 15 there, not 16"):
        GPT(SMALL, backend="fused").to(DEVICE)(idx)
    with pytest.raises(BackendError, match="causal_attention: .* head_dim is at most 15"):
        ops.causal_attention(*(heads(1, 2, 5, 16).to(DEVICE) for _ in range(3)))


@pytest.mark.parametrize("T", (16, 70))
def test_attention_of_scores_of_any_size(T: int) -> None:
    for size in (2e5, 1e10):
        if T == 16:  # with other shapes of tiles, the interpreter's products round differently
            check_large_scores(size, T, torch.float32, DEVICE)
        q, k, v = (heads(1, 2, T, 16, seed=i).to(DEVICE) for i in range(3))
        large = q * size**0.5, k * size**0.5, v
        oracle = reference.causal_attention(*(x.double() for x in large))
        torch.testing.assert_close(ops.causal_attention(*large).double(), oracle)
    for signs in ((-1, 0), (-1, 1), (-1, -1)):
        check_overflow(T, signs, torch.float32, DEVICE)


def test_decode_attention_of_scores_of_any_size() -> None:
    q, keys, values = (heads(1, 2, 300, 16, seed=i).to(DEVICE) for i in range(3))
    cache, lengths = torch.stack([keys, values], 1) * 1e5, torch.tensor([300], device=DEVICE)
    got = decode.decode_attention(1e5 * q[:, :, -1].flatten(1), cache, lengths)
    expected = reference.causal_attention(q[:, :, -1:] * 1e5, cache[:, 0], cache[:, 1])
    assert torch.equal(got, expected.flatten(1))  # one value has all the weight


def test_a_row_of_a_batch_has_the_bits_it_has_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter multiplies with numpy, whose BLAS may sum the rows at the edge of a tile in
    # another order than the others.
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("ik,kj->ij", a, b, dtype=dtype))
    leaves = [heads(5, 3, 90, 40, seed=i).to(DEVICE).requires_grad_() for i in range(3)]
    grad = heads(5, 3, 90, 40, seed=4).to(DEVICE)
    out = ops.causal_attention(*leaves)
    one = [x[3:4].detach().requires_grad_() for x in leaves]
    alone = ops.causal_attention(*one)
    assert torch.equal(alone, out[3:4])
    grads = torch.autograd.grad(out, leaves, grad)
    for a, b in zip(torch.autograd.grad(alone, one, grad[3:4]), grads, strict=True):
        assert torch.equal(a, b[3:4])
    x, *params = there(*block(130, 48, 192))
    assert x is not None
    whole = ops.layer_norm_ffn(x, *params)
    assert torch.equal(ops.layer_norm_ffn(x[90:101], *params), whole[90:101])


@needs_numbers
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_text_has_the_same_logits_in_any_batch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products of a large batch take other tiles than those of a small one."""
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("ik,kj->ij", a, b, dtype=dtype))
    counts, T, C = ((1, 3, 256), 64, 128) if CUDA else ((1, 3), 16, 32)
    sizes = replace(SMALL, n_layer=1, block_size=T, n_embd=C, dropout=0.0)
    model = GPT(sizes, backend="fused").to(DEVICE).eval()
    idx = torch.randint(sizes.vocab_size, (counts[-1], T)).to(DEVICE)
    found = []
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        for count in counts:
            found.append(torch.cat([model(idx[:count])[:1], model(idx[-count:])[-1:]]))
    assert all(torch.equal(each, found[0]) for each in found)


@needs_numbers
@pytest.mark.parametrize("name", ("ffn", "embedding", "loss", "generate"))  # others take seconds
def test_what_the_sanitizer_watches_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize_gpu, "DEVICE", DEVICE)
    if not CUDA:
        monkeypatch.setattr(sanitize_gpu, "MANY", 3)  # tokens; each is a program
    found = sanitize_gpu.CASES[name]()
    assert found and all(bool(each.isfinite().all()) for each in found)


@pytest.mark.parametrize("name", kernels.KERNELS)
def test_opcheck(where: str, name: str) -> None:
    arguments, op = cases(DEVICE)[name], getattr(torch.ops.gptfast, name).default
    if where == "fake" and name == "adamw_":
        pytest.skip("fake tensors have no pinned memory")
    if where == "fake":
        op(*arguments)
        return
    torch.library.opcheck(op, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


SHAPES = (full(1, 16, 5), (7, 33, 70), full(97, 64, 200), (150, 128, 130))


@every_dtype
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_layer_norm_linear(M: int, K: int, N: int, bias: bool, dtype: torch.dtype) -> None:
    ln_b, b = (normal(K, seed=1), normal(N, seed=2)) if bias else (None, None)
    inputs = there(normal(M, K) * 2 + 1, normal(K, seed=3), ln_b, normal(N, K), b)
    args = (ops.layer_norm_linear, reference.layer_norm_linear, torch_layer_norm_linear)
    check_op(*args, inputs, dtype)


@every_dtype
@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_linear_residual(M: int, K: int, N: int, dtype: torch.dtype) -> None:
    inputs = there(normal(M, K), normal(N, K), normal(N, seed=2), normal(M, N, seed=3))
    check_op(ops.linear_residual, reference.linear_residual, torch_linear_residual, inputs, dtype)


@every_dtype
@pytest.mark.parametrize("gelu", ("erf", "tanh"))
@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize(("M", "C", "hidden"), (full(1, 16, 64), (33, 20, 80), (130, 64, 256)))
def test_ffn(M: int, C: int, hidden: int, dropout_p: float, gelu: str, dtype: torch.dtype) -> None:
    args = (ops.layer_norm_ffn, reference.layer_norm_ffn, torch_ffn)
    inputs = there(*block(M, C, hidden))
    check_op(*args, inputs, dtype, gelu=gelu, dropout_p=dropout_p, seed=77)


@every_dtype
def test_ffn_without_biases(dtype: torch.dtype) -> None:
    args = (ops.layer_norm_ffn, reference.layer_norm_ffn, torch_ffn)
    check_op(*args, there(*block(40, 32, 128, bias=False)), dtype)


@every_dtype
@pytest.mark.parametrize(
    ("M", "K", "V"), (full(1, 16, 5), (3, 8, 1), (150, 64, 66), (97, 33, 1003))
)
def test_cross_entropy(M: int, K: int, V: int, dtype: torch.dtype) -> None:
    args = (ops.linear_cross_entropy, reference.linear_cross_entropy, torch_linear_cross_entropy)
    check_op(*args, there(*case(M, K, V)), dtype)


@every_dtype
def test_cross_entropy_with_norm_in_several_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "ROWS_MULTIPLE", 16)
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 0)
    args = with_norm(ops.linear_cross_entropy), with_norm(reference.linear_cross_entropy)
    check_op(*args, torch_norm_linear_cross_entropy, there(*norm_case(60, 48, 300)), dtype)


def test_cross_entropy_of_ignored_targets() -> None:
    x, weight, targets = (t.to(DEVICE) for t in case(40, 16, 30))
    targets[::3] = 7
    args = (ops.linear_cross_entropy, reference.linear_cross_entropy, torch_linear_cross_entropy)
    check_op(*args, [x, weight, targets], torch.float32, ignore_index=7)
    nothing = torch.full_like(targets, -100)
    loss = ops.linear_cross_entropy(x.requires_grad_(), weight, nothing)
    loss.backward()
    assert loss == 0 and x.grad is not None and (x.grad == 0).all()


@every_dtype
@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
@pytest.mark.parametrize(("B", "T", "V", "C"), (full(1, 1, 2, 8), (2, 5, 7, 16), (9, 33, 66, 100)))
def test_embedding(B: int, T: int, V: int, C: int, dropout_p: float, dtype: torch.dtype) -> None:
    idx = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    idx[0, 0] = 0
    options = {"padding_idx": 0, "dropout_p": dropout_p, "seed": 3}
    check_op(fused, plain, plain, there(*tables(V, 40, C), idx), dtype, **options)


@needs_numbers
def test_indices_out_of_range(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "cuda":
        pytest.skip("an assertion on the device ends the process: see test_triton_loss.py")
    builder = triton.runtime.interpreter.interpreter_builder
    options = replace(builder.options, debug=True, sanitize_overflow=False)
    monkeypatch.setattr(builder, "options", options)  # as launch.ASSERTING has it for a compiler
    raises = functools.partial(pytest.raises, triton.runtime.errors.InterpreterError)
    wte, wpe = tables(7, 8, 16)
    for wrong in (7, -1, 2**40):
        with raises(match=r"embedding: idx must be in \[0, vocab_size\)"):
            ops.embedding(torch.tensor([[1, wrong]]), wte, wpe)
    x, weight, targets = case(4, 8, 5)
    for wrong in (5, -1, 2**40):
        targets[2] = wrong
        with raises(match=r"targets must be in \[0, vocab_size\) or ignore_index"):
            ops.linear_cross_entropy(x, weight, targets)
        ops.linear_cross_entropy(x, weight, targets, ignore_index=wrong)


@every_dtype
@pytest.mark.parametrize(("H", "D", "capacity"), ((2, 16, 40), (3, 33, 600), (1, 128, 257)))
def test_decode_attention(H: int, D: int, capacity: int, dtype: torch.dtype) -> None:
    lengths = torch.tensor([1, capacity, capacity // 2 + 1, 7], device=DEVICE)
    q = heads(4, H * D, seed=1).to(DEVICE, dtype)
    cache = heads(4, 2, H, capacity, D).to(DEVICE, dtype)
    got = decode.decode_attention(q, cache, lengths)
    for row, length in enumerate(lengths.tolist()):
        k, v = cache[row : row + 1, :, :, :length].double().unbind(1)
        one = q[row].double().view(1, H, 1, D)
        expected = reference.causal_attention(one, k, v).flatten()
        assert (got[row].double() - expected).abs().max() <= 3 * torch.finfo(dtype).eps
        cut = cache[row : row + 1].clone()
        cut[:, :, :, length:] = math.nan  # the cache past the length must not be read
        alone = decode.decode_attention(q[row : row + 1], cut, lengths[row : row + 1])
        assert torch.equal(alone[0], got[row])


@needs_numbers
@pytest.mark.parametrize(
    "how",
    (
        Sampling(temperature=0.0),
        Sampling(),
        Sampling(temperature=0.3, top_k=5),
        Sampling(top_p=0.7),
        Sampling(temperature=1.3, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.4),
        Sampling(temperature=0.0, repetition_penalty=3.0),
        Sampling(min_p=1.0),
        Sampling(top_k=68),
        Sampling(top_k=1),
        Sampling(top_p=1e-46),  # less than any number of float32
        Sampling(temperature=1e-46),
    ),
)
@pytest.mark.parametrize("V", (full(1), full(5), 66, 1500))
def test_the_cpu_draws_the_same_tokens(V: int, how: Sampling) -> None:
    R = 10 if CUDA else 5
    generator = torch.Generator().manual_seed(V)
    logits = 3 * torch.randn(R, V, generator=generator)
    logits[0, :] = 1.0  # ties
    seen = torch.rand(R, V, generator=generator) < 0.2
    seeds = torch.randint(2**62, (R,), generator=generator)
    sequence_ids, steps = torch.arange(R), torch.arange(R) * 7
    tokens, logprobs = torch.empty(R, dtype=torch.int64), torch.empty(R)
    arguments = logits, seen.byte(), seeds, sequence_ids, steps, tokens, logprobs
    on_device = [x.to(DEVICE) for x in arguments]
    kind, numbers = kind_of(how, V), torch.tensor(numbers_of(how), dtype=torch.float64).to(DEVICE)
    sample(kind, numbers, on_device[0], V, *on_device[1:])
    # What stands past the vocabulary changes nothing.
    padded = [x.clone() for x in on_device]
    for i, anything in enumerate((math.nan, 1)):
        padded[i] = torch.nn.functional.pad(padded[i], (0, 7), value=anything)
    sample(kind, numbers, padded[0], V, *padded[1:])
    assert torch.equal(padded[-2], on_device[-2])
    assert torch.allclose(padded[-1], on_device[-1], atol=1e-6)
    listed = [row.nonzero()[:, 0].tolist() for row in seen.cpu()]
    expected = choose(
        how, logits.cpu(), listed, draws(seeds.cpu(), sequence_ids.cpu(), steps.cpu())
    )
    assert torch.equal(on_device[-2].cpu(), expected)
    exact = logits.cpu().double().log_softmax(-1).gather(1, expected[:, None])[:, 0]
    assert torch.allclose(on_device[-1].cpu().double(), exact, atol=1e-5)


@needs_numbers
def test_gradients_of_rows_that_overlap() -> None:
    q = heads(1, 2, 20).to(DEVICE).unfold(2, 12, 1)  # (1, 2, 9, 12)
    k, v = (heads(1, 2, 9, 12, seed=i).to(DEVICE) for i in (1, 2))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    found = [
        torch.autograd.grad(op(*leaves).square().sum(), leaves)
        for op in (ops.causal_attention, reference.causal_attention)
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_numbers
def test_the_highest_score_is_told_from_the_next_number() -> None:
    R, V = 40, 8
    highest = 60 * torch.rand(R, generator=torch.Generator().manual_seed(1)) - 30
    logits = torch.full((R, V), -50.0)
    logits[:, 5], logits[:, 2] = highest, highest.nextafter(torch.tensor(-math.inf))
    rows, none = torch.arange(R), torch.zeros(R, V, dtype=torch.uint8)
    tokens, logprobs = torch.empty(R, dtype=torch.int64), torch.empty(R)
    arguments = [x.to(DEVICE) for x in (logits, none, rows, rows, rows, tokens, logprobs)]
    for how in (Sampling(top_k=1), Sampling(top_p=1e-3)):
        numbers = torch.tensor(numbers_of(how), dtype=torch.float64).to(DEVICE)
        sample(kind_of(how, V), numbers, arguments[0], V, *arguments[1:])
        allowed = {5} if how.top_k == 1 else {2, 5}  # whose weights are equal in float32
        assert {*arguments[-2].tolist()} <= allowed


SMALL = GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=32, dropout=0.2)


@needs_numbers
def test_a_training_step_of_the_model() -> None:
    grads = []
    idx = torch.randint(11, (3, 17), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    backends: tuple[Backend, ...] = ("fused", "reference")
    for backend in backends:
        torch.manual_seed(0)
        model = GPT(SMALL, backend=backend).to(DEVICE)
        loss = model.loss(idx[:, :-1], idx[:, 1:])
        loss.backward()
        grads.append([loss.detach(), *(param.grad for param in model.parameters())])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@needs_numbers
def test_compiled_loss_is_one_graph_with_the_same_gradients() -> None:
    torch._dynamo.reset()
    model = GPT(replace(SMALL, dropout=0.0)).to(DEVICE)
    idx = torch.randint(11, (3, 17), generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def loss(idx: Tensor, targets: Tensor) -> Tensor:
        assert not select.unavailable("cuda", torch.float32)  # the check of a model on a GPU
        return model.loss(idx, targets)

    found = []
    for each in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = each(idx[:, :-1], idx[:, 1:])
        found.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@needs_numbers
@pytest.mark.parametrize("overflow", ("recompute", "stride:5", "stop"))
@pytest.mark.parametrize(
    "options",
    (
        {"temperature": 0.0, "max_batch": 2},
        {"temperature": 0.7, "seed": [1, 2, 3], "stop": [2]},
        {"top_p": 0.8, "repetition_penalty": 1.3, "logprobs": 3},
    ),
)
def test_generation_is_that_of_the_uncached_loop(options: dict[str, Any], overflow: str) -> None:
    model = model_of(SMALL, scale=1.5).to(DEVICE)
    prompts = [[1], [4, 5, 6, 7] * 3, [3, 1] * 10]  # the second soon fills the window
    new = 14 if CUDA else 8
    request = make_request(model, prompts, max_new_tokens=new, overflow=overflow, **options)
    on_device = device_loop.DeviceLoop(model, request)
    model.backend = "reference"
    plainly = ReferenceLoop(model, request)
    for loop in (on_device, plainly):
        while loop.run(0.0):
            pass
    for a, b in zip(on_device.updates(), plainly.updates(), strict=True):
        assert a.tokens == b.tokens and a.state == b.state
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)
        assert [[t for t, _ in row] for row in a.top_logprobs] == [
            [t for t, _ in row] for row in b.top_logprobs
        ]


@needs_numbers
def test_a_stream_is_of_the_model_as_it_was_at_the_call() -> None:
    model, found = GPT(SMALL).to(DEVICE), []
    for changes in (False, True):
        request = make_request(model, [[1, 2, 3]], max_new_tokens=6)
        loop = device_loop.DeviceLoop(model, request, lasting=True)
        loop.run(0.0)
        if changes:
            model.wte.weight.data.neg_()
        while loop.run(0.0):
            pass
        found.append(loop.updates())
    assert found[0] == found[1]


@needs_numbers
def test_generation_has_the_models_dtype_whatever_autocast_says() -> None:
    model = GPT(SMALL).to(DEVICE)
    found = []
    for enabled in (False, True):
        loop = device_loop.DeviceLoop(model, make_request(model, [[1, 2, 3]], max_new_tokens=3))
        with torch.autocast(DEVICE.type, torch.float16, enabled=enabled):
            while loop.run(0.0):
                pass
        found.append(loop.updates()[0].logprobs)
    assert found[0] == found[1]


@needs_numbers
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_logits_that_are_not_finite_name_the_prompt() -> None:
    model = GPT(SMALL).to(DEVICE)
    model.wte.weight.data[2] = torch.nan
    request = make_request(model, [[1], [2], [3]], max_new_tokens=1, num_samples=2)
    with pytest.raises(DataError, match="the model's logits are not finite for prompt 1"):
        device_loop.DeviceLoop(model, request).run(0.0)


@pytest.mark.parametrize(
    ("target", "exact", "short"),
    (
        (("cuda", 80), "tf32x3", "tf32"),
        (("hip", "gfx942"), "ieee", "tf32"),
        (("hip", "gfx90a"), "ieee", "ieee"),  # has no tf32, and Triton rejects it
        (("hip", "gfx950"), "ieee", "ieee"),
    ),
)
def test_how_float32_is_multiplied(
    target: tuple[str, Any], exact: str, short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, arch = target
    chip = SimpleNamespace(backend=backend, arch=arch)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    driver = Mock(get_current_target=lambda: chip, get_current_device=lambda: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting, expected in (("ieee", exact), ("tf32", short)):
            matmul.fp32_precision = setting  # after which torch may not tell the older setting
            assert launch.precision() == expected
    finally:
        matmul.fp32_precision = before


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_attention_is_faster_than_multihead_attention(where: str, dtype: str) -> None:
    if where != "cuda":
        pytest.skip("torch finds no CUDA device")
    path = ["--device", "cuda", "--dtype", dtype, "--only", "4x12x1024x64", "--seconds", "1"]
    assert bench_attention.run(path) == 0  # prints the ratios against SDPA
    qkv = torch.randn(4, 1024, 3 * 768, device=DEVICE, dtype=DTYPES[2 if dtype == "bf16" else 0])
    module = torch.nn.MultiheadAttention(768, 12, batch_first=True).to(DEVICE, qkv.dtype)
    x, mask = qkv[..., :768], torch.ones(1024, 1024, dtype=torch.bool, device=DEVICE).triu(1)

    def multihead() -> Tensor:
        return module(x, x, x, attn_mask=mask, need_weights=False)[0]

    def ours() -> Tensor:
        projected = torch.nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias)
        q, k, v = projected.unflatten(-1, (3, 12, -1)).permute(2, 0, 3, 1, 4)
        return module.out_proj(ops.causal_attention(q, k, v).transpose(1, 2).flatten(2))

    with torch.no_grad():
        own, other = (triton.testing.do_bench(each) for each in (ours, multihead))
    assert own < other
