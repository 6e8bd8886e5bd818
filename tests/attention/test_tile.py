"""Gradients of keys that many calls share are as precise on every rank, in whichever column of the grid it stands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_attn2d.attention.kernels.reference import ReferenceKernel
from megatron_attn2d.attention.layout import CAUSAL, FULL, Band, Mask, TilePlan, place_ranks, tile_plan
from megatron_attn2d.attention.pieces import Slots
from megatron_attn2d.attention.tile import Queries, Scores, differentiate

SIZE, RANKS, CHUNK = 8, 64, 16
GRID = place_ranks(SIZE, SIZE, SIZE, 1)


def gradients(plan: TilePlan, dtype: torch.dtype) -> list[Tensor]:
    """dk and dv of a tile, from inputs that are the same in every dtype."""
    generator = torch.Generator().manual_seed(0)

    def chunks(slots: int) -> Tensor:
        return torch.randn(slots, CHUNK, 1, 1, 16, generator=generator).bfloat16().to(dtype)

    queries, keys = len(plan.queries), len(plan.keys)
    q, dout, k, v = chunks(queries), chunks(queries), chunks(keys), chunks(keys)
    delta = torch.randn(queries, 1, 1, CHUNK, generator=generator).to(torch.promote_types(dtype, torch.float32))
    found = differentiate(
        plan, Scores(ReferenceKernel(), 0.25, RANKS), Queries(q, dout, torch.full_like(delta, 7), delta, None), k, v
    )

    def stacked(slots: Slots) -> Tensor:
        return torch.stack([torch.stack(slot).sum(0) for slot in slots])

    return [stacked(found.dk), stacked(found.dv)]


@pytest.mark.parametrize(
    "mask",
    [
        Mask(FULL, RANKS, (CHUNK,)),
        Mask(CAUSAL, RANKS, (CHUNK,)),
        Mask(FULL, RANKS, (CHUNK,), (2 * RANKS * CHUNK - 5,)),
        Mask(CAUSAL, RANKS, (CHUNK,), (2 * RANKS * CHUNK - 5,)),
        Mask(Band(1500, 1500), RANKS, (CHUNK,)),
    ],
    ids=["full", "causal", "full, padded", "causal, padded", "window"],
)
@pytest.mark.parametrize("column", [0, SIZE - 1])
def test_few_roundings_however_many_calls(mask: Mask, column: int) -> None:
    plan = tile_plan(GRID[3], tuple(row[column] for row in GRID), mask)
    for narrow, wide in zip(gradients(plan, torch.bfloat16), gradients(plan, torch.float64), strict=True):
        # One rounding to bf16 is 1.7e-3, a plain mask's four are 2.8e-3; each of sixteen calls rounding made it 5.3e-3.
        assert ((narrow.double() - wide).norm() / wide.norm()).item() < 3.2e-3
