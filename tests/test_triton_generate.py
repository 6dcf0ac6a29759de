"""Generation on a GPU: its kernels against float64, and a loop that is ahead of what it has read.

Like test_triton.py, in Triton's interpreter where there is no GPU.
"""

import math
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_models
import torch
import torch.nn.functional as F
from test_triton import DEVICE, needs_numbers, where  # noqa: F401 (a fixture of every test here)
from torch import Tensor

from gptfast import GPT, CharTokenizer, DataError, GPTConfig
from gptfast.generation import decoder, dtypes, kept, make_request
from gptfast.generation.decoder import Decoder, InFlight, Shape
from gptfast.generation.sequences import Update
from gptfast.generation.sizes import slots_bucket, unrolled
from gptfast.generation.snapshot import has_int8, snapshot
from gptfast.generation.weights import Weights, parameters_of
from gptfast.ops.int8 import empty_int8, rounded
from gptfast.ops.sampling import Sampling

pytest.importorskip("triton")
from gptfast.generation import device_loop  # noqa: E402
from gptfast.ops.triton.decode import fill_cache, next_windows  # noqa: E402
from gptfast.ops.triton.few_rows import Append, Embedding, few_rows_linear  # noqa: E402
from gptfast.ops.triton.few_rows_tile import tile_of  # noqa: E402
from gptfast.ops.triton.int8 import round_to_int8  # noqa: E402
from gptfast.ops.triton.sampling import kind_of  # noqa: E402
from gptfast.ops.triton.slots import FIELDS, start_slots  # noqa: E402

pytestmark = needs_numbers


@pytest.fixture(autouse=True)
def products_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter sum every row of a product in one order, which numpy's BLAS does not."""

    def product(a: Any, b: Any, dtype: Any) -> Any:
        return np.einsum("...ik,...kj->...ij", a, b, dtype=dtype)

    monkeypatch.setattr(np, "matmul", product)


@pytest.fixture
def int8_activations(monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of activations beside weights of 8 bits: one that the interpreter multiplies."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(dtypes, "multiplies_bf16", lambda device: False)
    return dtypes.activations(torch.float32, "int8", DEVICE.type)


TINY = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "K", "N", "gelu"), ((1, 128, 48, None), (5, 20, 70, "erf"), (40, 96, 33, "tanh"))
)
def test_few_rows_linear(M: int, K: int, N: int, gelu: Any, dtype: torch.dtype) -> None:
    x, w, b = (normal(*size, dtype=dtype) for size in ((M, K), (N, K), (N,)))
    ln_w, ln_b = normal(K, dtype=dtype, seed=1), normal(K, dtype=dtype, seed=2)
    budget = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    y = torch.full((M, N), math.nan, dtype=dtype, device=DEVICE)
    few_rows_linear(x, w, b, y, norm=(ln_w, ln_b), gelu=gelu)
    expected = F.layer_norm(x.double(), (K,), ln_w.double(), ln_b.double())
    expected = F.linear(expected, w.double(), b.double())
    if gelu is not None:
        expected = F.gelu(expected, approximate="none" if gelu == "erf" else "tanh")
    assert error(y, expected) <= budget
    residual = normal(M, N, dtype=dtype, seed=3)
    expected = residual.double() + F.linear(x.double(), w.double())
    few_rows_linear(x, w, None, residual, residual=residual)
    assert error(residual, expected) <= budget
    wide = torch.full((M, N + 3), math.nan, device=DEVICE)
    few_rows_linear(x, w, None, wide, norm=(ln_w, None))
    expected = F.linear(F.layer_norm(x.double(), (K,), ln_w.double()), w.double())
    assert error(wide[:, :N], expected) <= budget and bool(wide[:, N:].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), ((1, 128, 48), (40, 50, 33)))
def test_few_rows_linear_of_8_bits(M: int, K: int, N: int, dtype: torch.dtype) -> None:
    x, b, residual = (normal(*size, dtype=dtype) for size in ((M, K), (N,), (M, N)))
    w = rounded(normal(N, K, seed=1))
    exact = F.linear(x.double(), w.dense(torch.float64), b.double())
    budget = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    y = torch.full((M, N), math.nan, dtype=dtype, device=DEVICE)
    few_rows_linear(x, w, b, y, gelu="tanh")
    assert error(y, F.gelu(exact, approximate="tanh")) <= budget
    few_rows_linear(x, w, b, residual, residual=residual)
    assert error(residual, exact + normal(M, N, dtype=dtype).double()) <= budget


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_rounded_to_the_bits_of_the_specification(dtype: torch.dtype) -> None:
    weights = normal(70, 1030, dtype=dtype)
    weights[3] = 0.0
    weights[5, 7], weights[6, 1029], weights[7, 0] = math.nan, math.inf, -math.inf
    weights[8] = torch.arange(1030, device=DEVICE) % 255 - 126.5  # half of them are ties
    weights[8, 0] = 127.0
    for w in (weights, weights.t(), weights[:, :40], weights[:1, ::3]):
        expected, found = rounded(w), empty_int8(w)
        found.values.fill_(99)
        round_to_int8(w, found)
        assert torch.equal(found.values, expected.values)
        assert torch.equal(found.scales.nan_to_num(-1.0), expected.scales.nan_to_num(-1.0))


@pytest.mark.parametrize("few_bits", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_among_any_number_of_rows(
    dtype: torch.dtype, few_bits: bool
) -> None:
    K, N = 96, 40
    x, w, b = (normal(*size, dtype=dtype) for size in ((140, K), (N, K), (N,)))
    w = rounded(w) if few_bits else w
    found = []
    for M in (1, 20, 140):
        y = x.new_empty(M, N)
        few_rows_linear(x[:M], w, b, y, norm=(x[0], x[1]), gelu="erf")
        found.append(y[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    tiles = [tile_of(M, N, K, dtype.itemsize) for M in (1, 20, 140)]
    assert len({(tile.LENGTH, tile.SLICES) for tile in tiles}) == 1


def test_a_row_by_itself_has_all_operands_at_once() -> None:
    K, N = 96, 40
    x, w, b = (normal(*size) for size in ((1, K), (N, K), (N,)))
    tile = tile_of(16, N, K, 4)._replace(AT_ONCE=False)
    found = []
    for each in (tile, tile._replace(AT_ONCE=True), tile._replace(BM=1, BN=8, AT_ONCE=True)):
        y = x.new_full((1, N), math.nan)
        few_rows_linear(x, w, b, y, norm=(x[0], x[0]), gelu="erf", tile=each)
        found.append(y)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_queries_keys_and_values_of_embedded_tokens() -> None:
    S, C, H, capacity = 3, 16, 2, 5
    wte, wpe, w, b = (normal(*size) for size in ((7, C), (capacity, C), (3 * C, C), (3 * C,)))
    ln_w = normal(C, seed=1)
    tokens = torch.tensor([4, 0, 6], device=DEVICE)
    lengths = torch.tensor([1, 4, 6], device=DEVICE)  # the last window is full: its slot stands
    drawn, limits = torch.tensor([0, 2, 1], device=DEVICE), torch.full((3,), 2, device=DEVICE)
    x, q = (torch.full((S, C), math.nan, device=DEVICE) for _ in range(2))
    cache = torch.full((S, 2, H, capacity, C // H), math.nan, device=DEVICE)
    few_rows_linear(
        x, w, b, q, norm=(ln_w, None), embedding=Embedding(tokens, lengths, wte, wpe, capacity),
        append=Append(cache, lengths, drawn, limits),
    )  # fmt: skip
    assert torch.equal(x, wte[tokens] + wpe[lengths.clamp(max=capacity) - 1])
    expected = F.linear(F.layer_norm(x, (C,), ln_w), w, b)
    assert torch.allclose(q, expected[:, :C], atol=1e-5)
    kv = expected[:, C:].view(S, 2, H, C // H)
    assert torch.allclose(cache[0, :, :, 0], kv[0], atol=1e-5)
    cache[0, :, :, 0] = math.nan
    assert bool(cache.isnan().all())  # slot 1 has drawn all, slot 2 has to move its window


def test_windows_move_and_fill_the_cache() -> None:
    size, T, C, H = 6, 5, 8, 2
    text = torch.arange(18, device=DEVICE).view(3, size)  # token i at i % 6
    lengths, offsets, drawn, limits = (
        torch.tensor(values, device=DEVICE) for values in ([7, 3, 7], [2, 0, 0], [1, 1, 9], [9] * 3)
    )
    slots = torch.tensor([2, 0, -1, 1], device=DEVICE)
    windows = next_windows(slots, lengths, offsets, drawn, limits, text, T, size, 2)
    assert lengths.tolist() == [5, 3, 7] and offsets.tolist() == [4, 0, 0]  # slot 2 is done
    assert windows.tolist() == [
        [12, 13, 14, 15, 16], [4, 5, 0, 1, 2], [0] * 5, [6, 7, 8, 9, 10],
    ]  # fmt: skip
    cache = torch.full((3, 2, H, size, C // H), math.nan, device=DEVICE)
    qkv = normal(4, T, 3 * C)
    fill_cache(qkv[:, :, C:], slots, lengths, cache)
    kv = qkv[:, :, C:].view(4, T, 2, H, C // H).permute(0, 2, 3, 1, 4)
    for slot, row in ((0, 1), (1, 3), (2, 0)):
        filled = min(T, int(lengths[slot]) - 1)
        assert torch.equal(cache[slot, :, :, :filled], kv[row, :, :, :filled])
        assert bool(cache[slot, :, :, filled:].isnan().all())


def test_sequences_get_slots() -> None:
    S, capacity, V = 4, 5, 9
    texts, offsets = [[1, 2, 3, 4, 5, 6, 7], [8]], [3, 0]
    columns = [[2, 0], [14, 21], [7, 1], offsets, [20, 30], [2**62, 5], [6, 7]]
    given = torch.tensor([*sum(columns, []), *sum(texts, [])], device=DEVICE)
    state = torch.full((len(FIELDS), S + 1), -1, device=DEVICE)[:, :S]
    text = torch.full((S, capacity), -1, device=DEVICE)
    seen = torch.full((S, V), 2, dtype=torch.uint8, device=DEVICE)
    start_slots(given, 2, state, text, seen)
    assert state[:, 2].tolist() == [7, 4, 3, 0, 20, 2**62, 6]  # FIELDS
    assert state[:, 0].tolist() == [8, 1, 0, 0, 30, 5, 7]
    assert text[2].tolist() == [6, 7, -1, 4, 5]  # tokens 3 to 6 at their number modulo 5
    assert text[0].tolist() == [8, -1, -1, -1, -1]
    assert seen[2].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0]  # of the whole text
    assert seen[0].tolist() == [0] * 8 + [1]
    assert bool((state[:, [1, 3]] == -1).all() & (text[[1, 3]] == -1).all())
    assert bool((seen[[1, 3]] == 2).all())


def model_of(config: GPTConfig, scale: float = 2.0) -> GPT:
    return small_models.model_of(config, scale=scale).to(DEVICE)


def generated(model: GPT, prompts: list[Any], seconds: float = 0.0, **options: Any) -> list[Update]:
    loop = device_loop.DeviceLoop(model, make_request(model, prompts, **options))
    while loop.run(seconds):
        pass
    return loop.updates()


@pytest.mark.parametrize("overflow", ("recompute", "stride:3", "stop"))
def test_being_ahead_changes_nothing(overflow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_of(TINY), CharTokenizer.from_text("abcdefghij")
    options: dict[str, Any] = {
        "tokenizer": tokenizer, "max_new_tokens": 9, "overflow": overflow, "max_batch": 2,
        "stop": ["a", "bc", 3], "temperature": 2.0,
    }  # fmt: skip
    prompts = ["abcdefgh", "c", "jihgfed"]
    one_by_one = generated(model, prompts, **options)
    monkeypatch.setattr(device_loop, "POLL_SECONDS", 1e9)  # up to 128 steps before a poll
    assert generated(model, prompts, seconds=1e9, **options) == one_by_one
    assert {each.state for each in one_by_one} != {"length"}


@pytest.mark.parametrize(
    ("overflow", "dtype"), (("recompute", None), ("stride:5", None), ("stride:5", "int8"))
)
def test_a_sequence_has_the_same_bits_in_any_batch(
    overflow: str, dtype: str | None, int8_activations: torch.dtype
) -> None:
    model = model_of(TINY)
    prompts, seeds = [[1], [2, 3, 4, 5, 6, 7, 8, 9, 10], [5] * 8], [7, 8, 9]
    options: dict[str, Any] = {"max_new_tokens": 3, "overflow": overflow, "dtype": dtype}
    together = generated(model, prompts, seed=seeds, **options)
    for each, prompt, seed in zip(together, prompts, seeds, strict=True):
        (alone,) = generated(model, [prompt], seed=[seed], **options)
        assert (alone.tokens, alone.logprobs) == (each.tokens, each.logprobs)


def test_slots_go_to_the_next_sequences_without_a_poll() -> None:
    model = model_of(TINY)
    prompts, options = [[1], [2, 3], [4] * 9, [5], [6, 7]], {"max_new_tokens": 5, "seed": 3}
    together = generated(model, prompts, seconds=1e9, **options)
    loop = device_loop.DeviceLoop(model, make_request(model, prompts, max_batch=2, **options))
    queued = 0
    while loop._queue(one_by_one=False):
        queued += 1
    assert queued == 3  # two sequences, two more, and the last one
    for _ in range(queued):
        loop._poll()
    assert loop.updates() == together


class Prepared:
    """A decoder whose slots draw prepared tokens; looks at no window and no text."""

    step_seconds = 1e-4
    device = torch.device("cpu")

    def __init__(self, tokens: Any, logprobs: Any) -> None:
        self._tokens, self._logprobs, self._drawn = tokens, logprobs, 0
        self.order = decoder.Order(self.device)

    def start(self, starts: Any) -> None:
        """Nothing."""

    def queue(self, runs: Any) -> InFlight:
        """Says how many steps there are."""
        steps = sum(each.steps for each in runs)
        self._drawn += steps
        return InFlight(steps, torch.empty(0), self._drawn, None)

    def read(self, flight: InFlight) -> tuple[Any, Any]:
        """Returns the tokens of these steps."""
        new = slice(flight.arrived - flight.steps, flight.arrived)
        return self._tokens[:, new], self._logprobs[:, new]


def loop_over(
    monkeypatch: pytest.MonkeyPatch,
    tokens: Any,
    logprobs: Any,
    end: int | None = None,
    **options: Any,
) -> device_loop.DeviceLoop:
    """Makes a loop whose sequences draw these tokens, (S, steps)."""
    prepared = Prepared(tokens, logprobs)
    monkeypatch.setattr(device_loop, "take_decoder", lambda *_: prepared)
    monkeypatch.setattr(device_loop, "keep_decoder", lambda *_: None)
    model = GPT(GPTConfig(block_size=512, vocab_size=300, n_layer=1, n_embd=16)).to(DEVICE)
    prompts = [[1, 2]] * len(tokens)
    request = make_request(model, prompts, max_new_tokens=tokens.shape[1], **options)
    return device_loop.DeviceLoop(model, request._replace(end_token=end))


@pytest.mark.parametrize(("stop", "end"), ((None, None), ([7], None), (None, 7)))
def test_the_host_takes_no_step_per_token(
    stop: Any, end: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    S, steps = 64, 300
    tokens = np.random.default_rng(0).integers(8, 300, (S, steps), np.int32)
    tokens[::2, 200] = 7
    logprobs = -tokens.astype(np.float32)
    loop = loop_over(monkeypatch, tokens, logprobs, end, stop=stop)
    calls = 0

    def count(_: Any, event: str, __: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        while loop.run(1e9):
            pass
        found = loop.updates()
    finally:
        sys.setprofile(None)
    assert calls < 0.2 * S * steps
    for i, each in enumerate(found):
        length = 200 if (stop or end) and i % 2 == 0 else steps
        assert each.state == ("length" if length == steps else "stop" if stop else "end")
        assert each.tokens == tokens[i, :length].tolist()
        assert each.logprobs == logprobs[i, :length].tolist()


@pytest.mark.parametrize("stop", (None, [7]))
def test_what_is_not_finite_after_a_stop_does_not_matter(
    stop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.full((3, 40), 5, np.int32)
    tokens[1, 20] = 7
    logprobs = np.full((3, 40), -1.0, np.float32)
    logprobs[1, 25:] = math.nan
    loop = loop_over(monkeypatch, tokens, logprobs, stop=stop)
    if stop is None:
        with pytest.raises(DataError, match="the model's logits are not finite for prompt 1"):
            loop.run(1e9)
        assert [len(each.tokens) for each in loop.updates()] == [40, 25, 40]
    else:
        assert not loop.run(1e9)
        assert [each.state for each in loop.updates()] == ["length", "stop", "length"]


def test_as_many_sequences_run_at_once_as_the_memory_holds() -> None:
    model, prompts = model_of(TINY), [[1]] * 5000

    def slots(**options: Any) -> int:
        request = make_request(model, prompts, max_new_tokens=4, **options)
        loop = device_loop.DeviceLoop(model, request._replace(max_new_tokens=0))
        loop._request = request
        return loop._shape(False).slots

    slot_bytes = 2 * 4 * TINY.n_embd * 4  # keys and values of 4 tokens in float32
    assert slots() == device_loop.MOST_SLOTS
    assert slots(max_batch=70) == 80  # rounded up, for a later call of similar size
    assert slots(max_cache_bytes=70 * slot_bytes) == 70
    assert all(n <= slots_bucket(n) <= max(64, 1.25 * n) for n in range(1, 5000))


@pytest.mark.parametrize("dtype", (None, "int8"))
def test_a_kept_decoder_has_the_weights_of_now(
    dtype: str | None, int8_activations: torch.dtype
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.0, "dtype": dtype}
    model = model_of(TINY)
    before = generated(model, [[1, 2]], **options)
    (decoder,) = kept._kept[model]
    assert generated(model, [[1, 2]], **options) == before
    assert kept._kept[model] == [decoder]
    model.wte.weight.data.neg_()  # leaves no trace in the parameter's version
    changed = generated(model, [[1, 2]], **options)
    assert kept._kept[model] == [decoder] and changed != before
    other = model_of(TINY)
    other.wte.weight.data.neg_()
    assert generated(other, [[1, 2]], **options) == changed
    if dtype is None:  # elsewhere in memory now
        model.wte.weight = torch.nn.Parameter(model.wte.weight.data.neg())
        assert generated(model, [[1, 2]], **options) == before
        assert kept._kept[model] != [decoder]


def test_a_kept_decoder_is_not_that_of_another_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """How float32 is multiplied is compiled into its graphs."""
    model, options = model_of(TINY), {"max_new_tokens": 2, "temperature": 0.0}
    for precision, count in (("ieee", 1), ("tf32", 2), ("ieee", 2)):
        monkeypatch.setattr(device_loop, "precision", lambda _, own=precision: own)
        generated(model, [[1, 2]], **options)
        assert len(kept._kept[model]) == count
        assert kept._kept[model][-1].shape.precision == precision


def test_weights_of_8_bits(int8_activations: torch.dtype) -> None:
    """A text that goes past the window, against the rounded weights in float64."""
    model = model_of(replace(TINY, n_layer=2, tie_weights=True), scale=0.5)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    options: dict[str, Any] = {"max_new_tokens": 3, "overflow": "stride:3", "dtype": "int8"}
    (found,) = generated(model, [prompt], **options)
    exact = snapshot(model, "int8").double()
    exact.backend = "reference"
    text, first = list(prompt), 0
    budget = 1e-5 if int8_activations == torch.float32 else 0.05
    for token, logprob in zip(found.tokens, found.logprobs, strict=True):
        if len(text) - first > TINY.block_size:
            first += 3
        logits = exact(torch.tensor([text[first:]], device=DEVICE))[0, -1]
        assert abs(logits.log_softmax(-1)[token] - logprob) <= budget
        text.append(token)
    loop = device_loop.DeviceLoop(model, make_request(model, [prompt], **options), True)
    while loop.run(0.0):
        pass
    assert loop.updates() == [found]  # by copies of all weights


@pytest.mark.parametrize("own", (torch.float32, torch.bfloat16))
def test_weights_of_8_bits_take_8_bits(own: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "multiplies_bf16", lambda device: True)
    model = model_of(replace(TINY, tie_weights=True)).to(own)
    weights = Weights(model, "int8", False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows = [param for name, param in parameters.items() if has_int8(name, param)]
    assert weights.bytes == sum(each.numel() + 4 * len(each) for each in rows)
    assert weights.wte.data_ptr() == model.wte.weight.data_ptr()
    assert weights.dtype == torch.bfloat16
    whole = Weights(model, "int8", True)  # the model may change: the other weights are copies
    others = [param for name, param in parameters.items() if not has_int8(name, param)]
    assert whole.bytes - weights.bytes == sum(each.nbytes for each in others)
    model.wte.weight = torch.nn.Parameter(model.wte.weight.data.clone())
    assert not weights.fits(parameters_of(model))
    assert not whole.fits(parameters_of(model))  # it is no longer tied
    tied = model_of(replace(TINY, tie_weights=True)).to(own)
    halves = Weights(tied, "bf16", True)
    assert halves.bytes == 2 * sum(each.numel() for each in tied.parameters())
    assert halves.head[1] is halves.wte


def test_a_weight_may_be_a_plain_tensor() -> None:
    model, other = model_of(TINY), model_of(TINY)
    layer: Any = other.h[0].attn.c_attn
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    options: dict[str, Any] = {"max_new_tokens": 3, "temperature": 0.0}
    assert generated(other, [[1], [2, 3]], **options) == generated(model, [[1], [2, 3]], **options)


def test_a_decoder_serves_calls_in_and_out_of_inference_mode() -> None:
    model, options = model_of(TINY), {"max_new_tokens": 3, "temperature": 0.0}
    with torch.inference_mode():
        first = generated(model, [[1, 2]], **options)
    assert generated(model, [[1, 2]], **options) == first


@pytest.mark.parametrize("layers", (1, 12, 500))
def test_a_graph_has_at_least_eight_steps(layers: int) -> None:
    assert 8 <= unrolled(layers) <= 32


def test_slots_without_a_sequence_read_within_the_tables() -> None:
    model = model_of(TINY)
    request = make_request(model, [[1, 2], [3], [4]], max_new_tokens=3)
    for _ in range(2):  # a new decoder, and the same one kept
        loop = device_loop.DeviceLoop(model, request)
        decoder = loop._own_decoder
        assert decoder._progress.lengths.tolist() == [1] * 4  # positions count from 1
        while loop.run(1e9):
            pass
        assert decoder._progress.lengths[3] == 1 and bool(decoder._logits.isfinite().all())


def test_work_on_several_streams_is_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []

    def stream(name: str) -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda other: waits.append(name + other.name))

    a, b, c = map(stream, "abc")
    current = [a]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[0])
    order = decoder.Order(torch.device("cuda"))
    for each in (a, b, b, c):
        current[0] = each
        order.begin()
        order.end()
    assert waits == ["ba", "ab", "ab", "cb", "ac"]


def test_a_decoder_serves_one_loop_at_a_time() -> None:
    model = model_of(TINY)
    request = make_request(model, [[1, 2]], max_new_tokens=4, temperature=0.0)
    expected = generated(model, [[1, 2]], max_new_tokens=4, temperature=0.0)
    loops = [device_loop.DeviceLoop(model, request, lasting=True) for _ in range(2)]
    while [loop for loop in loops if loop.run(0.0)]:
        pass
    assert [loop.updates() for loop in loops] == [expected, expected]


def test_a_model_without_attention() -> None:
    config = GPTConfig(block_size=4, vocab_size=5, n_layer=2, n_embd=16, attention=False)
    model = model_of(config).eval()
    found = generated(model, [[1], [2, 3]], max_new_tokens=6, temperature=0.0)
    for each, prompt in zip(found, ([1], [2, 3]), strict=True):
        text = list(prompt)
        for token in each.tokens:
            model.backend = "reference"
            logits = model(torch.tensor([text[-4:]], device=DEVICE))[0, -1]
            assert int(logits.argmax()) == token
            text.append(token)


def test_a_graph_is_captured_on_a_stream_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[Any] = []

    @contextmanager
    def capturing(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        streams.append(stream)
        yield

    stream = SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    model = GPT(TINY).to(DEVICE)
    shape = Shape(TINY, None, False, 2, 4, kind_of(Sampling(), 11), "ieee")
    Decoder(shape, Weights(model, None, False))._captured(lambda: None)
    assert streams == [stream]  # not on a stream of the first device that captured a graph
