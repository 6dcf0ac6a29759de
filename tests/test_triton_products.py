"""The products of gptfast's Triton kernels: every tile, both ways to read operands, launches."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from launches import Launches
from peers import ffn as torch_ffn
from test_attention import heads
from test_ffn import block
from test_linear import normal, torch_layer_norm_linear
from test_self_attention import attention_block
from test_triton import DEVICE, needs_numbers, there, where
from torch import Tensor

from gptfast import ops
from gptfast.ops import reference
from gptfast.ops.triton import casts, ffn, launch, linear, products, rows, self_attention
from gptfast.ops.triton.launch import dropout_args
from gptfast.testing import check_op

assert where  # the fixture that runs every test in the interpreter or on a GPU

TILES = [
    *((tile, torch.float16, 40) for tile in products.DESCRIBED_TILES),
    *((tile, torch.float16, 40) for tile in products.EPILOGUE_TILES),
    *((tile, torch.float16, 36) for tile in products.POINTER_TILES[2]),
    *((tile, torch.float32, 40) for tile in products.POINTER_TILES[4]),
]


@pytest.mark.parametrize(("tile", "dtype", "C"), TILES, ids=str)
def test_ffn_with_every_tile(
    tile: products.Tile, dtype: torch.dtype, C: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []

    def choose(tiles: Any, *_: int) -> products.Tile:
        chosen.append(tiles)
        return tile

    monkeypatch.setattr(products, "choose_tile", choose)
    args = (ops.layer_norm_ffn, reference.layer_norm_ffn, torch_ffn)
    check_op(*args, there(*block(140, C, 7 * C)), dtype, dropout_p=0.3, seed=7)
    assert any(tile in tiles for tiles in chosen)


@needs_numbers
def test_a_row_has_the_same_bits_with_every_tile_and_way_to_read_operands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The interpreter's products would differ: numpy's BLAS sums edges of tiles in another order.
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("ik,kj->ij", a, b, dtype=dtype))
    a, bias, residual = (
        normal(*size).to(DEVICE).half() for size in ((150, 72), (136,), (150, 136))
    )
    w = normal(136, 72, seed=3).to(DEVICE).half()

    def results() -> tuple[Tensor, ...]:
        before = torch.empty_like(residual)
        y = linear.multiply(a, w.t(), bias=bias, residual=residual, gelu="tanh", before=before)
        alone = linear.multiply(a[77:78], w.t(), bias=bias, residual=residual[77:78], gelu="tanh")
        assert torch.equal(alone[0], y[77])
        return y, before

    described = *products.DESCRIBED_TILES, *products.EPILOGUE_TILES
    for descriptors, tiles in ((True, described), (False, products.POINTER_TILES[2])):
        monkeypatch.setattr(products, "has_descriptors", lambda _, have=descriptors: have)
        found = []
        for tile in tiles:
            monkeypatch.setattr(products, "choose_tile", lambda *_, tile=tile: tile)
            found.append(results())
        for each in found[1:]:
            assert all(torch.equal(got, same) for got, same in zip(each, found[0], strict=True))


@pytest.mark.parametrize(
    ("K", "N", "dtype", "how"),
    (
        (64, 24, torch.float16, ("columns", "rows")),
        (64, 20, torch.float16, ("columns", None)),  # rows of b (K, N) are 40 bytes apart
        (60, 24, torch.float16, (None, None)),
        (64, 24, torch.bfloat16, ("columns", "rows")),
        (64, 24, torch.float32, (None, None)),
    ),
)
def test_what_descriptors_can_read(
    K: int, N: int, dtype: torch.dtype, how: tuple[str | None, ...]
) -> None:
    for M in (1, 7, 500):
        a = torch.empty(M, K, dtype=dtype, device=DEVICE)
        weight, other = a.new_empty(N, K), a.new_empty(K, N)
        assert (products.described(a, weight.t()), products.described(a, other)) == how
    assert products.described(a, a.new_empty(K, 2 * N)[:, :N]) is None
    assert products.described(a, a.new_empty(K, 2 * N)[:, ::2]) is None


def test_operands_that_start_anywhere() -> None:
    inputs = there(normal(30, 64), normal(64, seed=3), None, normal(24, 64), normal(24, seed=2))
    shifted = []
    for x in inputs:
        if x is not None:
            x = x.half()
            x = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
        shifted.append(x)
    assert shifted[3].data_ptr() % 16 == 2
    args = (ops.layer_norm_linear, reference.layer_norm_linear, torch_layer_norm_linear)
    check_op(*args, shifted, torch.float16)


def test_the_choice_of_a_tile() -> None:
    tiles = products.DESCRIBED_TILES
    large, small = tiles
    for (M, N), tile in {(16384, 768): large, (4096, 1536): large, (1024, 128): small}.items():
        assert products.choose_tile(tiles, M, N, 2, 132, 232448) == tile
        assert products.choose_tile(tiles, M, N, 2, 132, 101376) == small  # does not fit


ATTENTION = ("forward_kernel", "query_grad_kernel", "key_grads_kernel")


@needs_numbers
@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
def test_launches_of_a_layer(dropout_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without those of attention, 18 for forward and backward of both sublayers."""
    x, *params = there(*block(40, 32, 128))
    h, *others = there(*attention_block(2, 20, 32))
    assert x is not None and h is not None
    seed = torch.tensor(3, device=DEVICE)
    options: Any = "tanh", dropout_p, seed if dropout_p else None, 1
    launches = Launches(monkeypatch)
    dropping = {"dropout_kernel": 1} if dropout_p else {}

    def launched(op: Any, *args: Any) -> tuple[Any, Counter[str]]:
        launches.names.clear()
        with launches:
            results = op(*args)
        return results, Counter(name for name in launches.names if name not in ATTENTION)

    (_, *kept), found = launched(ffn.ffn, x, *params, *options, True)
    assert found == Counter(layer_norm_kernel=1, linear_kernel=2)
    _, found = launched(ffn.ffn_backward, x, x, *params, *kept, *options, 0b1111111)
    assert found == Counter(
        hidden_grad_kernel=1, norm_grad_kernel=1, addmm=3, add_parts_kernel=1, **dropping
    )
    options = 2, 0.0, 0, *options[1:]
    (_, *kept), found = launched(self_attention.self_attention, h, *others, *options, True)
    assert found == Counter(layer_norm_kernel=1, linear_kernel=2)
    backward = self_attention.self_attention_backward
    _, found = launched(backward, h, h, *others, *kept, *options, 0b1111111)
    # Attention's kernels sum the columns of dqkv.
    assert found == Counter(norm_grad_kernel=1, addmm=4, add_parts_kernel=1)


def test_any_gradients_of_a_sublayer() -> None:
    """Each is the one that is computed with all others, up to the order of a sum."""
    x, *params = there(*block(40, 32, 128))
    h, *others = there(*attention_block(2, 20, 32))
    options: Any = "tanh", 0.2, torch.tensor(3, device=DEVICE), 1
    for forward, backward, given, rest in (
        (ffn.ffn, ffn.ffn_backward, (x, *params), options),
        (
            self_attention.self_attention, self_attention.self_attention_backward, (h, *others),
            (2, 0.3, 5, *options[1:]),
        ),
    ):  # fmt: skip
        _, *kept = forward(*given, *rest, True)
        every = backward(given[0], *given, *kept, *rest, 0b1111111)
        some = {
            wanted: backward(given[0], *given, *kept, *rest, wanted)
            for wanted in (*range(0, 128, 11), 0b0001000, 0b1100000)
        }
        for wanted, i in itertools.product(some, range(7)):
            grad = some[wanted][i]
            if wanted >> i & 1:
                torch.testing.assert_close(grad, every[i], rtol=1e-5, atol=1e-5)
            else:
                assert i == 0 or grad.numel() == 0


@needs_numbers
def test_two_weights_are_cast_by_one_launch() -> None:
    a, b = normal(70, 66).to(DEVICE), normal(3, 5, seed=2).to(DEVICE)
    with launch.counted() as launches:
        for got, weight in zip(casts.cast(torch.half, a, b), (a, b), strict=True):
            assert torch.equal(got, weight.half())
        assert casts.cast(torch.float32, a, b)[0] is a
    assert launches == Counter(cast_kernel=1)
    padded = casts.padded(b, 64, torch.half)
    assert torch.equal(padded[:3], b.half()) and not padded[3:].any()


@needs_numbers
@pytest.mark.parametrize("gelu", ("erf", "tanh"))
def test_gelu_and_its_slope(gelu: str) -> None:
    """Their errors are roundings of float32, also where 1 - Phi(u) is small, and far out."""
    far = torch.tensor([-1e15, -1e4, -40.0, -13.0, 13.0, 40.0, 1e4, 1e15])
    u = torch.cat([torch.linspace(-8, 8, 4088), far]).view(64, 64).to(DEVICE)
    d, w2 = torch.zeros(64, 16, device=DEVICE), torch.ones(16, 64, device=DEVICE)
    d[:, 0] = 1.0  # d w2 = 1
    slope, value, _ = ffn._hidden_grad(d, w2, u, gelu, True, False)
    exact = u.double().requires_grad_()
    approximate = "none" if gelu == "erf" else "tanh"
    value_exact = torch.nn.functional.gelu(exact, approximate=approximate)
    value_exact.sum().backward()
    assert exact.grad is not None
    assert (slope - exact.grad).abs().max() < 6e-7
    assert ((value - value_exact).abs() / exact.abs().clamp(1.0)).max() < 5e-7
    # torch's GELU of infinity depends on the processor's vectors.
    u.view(-1)[:4] = torch.tensor([math.inf, -math.inf, 1e38, -1e38])
    _, value, _ = ffn._hidden_grad(d, w2, u, gelu, True, False)
    expected = torch.tensor([math.inf, math.nan, 1e38, 0.0])
    torch.testing.assert_close(value.view(-1)[:4].cpu(), expected, equal_nan=True)


@needs_numbers
def test_the_backward_of_a_sublayer_casts_the_weights_that_it_reads() -> None:
    """Of two float32 weights the second one alone is cast where no gradient reaches the first."""
    x, *params = there(*block(20, 32, 128))
    h, *others = there(*attention_block(1, 20, 32))
    options: Any = "tanh", 0.0, None, 1
    for forward, backward, given, rest in (
        (ffn.ffn, ffn.ffn_backward, (x.half(), *params), options),
        (
            self_attention.self_attention, self_attention.self_attention_backward,
            (h.half(), *others), (2, 0.0, 0, *options[1:]),
        ),
    ):  # fmt: skip
        _, *kept = forward(*given, *rest, True)
        for wanted, casts_of_two in ((0b1111111, 1), (0b0011000, 0), (0b1100000, 0)):
            with launch.counted() as counts:
                backward(given[0], *given, *kept, *rest, wanted)
            assert counts["cast_kernel"] == casts_of_two


@needs_numbers
def test_sums_of_many_rows() -> None:
    x = heads(1, 1, 3000, 200)[0, 0].to(DEVICE)
    outs = [torch.empty(n, dtype=d, device=DEVICE) for n, d in ((200, x.dtype), (7, torch.half))]
    sums = rows.Sums()
    parts = rows.column_sums(x)
    got = [sums.of(out, parts[:, : out.numel()]) for out in outs]
    sums.add()
    for y, dtype in zip(got, (torch.float32, torch.float16), strict=True):
        exact = x.double().sum(0)[: y.numel()]
        assert y.dtype == dtype and torch.allclose(y.double(), exact, atol=1e-2)
    x = x if x.is_cuda else x[:200]  # the interpreter takes long to draw masks
    d, parts = rows.dropped_and_sums(x, dropout_args(0.2, torch.tensor(5), 1, x.device))
    assert torch.equal(d, rows.dropped(x, dropout_args(0.2, torch.tensor(5), 1, x.device)))
    assert torch.allclose(parts.sum(0), d.sum(0), atol=1e-3)
