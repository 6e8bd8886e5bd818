"""Counted bytes against the formulas and against lists of messages; those against what torch.distributed is handed."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention import messages
from megatron_attn2d.planner import cost
from megatron_attn2d.planner.cost import Cluster, candidates, plan
from megatron_attn2d.planner.traffic import Phase, Traffic, Workload, attention2d_traffic, ring_traffic
from tests.attention.dense import inputs, zigzag
from tests.planner.listed import Listing, list_attention2d, list_ring
from tests.pool import RankPool

GRIDS_OF_8 = [(u, r, 8 // u // r) for u in (1, 2, 4, 8) for r in (1, 2, 4, 8) if 8 % (u * r) == 0]
TILES_OF_8 = [
    ((u, rows, cols), (r, c))
    for u, rows, cols in GRIDS_OF_8
    for r in (1, 2, 4, 8)
    for c in (1, 2, 4, 8)
    if rows % r == 0 and cols % c == 0 and r * c > 1
]


def units(traffic: Traffic, ranks: int, unit: float) -> tuple[float, float]:
    """Mean received per rank in u, forward and backward, leaving out the few bytes of log-sum-exps and deltas."""
    return tuple(  # type: ignore[return-value]
        sum(phase.total * phase.times for phase in side) / ranks / unit for side in (traffic.forward, traffic.backward)
    )


def test_ring_is_the_formula() -> None:
    work = Workload(seq=4096, heads=8, kv_heads=2, head_dim=64)
    assert units(ring_traffic(16, work), 16, work.shard_bytes(16)) == pytest.approx((2 * 15 / 4, 4 * 15 / 4))


@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (8, 8), (16, 4), (2, 8), (1, 16), (16, 1)])
def test_attention2d_is_the_formula_without_a_mask(rows: int, cols: int) -> None:
    """2(C-1) + 2(R-1)/g forward, 3(C-1) + 4(R-1)/g backward."""
    work = Workload(seq=2**20, heads=16, kv_heads=4, head_dim=4096, causal=False)  # statistics vanish beside the rows
    forward, backward = units(attention2d_traffic((1, rows, cols), work), rows * cols, work.shard_bytes(rows * cols))
    assert forward == pytest.approx(2 * (cols - 1) + 2 * (rows - 1) / 4, rel=1e-3)
    assert backward == pytest.approx(3 * (cols - 1) + 4 * (rows - 1) / 4, rel=1e-3)


@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (8, 8), (16, 4), (2, 8), (1, 16), (16, 1)])
def test_the_causal_mask_saves_messages(rows: int, cols: int) -> None:
    causal, full = (
        sum(units(attention2d_traffic((1, rows, cols), Workload(2**16, 8, 8, 128, causal=c)), rows * cols, 1.0))
        for c in (True, False)
    )
    assert causal < full


def test_ulysses_is_the_formula() -> None:
    work = Workload(seq=4096, heads=16, kv_heads=8, head_dim=128)
    forward, backward = units(attention2d_traffic((8, 1, 1), work), 8, work.shard_bytes(8))
    assert forward == backward == pytest.approx((2 + 2 / 2) * 7 / 8)


def test_tiles_decide_what_leaves_a_node() -> None:
    """8 x 8 ranks of 8-GPU nodes: blocks of 4 x 2 move 21 u per rank, whole rows 42 and whole columns 35."""
    work = Workload(seq=2**20, heads=8, kv_heads=8, head_dim=4096, causal=False)
    outside = {}
    for tile in ((8, 1), (1, 8), (4, 2)):
        traffic = attention2d_traffic((1, 8, 8), work, tile=tile, ranks_per_node=8)
        outside[tile] = traffic.outside / 64 / work.shard_bytes(64)
    assert outside == pytest.approx({(8, 1): 5 * 7, (1, 8): 6 * 7, (4, 2): 5 * 3 + 6 * 1}, rel=1e-3)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 12, 16])
def test_what_is_counted_is_what_is_listed(ranks: int, causal: bool) -> None:
    """Every mode, grid and tile, on nodes of every size, those that tiles and head groups don't fill included."""
    work = Workload(seq=64 * ranks, heads=12, kv_heads=4, head_dim=8, causal=causal)
    for node in (1, 2, 3, 4, 6, 8):
        for candidate in candidates(ranks, 12, 4, node):
            if candidate.axes is None:
                same_phases(ring_traffic(ranks, work, ranks_per_node=node), list_ring(ranks, work), node)
                continue
            counted = attention2d_traffic(candidate.axes, work, tile=candidate.tile, ranks_per_node=node)
            same_phases(counted, list_attention2d(candidate.axes, work, tile=candidate.tile), node)


@pytest.mark.parametrize(
    ("axes", "tile"),
    [((1, 16, 16), None), ((1, 16, 16), (4, 2)), ((2, 32, 4), (2, 2)), ((1, 256, 1), None), ((1, 4, 64), (1, 8))],
    ids=str,
)
def test_what_is_counted_is_what_is_listed_on_256_ranks(
    axes: tuple[int, int, int], tile: tuple[int, int] | None
) -> None:
    work = Workload(seq=2**16, heads=8, kv_heads=2, head_dim=8)
    same_phases(
        attention2d_traffic(axes, work, tile=tile, ranks_per_node=8), list_attention2d(axes, work, tile=tile), 8
    )


def same_phases(counted: Traffic, listed: Listing, ranks_per_node: int) -> None:
    expected = listed.counted(ranks_per_node)
    for found, phases in ((counted.forward, expected.forward), (counted.backward, expected.backward)):
        steps = [phase for phase in found for _ in range(phase.times)]
        assert len(steps) == len(phases)
        for step, phase in zip(steps, phases, strict=True):
            assert numbers(step) == pytest.approx(numbers(phase), rel=1e-12), (step, phase)
            assert (step.over_heads, step.returns) == (phase.over_heads, phase.returns)


def numbers(phase: Phase) -> list[float]:
    return [
        *(phase.total, phase.outside, phase.busiest_link, phase.busiest_rank, phase.busiest_node),
        phase.messages,
    ]


NODES = Cluster(4, 360e9, 45e9, 45e9, 5e-6, 12e-6, 2e-6, 620e12, 550e12, launch_s=1e-4)


def test_the_choice_is_that_of_the_listed_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(seq=2**17, heads=20, kv_heads=20, head_dim=128)
    counted = plan(64, work, NODES)
    monkeypatch.setattr(
        cost,
        "attention2d_traffic",
        lambda axes, work, tile, ranks_per_node: list_attention2d(axes, work, tile=tile).counted(ranks_per_node),
    )
    for found, expected in zip(counted, plan(64, work, NODES), strict=True):
        assert (found.candidate, found.head_groups) == (expected.candidate, expected.head_groups)
        assert found.total_s == pytest.approx(expected.total_s, rel=1e-12)
        assert (found.intra_bytes, found.nic_bytes) == pytest.approx((expected.intra_bytes, expected.nic_bytes))


@pytest.mark.parametrize(("ranks", "seconds"), [(1024, 3.0), (4096, 15.0)])
def test_thousands_of_ranks_are_planned_in_seconds(ranks: int, seconds: float) -> None:
    begin = time.process_time()
    found = plan(ranks, Workload(seq=2**20, heads=20, kv_heads=20, head_dim=128), NODES)
    assert time.process_time() - begin < seconds
    assert {p.candidate.mode for p in found} == {"ring", "all_gather", "attention2d"}


def sent_bytes(
    rank: int,
    axes: tuple[int, int, int] | None,
    heads: tuple[int, int],
    causal: bool,
    tile: tuple[int, int] | None = None,
    window: tuple[int, int] | None = None,
) -> list[Counter]:
    """Bytes by receiver that this rank hands to torch.distributed, forward and backward."""
    sent: Counter[int] = Counter()
    original = dist.batch_isend_irecv

    def counting(operations):
        for operation in operations:
            if operation.op is dist.isend:
                sent[operation.peer] += operation.tensor.nbytes
        return original(operations)

    size = dist.get_world_size()
    whole = inputs(8 * size, 1, heads, dtype=torch.float32)
    q, k, v = (x[zigzag(8 * size, size, rank)].requires_grad_() for x in whole[:3])
    assert dist.group.WORLD is not None
    grid = None
    if axes is not None:
        grid = Grid.from_group(dist.group.WORLD, ulysses_size=axes[0], rows=axes[1], cols=axes[2], node_block=tile)
    assert messages.dist is dist
    dist.batch_isend_irecv = counting
    try:
        if grid is None:
            out = ring_attention(q, k, v, dist.group.WORLD, causal=causal)
        else:
            out = attention2d(q, k, v, grid, causal=causal, window=window)
        forward = Counter(sent)
        torch.autograd.grad(out.sum(), (q, k, v))
    finally:
        dist.batch_isend_irecv = original
    return [forward, sent - forward]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["MHA", "GQA"])
@pytest.mark.parametrize("axes", [*GRIDS_OF_8, (1, 2, 3), None], ids=str)
def test_every_byte_that_is_sent_is_counted(
    pool: RankPool, axes: tuple[int, int, int] | None, heads: tuple[int, int], causal: bool
) -> None:
    """On every U x R x C of 8 ranks, a grid of 6, and the ring; U = 4 and 8 repeat the two key/value heads."""
    size = 8 if axes is None else axes[0] * axes[1] * axes[2]
    work = Workload(seq=8 * size, heads=heads[0], kv_heads=heads[1], head_dim=8, element_bytes=4, causal=causal)
    traffic = list_ring(size, work) if axes is None else list_attention2d(axes, work)
    compare(pool.run(sent_bytes, size, axes, heads, causal), traffic)


@pytest.mark.parametrize(("axes", "tile"), TILES_OF_8, ids=str)
def test_every_byte_that_nodes_forward_is_counted(
    pool: RankPool, axes: tuple[int, int, int], tile: tuple[int, int]
) -> None:
    work = Workload(seq=64, heads=8, kv_heads=2, head_dim=8, element_bytes=4)
    compare(pool.run(sent_bytes, 8, axes, (8, 2), True, tile), list_attention2d(axes, work, tile=tile))


@pytest.mark.parametrize("axes", [(1, 4, 2), (1, 1, 8), (2, 2, 2)], ids=str)
def test_bytes_shrink_with_the_window(pool: RankPool, axes: tuple[int, int, int]) -> None:
    totals = []
    for window in (None, (20, 0), (5, 0)):
        work = Workload(seq=64, heads=4, kv_heads=2, head_dim=8, element_bytes=4)
        traffic = list_attention2d(axes, work, window=window)
        compare(pool.run(sent_bytes, 8, axes, (4, 2), True, None, window), traffic)
        totals.append(sum(sum(phase.sent.values()) for phase in traffic.forward if "gather" in phase.name))
    assert totals[0] > totals[1] > totals[2]


def compare(found: list[list[Counter]], traffic: Listing) -> None:
    for side, phases in enumerate((traffic.forward, traffic.backward)):
        expected: Counter[tuple[int, int]] = Counter()
        for phase in phases:
            expected.update(phase.sent)
        really = {(rank, peer): sent for rank, sides in enumerate(found) for peer, sent in sides[side].items()}
        assert really == dict(expected)
