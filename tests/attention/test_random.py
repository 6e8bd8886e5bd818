"""Grids, heads, masks, packing, memory layouts and orders of computation drawn at random, against dense float64.

Tables test each of them alone or in pairs; what goes wrong where three meet is found here. A draw that fails prints
itself, and `attend(rank, draw)` repeats it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention import call as api
from megatron_attn2d.attention import overlap
from megatron_attn2d.attention.kernels.reference import ReferenceKernel
from tests.attention.dense import batch_first, dense_gradients, inputs, packed_gradients, packed_zigzag, zigzag
from tests.attention.test_gpu_path import AsksForTheOutput
from tests.pool import RankPool

DIMS = (6, 8)


@dataclass(frozen=True)
class Draw:
    """One call. `packs`: for each sequence its length in units of 2 * cp, and by how many tokens it is shorter."""

    axes: tuple[int, int, int]
    tile: tuple[int, int] | None
    heads: tuple[int, int]
    head_groups: int
    batch: int
    chunk: int
    causal: bool
    window: tuple[int, int]
    packs: tuple[tuple[int, int], ...]
    batch_first: tuple[bool, ...]
    ring: bool
    asks_for_output: bool
    keeps_back: bool

    @property
    def size(self) -> int:
        return self.axes[0] * self.axes[1] * self.axes[2]


def draw(dice: random.Random) -> Draw:
    size = dice.choice([2, 3, 4, 6, 8])
    u = dice.choice(divisors(size))
    rows = dice.choice(divisors(size // u))
    cols = size // u // rows
    key_heads = dice.choice([g for g in range(1, 9) if g % u == 0 or u % g == 0])
    per_key = dice.choice([1, 2, 3])
    heads = key_heads * per_key * (u // key_heads if u > key_heads else 1)
    causal = dice.random() < 0.7
    window = (dice.randint(0, 20), 0 if causal else dice.randint(0, 9))
    return Draw(
        axes=(u, rows, cols),
        tile=dice.choice([None, (dice.choice(divisors(rows)), dice.choice(divisors(cols)))]),
        heads=(heads, key_heads),
        head_groups=dice.choice(divisors(key_heads)),
        batch=dice.randint(1, 3),
        chunk=dice.choice([1, 2, 3, 5]),
        causal=causal,
        window=dice.choice([(-1, -1), window]),
        packs=dice.choice([(), tuple((dice.randint(1, 3), dice.randint(0, 3)) for _ in range(dice.randint(1, 4)))]),
        batch_first=tuple(dice.random() < 0.5 for _ in range(3)),
        ring=dice.random() < 0.1,
        asks_for_output=dice.random() < 0.5,
        keeps_back=dice.random() < 0.5,
    )


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def problem(one: Draw, rank: int) -> tuple[list[Tensor], list[Tensor], Tensor, dict[str, Any]]:
    """q, k, v, dout of all ranks; O, dQ, dK, dV; which positions are this rank's; how packed."""
    how = one.causal, one.window
    if not one.packs:
        whole = inputs(2 * one.size * one.chunk, one.batch, one.heads, DIMS)
        return list(whole), list(dense_gradients(*whole, *how)), zigzag(whole[0].size(0), one.size, rank), {}
    unit = 2 * one.size
    lengths = [max(1, units * unit - less) for units, less in one.packs]
    places = [-(-length // unit) * unit for length in lengths]
    whole = tuple(x.squeeze(1) for x in inputs(sum(places), 1, one.heads, DIMS))
    totals = {"cu_seqlens": [0, *accumulate(lengths)], "cu_seqlens_padded": [0, *accumulate(places)]}
    return list(whole), packed_gradients(whole, lengths, places, *how), packed_zigzag(places, one.size, rank), totals


def attend(rank: int, one: Draw) -> float:
    """Largest absolute error of O, dQ, dK, dV on this rank."""
    whole, expected, mine, packed = problem(one, rank)
    shards = [x[mine] for x in whole[:3]]
    if not packed:
        shards = [batch_first(x) if first else x for x, first in zip(shards, one.batch_first, strict=True)]
    leaves = [x.requires_grad_() for x in shards]
    group = dist.group.WORLD
    assert group is not None
    call: dict[str, Any] = {"causal": one.causal, "window": one.window, **packed}
    kernel = AsksForTheOutput() if one.asks_for_output else ReferenceKernel()
    with (
        mock.patch.object(api, "choose_kernel", return_value=kernel),
        mock.patch.object(overlap, "SMALLEST_HALF", 0.0 if one.keeps_back else float("inf")),
    ):
        if one.ring:
            out = ring_attention(*leaves, group, **call)
        else:
            u, rows, cols = one.axes
            grid = Grid.from_group(group, ulysses_size=u, rows=rows, cols=cols, node_block=one.tile)
            out = attention2d(*leaves, grid, overlap_groups=one.head_groups, **call)
        found = (out, *torch.autograd.grad(out, leaves, whole[3][mine]))
    return max((a - b[mine]).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_random_calls(pool: RankPool, seed: int) -> None:
    dice = random.Random(seed)
    for one in [draw(dice) for _ in range(40)]:
        print(one)  # which failed
        assert max(pool.run(attend, one.size, one)) <= 1e-12


def test_a_shard_of_another_memory_order_is_carried_to_other_nodes(pool: RankPool) -> None:
    """Found so: a chunk that a rank only carries landed in a buffer with the strides of the own shard."""
    one = Draw(
        axes=(1, 2, 4),
        tile=(2, 2),
        heads=(3, 3),
        head_groups=1,
        batch=3,
        chunk=3,
        causal=True,
        window=(5, 0),
        packs=(),
        batch_first=(True, True, True),
        ring=False,
        asks_for_output=False,
        keeps_back=False,
    )
    assert max(pool.run(attend, one.size, one)) <= 1e-12
