"""Gradients of keys that many calls share are as precise on every rank, in whichever column of the grid it stands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_attn2d.attention.kernels.reference import ReferenceKernel
from megatron_attn2d.attention.layout import CAUSAL, FULL, Band, place_ranks, tile_plan
from megatron_attn2d.attention.packing import Packing
from megatron_attn2d.attention.pieces import Slots
from megatron_attn2d.attention.tile import Queries, Scores, Tile, differentiate

SIZE, RANKS, CHUNK = 8, 64, 16
GRID = place_ranks(SIZE, SIZE, SIZE, 1)
TOKENS = 2 * RANKS * CHUNK


def gradients(tile: Tile, dtype: torch.dtype) -> list[Tensor]:
    """dk and dv of a tile, from inputs that are the same in every dtype."""
    generator = torch.Generator().manual_seed(0)

    def chunks(slots: int) -> Tensor:
        return torch.randn(slots, CHUNK, 1, 1, 16, generator=generator).bfloat16().to(dtype)

    queries, keys = len(tile.plan.queries), len(tile.plan.keys)
    q, dout, k, v = tile.in_order([chunks(queries), chunks(queries), chunks(keys), chunks(keys)], travel=True)
    delta = torch.randn(queries, 1, 1, CHUNK, generator=generator).to(torch.promote_types(dtype, torch.float32))
    delta = tile.statistics_in_order(delta)
    queries_of = Queries(q, dout, torch.full_like(delta, 7), delta, None)
    found = differentiate(tile, Scores(ReferenceKernel(), 0.25), queries_of, k, v)

    def stacked(slots: Slots) -> Tensor:
        return torch.stack([torch.stack(slot).sum(0) for slot in slots])

    return [stacked(found.dk), stacked(found.dv)]


@pytest.mark.parametrize(
    ("band", "length"),
    [(FULL, TOKENS), (CAUSAL, TOKENS), (FULL, TOKENS - 5), (CAUSAL, TOKENS - 5), (Band(1500, 1500), TOKENS)],
    ids=["full", "causal", "full, padded", "causal, padded", "window"],
)
@pytest.mark.parametrize("column", [0, SIZE - 1])
def test_few_roundings_however_many_calls(band: Band, length: int, column: int) -> None:
    packing = Packing.of([0, length], [0, TOKENS], TOKENS, RANKS, torch.device("cpu"))
    plan = tile_plan(GRID[3], tuple(row[column] for row in GRID), packing.mask(band))
    tile = Tile(plan, packing, band, GRID[3][column])
    for narrow, wide in zip(gradients(tile, torch.bfloat16), gradients(tile, torch.float64), strict=True):
        # One rounding to bf16 is 1.7e-3, a plain mask's four are 2.8e-3; each of sixteen calls rounding made it 5.3e-3.
        assert ((narrow.double() - wide).norm() / wide.norm()).item() < 3.2e-3
