"""Shards of a sequence, and the whole of them, against the layout written down as an index."""

from __future__ import annotations

import re
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_attn2d import Grid, attention2d, zigzag
from tests.attention import dense
from tests.pool import RankPool

PLACES = (8, 24, 16)
TOTALS = tuple(accumulate(PLACES, initial=0))


def rank_of(rank: int, ranks: int) -> Any:
    """What a process group says of itself, without one."""
    return SimpleNamespace(rank=lambda: rank, size=lambda: ranks)


@pytest.mark.parametrize("rank", range(4))
def test_a_shard_is_its_two_chunks_at_their_positions(rank: int) -> None:
    place, x = rank_of(rank, 4), torch.randn(3, 48, 2, requires_grad=True)
    held = dense.zigzag(48, 4, rank)
    assert torch.equal(zigzag.indices(48, place), held)
    assert torch.equal(zigzag.positions(48, place), held)
    part = zigzag.shard(x, place, dim=1)
    assert torch.equal(part, x[:, held])
    assert torch.autograd.grad(part.sum(), x)[0].sum() == part.numel()

    packed = dense.packed_zigzag(PLACES, 4, rank)
    assert torch.equal(zigzag.indices(48, place, cu_seqlens=TOTALS), packed)
    assert torch.equal(zigzag.indices(48, place, cu_seqlens=torch.tensor(TOTALS)), packed)
    assert torch.equal(zigzag.indices(48, place, cu_seqlens=TOTALS[:-1]), packed), "what follows the last is padding"
    own = torch.cat([torch.arange(n) for n in PLACES])
    assert torch.equal(zigzag.positions(48, place, cu_seqlens=TOTALS), own[packed])
    assert torch.equal(zigzag.shard(x, place, dim=-2, cu_seqlens=TOTALS), x[:, packed])


@pytest.mark.parametrize(
    ("tokens", "cu_seqlens", "message"),
    [
        (50, None, "50 tokens can't be cut into 2 * cp = 8 chunks: choose 48 or 56"),
        (4, None, "choose 8"),
        (48, (0, 12, 48), "packed sequence 0 takes 12 tokens, no multiple of 2 * cp = 8"),
        (48, (0, 56), "packed sequences take 56 of 48 tokens"),
    ],
)
def test_what_has_no_chunks_is_refused(tokens: int, cu_seqlens: tuple[int, ...] | None, message: str) -> None:
    for read in (zigzag.indices, zigzag.positions):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(tokens, rank_of(0, 4), cu_seqlens=cu_seqlens)


def there_and_back(rank: int) -> float:
    """The largest error of attention on shards, put together again, on grids whose ranks lie in any order."""
    world = dist.group.WORLD
    assert world is not None
    x = torch.arange(48.0).view(48, 1).expand(48, 3)
    shuffled = DeviceMesh("cpu", torch.tensor([[2, 0], [3, 1]]))
    grids = (
        *(Grid.from_group(world, rows=rows, cols=4 // rows) for rows in (1, 2, 4)),
        Grid.from_group(world, rows=1, cols=2, ulysses_size=2),
        Grid.from_group(world, rows=2, cols=2, node_block=(1, 2)),
        Grid.from_mesh(shuffled),
    )
    error = 0.0
    for place in (world, *grids):
        for dim, totals in ((0, None), (1, None), (0, TOTALS)):
            whole = x.transpose(0, dim)
            part = zigzag.shard(whole, place, dim=dim, cu_seqlens=totals)
            assert torch.equal(zigzag.unshard(part, place, dim=dim, cu_seqlens=totals), whole)
    q, k, v, _ = dense.inputs(48, 2, (2, 2))
    for grid in grids:
        out = zigzag.unshard(attention2d(*(zigzag.shard(t, grid) for t in (q, k, v)), grid), grid)
        error = max(error, (out - dense.dense_attention(q, k, v, causal=True)).abs().max().item())
    return error


def test_shards_are_the_whole_again_on_any_grid(pool: RankPool) -> None:
    assert max(pool.run(there_and_back, 4)) <= 1e-12


@pytest.mark.parametrize(
    ("shape", "doubted"),
    [
        ((512, 2, 4, 8), False),
        ((2, 512, 4, 8), True),  # [b, s, heads, d]
        ((2, 4, 512, 8), True),  # [b, heads, s, d], as torch's own attention takes
        ((2, 64, 4, 8), False),  # may be meant: nobody can tell
        ((64, 128, 4, 8), False),
        ((64, 1, 128, 8), False),
    ],
)
def test_an_order_of_dims_that_can_only_be_meant_otherwise_is_doubted(
    shape: tuple[int, ...], doubted: bool, recwarn: pytest.WarningsRecorder
) -> None:
    q = torch.zeros(shape)
    attention2d(q, q, q, Grid.single())
    told = [warning for warning in recwarn if "Are its dims in another order?" in str(warning.message)]
    assert len(told) == doubted
    if doubted:
        assert told[0].filename == __file__
        read_as = f"q {list(shape)} is read as [s/cp, b, heads, head dim]: {shape[1]} sequences of 2"
        assert str(told[0].message).startswith(read_as)
