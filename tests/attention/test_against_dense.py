"""attention2d and ring attention on 1 to 8 ranks against the dense float64 reference, outputs and gradients."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention import overlap
from tests.attention.dense import dense_gradients, inputs, zigzag
from tests.pool import RankPool

HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
GRIDS = [(r, p // r) for p in (1, 2, 3, 4, 6, 8) for r in range(1, p + 1) if p % r == 0]


def errors(
    rank: int,
    mode: str,
    shape: tuple[int, int],
    heads: tuple[int, int],
    batch: int,
    causal: bool,
    chunk: int = 3,
    head_groups: int = 1,
    dtype: torch.dtype = torch.float64,
    smallest_half: float = overlap.SMALLEST_HALF,
) -> list[float]:
    """Largest absolute errors of O, dQ, dK, dV on this rank."""
    size = dist.get_world_size()
    whole = inputs(2 * size * chunk, batch, heads, dims=(8, 6), dtype=dtype)
    mine = zigzag(2 * size * chunk, size, rank)
    q, k, v = (x[mine].requires_grad_() for x in whole[:3])
    assert dist.group.WORLD is not None
    with mock.patch.object(overlap, "SMALLEST_HALF", smallest_half):
        if mode == "ring":
            out = ring_attention(q, k, v, dist.group.WORLD, causal=causal)
        else:
            grid = Grid.from_group(dist.group.WORLD, rows=shape[0], cols=shape[1])
            out = attention2d(q, k, v, grid, causal=causal, overlap_groups=head_groups)
        results = (out, *torch.autograd.grad(out, (q, k, v), whole[3][mine]))
    references = dense_gradients(*whole, causal)
    return [(a.double() - b[mine]).abs().max().item() for a, b in zip(results, references, strict=True)]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
def test_attention2d(pool: RankPool, grid: tuple[int, int], heads: str, batch: int, causal: bool) -> None:
    found = pool.run(errors, grid[0] * grid[1], "attention2d", grid, HEADS[heads], batch, causal)
    assert max(map(max, found)) <= 1e-12, found


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_ring(pool: RankPool, ranks: int, heads: str, batch: int, causal: bool) -> None:
    found = pool.run(errors, ranks, "ring", (1, ranks), HEADS[heads], batch, causal)
    assert max(map(max, found)) <= 1e-12, found


@pytest.mark.parametrize("head_groups", [2, 4])
@pytest.mark.parametrize("grid", [(1, 4), (2, 2), (4, 1), (2, 3), (3, 2), (2, 4)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_head_groups(pool: RankPool, grid: tuple[int, int], head_groups: int) -> None:
    found = pool.run(errors, grid[0] * grid[1], "attention2d", grid, (8, 4), 2, True, head_groups=head_groups)
    assert max(map(max, found)) <= 1e-12, found


@pytest.mark.parametrize("heads", [(6, 3), (2, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("grid", [g for g in GRIDS if g != (1, 1)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_half_of_the_heads_after_the_tile(pool: RankPool, grid: tuple[int, int], heads: tuple[int, int]) -> None:
    found = pool.run(errors, grid[0] * grid[1], "attention2d", grid, heads, 2, True, smallest_half=0.0)
    assert max(map(max, found)) <= 1e-12, found


@pytest.mark.parametrize("chunk", [1, 5, 127])
@pytest.mark.parametrize("mode", ["attention2d", "ring"])
def test_odd_chunks(pool: RankPool, mode: str, chunk: int) -> None:
    found = pool.run(errors, 4, mode, (2, 2), (2, 1), 1, True, chunk=chunk)
    assert max(map(max, found)) <= 1e-12, found


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("mode", ["attention2d", "ring"])
def test_narrow_dtypes(pool: RankPool, mode: str, dtype: torch.dtype, bound: float) -> None:
    found = pool.run(errors, 4, mode, (2, 2), (4, 2), 1, True, dtype=dtype)
    assert max(map(max, found)) <= bound, found


def identical(rank: int, mode: str) -> bool:
    """Two runs of one call agree bit for bit."""
    size = dist.get_world_size()
    whole = inputs(16 * size, 2, (4, 2), dtype=torch.float32)
    mine = zigzag(16 * size, size, rank)
    runs = []
    assert dist.group.WORLD is not None
    grid = Grid.from_group(dist.group.WORLD, rows=2, cols=size // 2)
    for _ in range(2):
        q, k, v = (x[mine].requires_grad_() for x in whole[:3])
        out = attention2d(q, k, v, grid) if mode == "attention2d" else ring_attention(q, k, v, dist.group.WORLD)
        runs.append((out, *torch.autograd.grad(out, (q, k, v), whole[3][mine])))
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("mode", ["attention2d", "ring"])
def test_runs_are_bit_identical(pool: RankPool, mode: str) -> None:
    assert all(pool.run(identical, 6, mode))


def reach(rank: int, mode: str, shape: tuple[int, int], token: int) -> list[int]:
    """Positions whose output on this rank changes when the key and value of one token do."""
    size = dist.get_world_size()
    whole = inputs(4 * size, 1, (2, 2))
    mine = zigzag(4 * size, size, rank)
    assert dist.group.WORLD is not None
    grid = Grid.from_group(dist.group.WORLD, rows=shape[0], cols=shape[1])
    outs = []
    for change in (0.0, 1.0):
        q, k, v = (x.clone() for x in whole[:3])
        k[token] += change
        v[token] -= change
        shards = (x[mine] for x in (q, k, v))
        outs.append(attention2d(*shards, grid) if mode == "attention2d" else ring_attention(*shards, dist.group.WORLD))
    changed = (outs[0] != outs[1]).flatten(1).any(1)
    return mine[changed].tolist()


@pytest.mark.parametrize(
    ("mode", "grid"),
    [
        ("attention2d", (1, 4)),
        ("attention2d", (2, 2)),
        ("attention2d", (4, 1)),
        ("attention2d", (2, 3)),
        ("ring", (2, 2)),
    ],
)
def test_every_token_reaches_every_later_one_and_none_before(pool: RankPool, mode: str, grid: tuple[int, int]) -> None:
    size = grid[0] * grid[1]
    for rank in range(size):
        for token in zigzag(4 * size, size, rank).tolist()[::2]:
            changed = sorted(p for found in pool.run(reach, size, mode, grid, token) for p in found)
            assert changed == list(range(token, 4 * size))
