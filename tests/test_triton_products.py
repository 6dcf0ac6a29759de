"""The products of gptfast's Triton kernels: every tile, both ways to read operands, launches."""

from typing import Any

import pytest
import torch
from peers import ffn as torch_ffn
from test_ffn import block
from test_triton import there, where

from gptfast import ops
from gptfast.ops import reference
from gptfast.ops.triton import linear
from gptfast.testing import check_op

assert where  # the fixture that runs every test in the interpreter or on a GPU

TILES = [
    *((tile, torch.float16, 40) for tile in linear.DESCRIBED_TILES),
    *((tile, torch.float16, 36) for tile in linear.POINTER_TILES[2]),
    *((tile, torch.float32, 40) for tile in linear.POINTER_TILES[4]),
]


@pytest.mark.parametrize(("tile", "dtype", "C"), TILES, ids=str)
def test_ffn_with_every_tile(
    tile: linear.Tile, dtype: torch.dtype, C: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []

    def choose(tiles: Any, *_: int) -> linear.Tile:
        chosen.append(tiles)
        return tile

    monkeypatch.setattr(linear, "choose_tile", choose)
    args = (ops.layer_norm_ffn, reference.layer_norm_ffn, torch_ffn)
    check_op(*args, there(*block(300, C, 7 * C)), dtype, dropout_p=0.3, seed=7)
    assert all(tile in tiles for tiles in chosen)
