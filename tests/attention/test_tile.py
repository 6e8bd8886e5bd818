"""One tile: how many calls it makes, and how precise gradients are that they share, in whichever column it stands."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_attn2d.attention.kernels.base import BackwardRows
from megatron_attn2d.attention.kernels.reference import ReferenceKernel
from megatron_attn2d.attention.layout import CAUSAL, FULL, Band, place_ranks, tile_plan
from megatron_attn2d.attention.packing import Packing
from megatron_attn2d.attention.partials import Slots
from megatron_attn2d.attention.tile import (
    AttentionOp,
    Tile,
    attend,
    attend_diagonal,
    differentiate,
    differentiate_diagonal,
)

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
    queries_of = BackwardRows(q, dout, torch.full_like(delta, 7), delta, None)
    found = differentiate(tile, AttentionOp(ReferenceKernel(), 0.25), queries_of, [k, v])

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


class Counts(ReferenceKernel):
    """Takes tables, finds nothing, and counts its calls."""

    def __init__(self) -> None:
        self.forward_calls = self.backward_calls = 0

    def forward_segments(self, *_: Any, **__: Any) -> None:
        self.forward_calls += 1

    def backward_segments(self, *_: Any, **__: Any) -> None:
        self.backward_calls += 1


def calls_of(rows: int, cols: int, documents: int, band: Band, padded: bool) -> list[tuple[int, int]]:
    """Kernel calls forward and backward of each rank of a grid, whose tile holds so many documents."""
    ranks, found = place_ranks(rows, cols, rows, 1), []
    places = [4 * rows * cols * (1 + i % 3) for i in range(documents)]
    lengths = [place - (i % 2 + 1 if padded else 0) for i, place in enumerate(places)]
    totals = [[0, *accumulate(x)] for x in (lengths, [*places[:-1], places[-1] + 2 * rows * cols])]
    packing = Packing.of(*totals, totals[1][-1], rows * cols, torch.device("cpu"))
    for row in ranks:
        for rank, column in zip(row, zip(*ranks, strict=True), strict=True):
            plan = tile_plan(tuple(row), tuple(column), packing.mask(band))
            tile, kernel = Tile(plan, packing, band, rank), Counts()
            op: Any = AttentionOp(kernel, 1.0)  # type: ignore[arg-type]
            x, *others = (torch.zeros(n, packing.tokens, 1, 1, 1) for n in (2, len(plan.queries), len(plan.keys)))
            q, k = (y.flatten(0, 1).unsqueeze(0) for y in others)
            own_statistic, statistic = (y[..., 0].permute(0, 2, 3, 1) for y in (x, q))
            attend(tile, op, q, k, k)
            attend_diagonal(tile, op, x, x, x)
            differentiate(tile, op, BackwardRows(q, q, statistic, statistic, None), [k, k])
            differentiate_diagonal(tile, op, BackwardRows(x, x, own_statistic, own_statistic, None), x, x)
            found.append((kernel.forward_calls, kernel.backward_calls))
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("band", [FULL, CAUSAL, Band(1, 0), Band(1, 2)], ids=str)
@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (4, 1), (2, 3)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_as_many_calls_for_a_thousand_documents_as_for_three(shape: tuple[int, int], band: Band, padded: bool) -> None:
    """Documents of three lengths."""
    many = calls_of(*shape, 999, band, padded)
    assert calls_of(*shape, 3, band, padded) == many
    if band in (FULL, CAUSAL):  # at most four rectangles and the own chunks
        assert max(map(max, many)) <= 5
