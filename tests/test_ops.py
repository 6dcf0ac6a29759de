"""The operators as torch sees them: schemas, fakes, mutation; and the package without its parts."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gptfast import GPT, GPTConfig, ops
from gptfast.ops import adamw, engine, select

if select.extension() is None:
    pytest.skip(f"{select.extension_error}", allow_module_level=True)

# Operators that no public operation calls: they are defined when their module is imported.
INTERNAL = (adamw.adamw_, engine.pack_weight, engine.generate, engine.score)

R = torch.randn
SEED = torch.tensor(7)


def heads(T: int) -> Tensor:
    return R(2, T, 3, 16).transpose(1, 2)  # (B, H, T, D), dense but not contiguous


BYTES = ((0, torch.uint8), (1, torch.int64))  # an empty list of texts and its starts


class Model(NamedTuple):
    """One layer of 20 dimensions, 7 tokens, a window of 8."""

    params: list[Tensor]
    packed: list[Tensor]
    description: tuple[Any, ...] = (1, 2, True, "erf", False, 8)


def model_arguments() -> Model:
    weights = [R(20, 20), R(40, 20), R(20, 20), R(80, 20), R(20, 80), R(7, 20)]
    shapes = (7, 20), (8, 20), 20, 0, 20, 40, 20, 20, 20, 80, 20, 20, 20
    params = [R(*shape) if isinstance(shape, tuple) else R(shape) for shape in shapes]
    return Model(params, [engine.pack_weight(w, torch.float32, False) for w in weights])


def new_cache(rows: int) -> Tensor:
    extension = select.extension()
    assert extension is not None
    return torch.zeros(rows, extension.cache_bytes(False, 8, 2, 10, 8) // 4)


def state() -> list[Tensor]:
    """Three sequences of up to 4, 6 and 12 tokens, in places of their own."""
    rows = [
        dict(begin=0, length=1, prompt=1, limit=4),
        dict(begin=4, length=2, prompt=2, limit=6, number=1, twin=1),
        dict(begin=10, length=9, prompt=9, limit=12, number=2, twin=2),
    ]
    sequences = torch.tensor([[row.get(name, 0) for name in engine.FIELDS] for row in rows])
    tokens = torch.ones(22, dtype=torch.int64)
    return [sequences, tokens, R(22), torch.zeros(22, 2, dtype=torch.int64), R(22, 2)]


def cases() -> dict[str, tuple[Any, ...]]:
    """Arguments for every operator in the namespace."""
    q, k, v = heads(9), heads(9), heads(9)
    out, lse = torch.ops.gptfast.attention(q, k, v, 0.25, 0.1, SEED, 1)
    x, ln_w, ln_b, weight, bias = R(2, 9, 32), R(32), R(32), R(20, 32), R(20)
    y, mean, rstd = torch.ops.gptfast.linear(x, ln_w, ln_b, weight, bias, None)
    block = (ln_w, None, R(96, 32), R(96), R(32, 32), None)
    _, *kept = torch.ops.gptfast.self_attention(x, *block, 2, 0.1, SEED, 1, True)
    ffn = (ln_w, None, R(64, 32), R(64), R(32, 64), R(32))
    y2, mean2, rstd2, hidden = torch.ops.gptfast.ffn(x, *ffn, "erf", 0.1, SEED, 2, True)
    idx = torch.randint(5, (2, 9))
    tables = (R(5, 32), R(12, 32))
    model = model_arguments()
    tokens, targets, starts = (torch.tensor(each) for each in ([1, 2, 3], [2, 3, 0], [0, 2, 3]))
    stops = [torch.tensor([6]), *(torch.zeros(n, dtype=d) for n, d in BYTES * 2)]
    return {
        "attention": (q, k, v, 0.25, 0.1, SEED, 1),
        "attention_backward": (R(2, 9, 3, 16), q, k, v, out, lse, 0.25, 0.1, SEED, 1),
        "self_attention": (x, *block, 4, 0.1, SEED, 1, False),
        "self_attention_backward": (R(2, 9, 32), x, *block, *kept, 2, 0.1, SEED, 1, 0b1111111),
        "linear": (x.transpose(0, 1), ln_w, ln_b, weight, bias, None),
        "linear_backward": (R(2, 9, 20), x, ln_w, ln_b, mean, rstd, weight, None, 0b11101),
        "ffn": (x, *ffn, "tanh", 0.1, SEED, 2, False),
        "ffn_backward": (R(2, 9, 32), x, *ffn, mean2, rstd2, hidden, "erf", 0.1, SEED, 2, 0b100101),
        "linear_cross_entropy": (x, ln_w, ln_b, R(5, 32), idx, R(2, 9), -100, "mean", 0b1011),
        "embedding": (idx, *tables, 0.1, SEED, 0, torch.bfloat16),
        "embedding_backward": (R(2, 9, 32), idx, *tables, 0, 0.1, SEED, 0, 0b11),
        "adamw_": (*([R(20), R(3, 5)] for _ in range(3)), [R(20).abs(), R(3, 5).abs()],
            [torch.ones(()), torch.ones(())], 1e-3, 0.9, 0.99, 1e-8, 0.1, 1.0),
        "pack_weight": (R(20, 32), torch.bfloat16, True),
        "generate": (state(), new_cache(2), [], model.params, model.packed, stops,
            *model.description, 1.0, 3, 0.9, 0.01, 1.2, 1, 10.0),
        "score": (tokens, targets, starts, new_cache(2), model.params, model.packed,
            *model.description),
    }  # fmt: skip


NAMES = (
    "attention attention_backward self_attention self_attention_backward"
    " linear linear_backward ffn ffn_backward linear_cross_entropy embedding embedding_backward"
    " adamw_ pack_weight generate score"
).split()


def test_every_operator_has_a_case() -> None:
    defined = {name.removeprefix("gptfast::") for name in torch._C._dispatch_get_all_op_names()
               if name.startswith("gptfast::")}  # fmt: skip
    assert defined == set(NAMES) == set(cases())


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    torch.manual_seed(0)
    # The size of a packed weight depends on the instruction set, which a fake cannot know.
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


@pytest.mark.parametrize(
    ("sequence", "field", "value", "message"),
    (
        (0, "limit", 30, "sequence 0 must have 0 < prompt <= length <= limit tokens"),
        (0, "begin", -1, "sequence 0 must have 0 < prompt"),
        (1, "prompt", 3, "sequence 1 must have 0 < prompt"),
        (1, "prompt", 0, "sequence 1 must have 0 < prompt"),
        (1, "begin", 3, "sequence 1 must have 0 < prompt .* in places of its own"),
        (1, "begin", 6, "sequence 2 must have 0 < prompt .* in places of its own"),
        (0, "beyond", -1, "sequence 0 must have 0 < prompt"),
        (0, "limit", 1, "sequence 0 must have room for a token"),
    ),
)
def test_generate_refuses_what_would_leave_its_memory(
    sequence: int, field: str, value: int, message: str
) -> None:
    arguments = cases()["generate"]
    arguments[0][0][sequence, engine.FIELDS.index(field)] = value
    with pytest.raises(RuntimeError, match=message):
        engine.generate(*arguments)


def test_generate_takes_places_in_any_order_and_returns_where_one_has_no_more() -> None:
    arguments = list(cases()["generate"])
    column = {name: i for i, name in enumerate(engine.FIELDS)}
    sequences = arguments[0][0]
    sequences[0, column["begin"]], sequences[1, column["begin"]] = 6, 0
    sequences[1, column["limit"]], sequences[1, column["beyond"]] = 3, 3
    arguments[5] = [torch.tensor([], dtype=torch.int64), *arguments[5][1:]]  # no stops
    unfinished, invalid = engine.generate(*arguments)
    assert (unfinished, invalid) == (3, -1)
    assert sequences[:2, column["length"]].tolist() == [2, 3]
    with pytest.raises(RuntimeError, match="sequence 1 must have room for a token"):
        engine.generate(*arguments)
    sequences[1, column["limit"]], sequences[1, column["beyond"]] = 6, 0
    assert engine.generate(*arguments) == (0, -1)
    assert sequences[:, column["length"]].tolist() == [4, 6, 12]


@pytest.mark.parametrize(
    ("field", "value"), (("row", 2), ("row", -1), ("cached", 9), ("cached", -1), ("offset", -1))
)
def test_generate_refuses_running_sequences_without_a_place(field: str, value: int) -> None:
    arguments = cases()["generate"]
    arguments[0][0][2, engine.FIELDS.index("state")] = engine.STATES.index("running")
    arguments[0][0][2, engine.FIELDS.index(field)] = value
    with pytest.raises(RuntimeError, match="sequence 2 must have a row of the cache of its own"):
        engine.generate(*arguments)


def test_generate_refuses_tokens_and_capacities_that_do_not_fit() -> None:
    arguments = list(cases()["generate"])
    arguments[0][1][4] = 7
    with pytest.raises(RuntimeError, match=r"sequence 1 must have tokens in \[0, 7\), got 7"):
        engine.generate(*arguments)
    arguments = list(cases()["generate"])
    with pytest.raises(RuntimeError, match="cache must have shape"):
        engine.generate(arguments[0], R(2, 17), *arguments[2:])
    with pytest.raises(RuntimeError, match=r"capacity must be in \[1, 8\], got 9"):
        engine.generate(*arguments[:11], 9, *arguments[12:])


def test_score_refuses_windows_that_do_not_fit() -> None:
    arguments = list(cases()["score"])
    for place, value, message in (
        (0, [1, 2, 7], r"tokens must be in \[0, 7\), got 7"),
        (1, [1, 2, 7], r"targets must be in \[0, 7\), got 7"),
        (2, [0, 2, 4], r"starts must be in \[0, 4\), got 4"),
        (2, [0, 3, 3], "starts must give each window 1 to 8 tokens, got 0"),
        (2, [0, 1, 2, 3], "starts must rise from 0 to the number of tokens"),
    ):
        bad = [*arguments[:place], torch.tensor(value), *arguments[place + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            engine.score(*bad)


def test_packed_weights_of_another_level_are_refused() -> None:
    extension = select.extension()
    assert extension is not None
    before = extension.isa_current()
    arguments = cases()["score"]
    extension.isa_set("generic")
    try:
        if before == "generic":
            pytest.skip("this machine has the generic level alone")
        with pytest.raises(RuntimeError, match="packed must"):
            engine.score(*arguments)
    finally:
        extension.isa_set(before)


def test_packed_weights_of_another_kind_are_refused() -> None:
    arguments = list(cases()["score"])
    arguments[5] = [engine.pack_weight(R(20, 20), torch.bfloat16, False), *arguments[5][1:]]
    with pytest.raises(RuntimeError, match="packed must"):
        engine.score(*arguments)


def test_absent_parameters_that_are_needed_are_refused() -> None:
    arguments = list(cases()["score"])
    for needed in (0, 1, 2, 7, 11):  # wte, wpe and the weights of the norms
        params = list(arguments[4])
        params[needed] = R(0)
        with pytest.raises(RuntimeError, match="params must"):
            engine.score(*arguments[:4], params, *arguments[5:])


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
        r"causal_attention: k must have shape .*, got \(\)": lambda: ops.causal_attention(
            heads_of, scalar, heads_of
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()


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


def test_python_threads_share_the_processors(any_threads: None) -> None:
    torch.set_num_threads(8)  # more than most machines have, and twice that at once
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
