"""Every way to make a grid: same places, same groups, exact attention; wrong ones are refused."""

from __future__ import annotations

import re
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_attn2d import Grid, attention2d
from megatron_attn2d.attention import groups
from megatron_attn2d.attention.comm import axes
from megatron_attn2d.attention.layout import Band, Mask
from tests.attention.dense import dense_gradients, inputs, zigzag
from tests.pool import RankPool


def hierarchical(rows: int, cols: int) -> Grid:
    """A grid from groups as Megatron-Core's hierarchical sizes [rows, cols] make them."""
    columns = [list(range(c * rows, (c + 1) * rows)) for c in range(cols)]
    kv_groups = [dist.new_group(ranks) for ranks in columns]
    q_groups = [dist.new_group([column[r] for column in columns]) for r in range(rows)]
    column, row = divmod(dist.get_rank(), rows)
    assert isinstance(kv_groups[column], dist.ProcessGroup)
    assert isinstance(q_groups[row], dist.ProcessGroup)
    return Grid.from_groups(kv_group=kv_groups[column], q_group=q_groups[row])


def make(how: str, rows: int, cols: int) -> Grid:
    assert dist.group.WORLD is not None
    if how == "group":
        return Grid.from_group(dist.group.WORLD, rows=rows, cols=cols)
    if how == "groups":
        return hierarchical(rows, cols)
    if how == "mesh":
        return Grid.from_mesh(init_device_mesh("cpu", (cols, rows)))
    if how == "mesh, keys along axis 0":
        return Grid.from_mesh(init_device_mesh("cpu", (rows, cols)), kv_axis=0)
    assert how == "shuffled mesh"
    order = torch.randperm(rows * cols, generator=torch.Generator().manual_seed(3))
    return Grid.from_mesh(DeviceMesh("cpu", order.view(cols, rows)))


def attend(rank: int, how: str, rows: int, cols: int) -> tuple[int, int, int, float]:
    """Context-parallel rank, row and column of this process, and the largest error of O and its gradients."""
    grid = make(how, rows, cols)
    size = rows * cols
    whole = inputs(6 * size, 1, (2, 1))
    mine = zigzag(6 * size, size, grid.rank)
    q, k, v = (x[mine].requires_grad_() for x in whole[:3])
    out = attention2d(q, k, v, grid)
    results = (out, *torch.autograd.grad(out, (q, k, v), whole[3][mine]))
    references = dense_gradients(*whole, True)
    error = max((a - b[mine]).abs().max().item() for a, b in zip(results, references, strict=True))
    return grid.rank, grid.row, grid.column, error


@pytest.mark.parametrize("how", ["group", "groups", "mesh", "mesh, keys along axis 0", "shuffled mesh"])
@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (2, 2), (2, 3), (3, 2)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_any_way_and_any_order_of_ranks_is_exact(pool: RankPool, how: str, shape: tuple[int, int]) -> None:
    rows, cols = shape
    found = pool.run(attend, rows * cols, how, rows, cols)
    assert max(error for *_, error in found) <= 1e-12
    assert sorted(rank for rank, *_ in found) == list(range(rows * cols))
    if how in ("group", "groups", "mesh"):
        assert [(row, column) for _, row, column, _ in found] == [(p % rows, p // rows) for p in range(rows * cols)]


def refusal(rank: int, how: str) -> str:
    try:
        assert dist.group.WORLD is not None
        if how == "shape":
            Grid.from_group(dist.group.WORLD, rows=2, cols=3)
        elif how == "heads":
            Grid.from_group(dist.group.WORLD, rows=2, cols=2, ulysses_size=2)
        elif how == "too many heads":
            Grid.from_group(dist.group.WORLD, rows=2, cols=2, ulysses_size=3)
        elif how == "groups":
            Grid.from_groups(kv_group=dist.group.WORLD, q_group=dist.group.WORLD)
        elif how == "mesh":
            Grid.from_mesh(init_device_mesh("cpu", (4,)))
        else:
            Grid.from_mesh(init_device_mesh("cpu", (2, 2)), kv_axis=2)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", "rows=2 x cols=3 does not cover 4 context-parallel ranks: choose one of 1x4, 2x2, 4x1"),
        (
            "heads",
            "cols=2 x ulysses_size=2 does not cover 4 .*: choose one of 1x2, 2x1 with ulysses_size=2",
        ),
        (
            "too many heads",
            "x ulysses_size=3 does not cover 4 .*: choose one of 1x4, 2x2, 4x1, or a ulysses_size that divides 4",
        ),
        ("groups", r"must share exactly the calling rank"),
        ("mesh", "takes a mesh of 2 axes, this one has 1"),
        ("axis", "kv_axis=2 is no axis of a 2-D mesh: give 0 or 1"),
    ],
)
def test_refusals(pool: RankPool, how: str, message: str) -> None:
    for found in pool.run(refusal, 4, how):
        assert re.search(message, found), found


def meetings(rank: int) -> list[int]:
    """Sizes of the groups in which making a grid of 2 x 2 x 2, in both ways, makes a call."""
    met: list[int] = []

    def counted(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        met.append(group.size())

    assert dist.group.WORLD is not None
    with mock.patch.object(dist, "all_reduce", counted):
        grid = Grid.from_group(dist.group.WORLD, rows=2, cols=2, ulysses_size=2)
        assert grid.kv_group is not None
        assert grid.q_group is not None
        Grid.from_groups(kv_group=grid.kv_group, q_group=grid.q_group, ulysses_group=grid.ulysses_group)
    return met


def test_all_ranks_of_a_group_meet_before_attention(pool: RankPool) -> None:
    """Without it NCCL would connect them in the first batch of messages, in which a rank may have none."""
    assert pool.run(meetings, 8) == [[2] * 6] * 8


def grids_after_others(rank: int) -> int:
    """Grids that work: after groups of some ranks alone, and on groups made again when others were destroyed."""
    world = dist.group.WORLD
    assert world is not None
    if rank < 2:
        for _ in range(rank + 1):
            dist.new_group([rank], use_local_synchronization=True)
    worked = 0
    for _ in range(4):
        grid = Grid.from_group(world, rows=2, cols=2)
        out = attention2d(*(torch.ones(4, 1, 1, 8) for _ in range(3)), grid)
        worked += torch.allclose(out, torch.ones(4, 1, 1, 8))
        dist.barrier()
        for group in (grid.kv_group, grid.q_group):
            dist.destroy_process_group(group)
    return worked


def test_grids_after_other_groups(pool: RankPool) -> None:
    """Ranks of a group agree on its name whatever groups each has made, and no name comes again."""
    assert pool.run(grids_after_others, 4, timeout=30) == [4] * 4


def plain_group_after_grids(rank: int) -> float:
    """Ranks' sum in a group that all make after one of them has made another, as a grid of some ranks does."""
    if rank == 0:
        with groups.new_name((0,)):
            dist.new_group([0], use_local_synchronization=True)
    group = dist.new_group([0, 1])
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    return total.item()


def test_plain_groups_after_grids_of_some_ranks(pool: RankPool) -> None:
    assert pool.run(plain_group_after_grids, 2, timeout=30) == [2.0, 2.0]


def grids_of_fake_groups(rank: int) -> int:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    world = dist.group.WORLD
    assert world is not None
    grids = [Grid.from_group(world, rows=2, cols=4) for _ in range(2)]
    return sum(grid.size for grid in grids)


def test_fake_process_groups(pool: RankPool) -> None:
    """Megatron's --fake-process-group: their store does not count."""
    assert pool.run(grids_of_fake_groups, 1, init_group=False) == [16]


def many_grids(rank: int, count: int) -> int:
    """Grids of one group cost no new process groups where they have one row or one column."""
    assert dist.group.WORLD is not None
    groups = {id(Grid.from_group(dist.group.WORLD, rows=4, cols=1).kv_group) for _ in range(count)}
    return len(groups)


def test_one_column_uses_the_group_itself(pool: RankPool) -> None:
    assert pool.run(many_grids, 4, 10) == [1] * 4


AXES = [
    (u, r, size // (u * r))
    for size in (2, 4, 6, 8)
    for u in range(2, size + 1)
    for r in range(1, size // u + 1)
    if size % (u * r) == 0
]  # grids without a head axis are in test_support


def head_axis(
    rank: int, axes: tuple[int, int, int], heads: tuple[int, int], causal: bool, how: str = "group"
) -> tuple[int, float]:
    """Context-parallel rank and largest error of O and its gradients with heads spread over U ranks."""
    u, r, c = axes
    assert dist.group.WORLD is not None
    if how == "group":
        grid = Grid.from_group(dist.group.WORLD, rows=r, cols=c, ulysses_size=u)
    else:
        from megatron.core.parallel_state import create_hierarchical_groups

        world = list(range(u * r * c))
        (head_group, kv_group, q_group), _ = create_hierarchical_groups(rank, world, [u, r, c])
        grid = Grid.from_groups(kv_group=kv_group, q_group=q_group, ulysses_group=head_group)
    assert grid.size == u * r * c
    whole = inputs(6 * grid.size, 2, heads, dims=(8, 6))
    mine = zigzag(6 * grid.size, grid.size, grid.context_rank)
    q, k, v = (x[mine].requires_grad_() for x in whole[:3])
    out = attention2d(q, k, v, grid, causal=causal, overlap_groups=heads[1])
    results = (out, *torch.autograd.grad(out, (q, k, v), whole[3][mine]))
    references = dense_gradients(*whole, causal)
    return grid.context_rank, max((a - b[mine]).abs().max().item() for a, b in zip(results, references, strict=True))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("kv_heads", [1, 2, 24])
@pytest.mark.parametrize("axes", AXES, ids=lambda a: "x".join(map(str, a)))
def test_the_head_axis_is_exact(pool: RankPool, axes: tuple[int, int, int], kv_heads: int, causal: bool) -> None:
    if kv_heads % axes[0] and axes[0] % kv_heads:
        kv_heads *= 3  # U = 3 and 6
    found = pool.run(head_axis, axes[0] * axes[1] * axes[2], axes, (24, kv_heads), causal)
    assert [rank for rank, _ in found] == list(range(len(found)))
    assert max(error for _, error in found) <= 1e-12


@pytest.mark.parametrize("axes", [(2, 2, 2), (2, 1, 4), (4, 2, 1)], ids=lambda a: "x".join(map(str, a)))
def test_the_head_axis_on_megatrons_hierarchical_groups(pool: RankPool, axes: tuple[int, int, int]) -> None:
    found = pool.run(head_axis, 8, axes, (8, 4), True, "hierarchical groups")
    assert found == [(rank, pytest.approx(0.0, abs=1e-12)) for rank in range(8)]


def tiled(rank: int, shape: tuple[int, int], tile: tuple[int, int], heads: int) -> tuple[int, tuple, float]:
    """Context-parallel rank, the ranks on the grid, and the largest error."""
    assert dist.group.WORLD is not None
    grid = Grid.from_group(dist.group.WORLD, rows=shape[0], cols=shape[1], ulysses_size=heads, node_block=tile)
    whole = inputs(4 * grid.size, 1, (2, 2))
    mine = zigzag(4 * grid.size, grid.size, grid.context_rank)
    q, k, v = (x[mine].requires_grad_() for x in whole[:3])
    out = attention2d(q, k, v, grid)
    results = (out, *torch.autograd.grad(out, (q, k, v), whole[3][mine]))
    error = max((a - b[mine]).abs().max().item() for a, b in zip(results, dense_gradients(*whole, True), strict=True))
    return grid.context_rank, grid.ranks, error


@pytest.mark.parametrize(
    ("shape", "tile", "heads", "ranks"),
    [
        ((2, 2), (2, 1), 1, ((0, 2), (1, 3))),
        ((2, 2), (1, 2), 1, ((0, 1), (2, 3))),
        ((4, 2), (2, 2), 1, ((0, 2), (1, 3), (4, 6), (5, 7))),
        ((4, 2), (2, 1), 1, ((0, 4), (1, 5), (2, 6), (3, 7))),
        ((4, 2), (4, 2), 1, ((0, 4), (1, 5), (2, 6), (3, 7))),
        ((1, 8), (1, 4), 1, ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ((8, 1), (2, 1), 1, ((0,), (1,), (2,), (3,), (4,), (5,), (6,), (7,))),
        ((2, 4), (1, 2), 1, ((0, 1, 4, 5), (2, 3, 6, 7))),
        ((2, 2), (1, 2), 2, ((0, 1), (2, 3))),
    ],
)
def test_tiles_keep_consecutive_ranks_together(
    pool: RankPool, shape: tuple[int, int], tile: tuple[int, int], heads: int, ranks: tuple
) -> None:
    found = pool.run(tiled, shape[0] * shape[1] * heads, shape, tile, heads)
    assert [rank for rank, *_ in found] == list(range(len(found)))
    assert {layout for _, layout, _ in found} == {ranks}
    assert max(error for *_, error in found) <= 1e-12


def head_refusal(rank: int, heads: tuple[int, int], how: str) -> str:
    try:
        assert dist.group.WORLD is not None
        if how == "node block":
            Grid.from_group(dist.group.WORLD, rows=4, cols=1, node_block=(3, 1))
        grid = Grid.from_group(dist.group.WORLD, rows=1, cols=1, ulysses_size=4)
        attention2d(torch.zeros(4, 1, heads[0], 8), *[torch.zeros(4, 1, heads[1], 8)] * 2, grid)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("heads", "how", "message"),
    [
        ((6, 6), "heads", "6 query heads don't divide by the 4 ranks of the grid's head axis (U)"),
        ((12, 3), "heads", "3 key/value heads neither divide by the 4 ranks of the grid's head axis (U) nor into them"),
        ((4, 4), "node block", "node blocks of 3x1 don't fill a grid of 4x1"),
    ],
)
def test_head_axis_refusals(pool: RankPool, heads: tuple[int, int], how: str, message: str) -> None:
    assert pool.run(head_refusal, 4, heads, how) == [message] * 4


class FakeGroup:
    """What `subgroup` asks a group of two ranks over NCCL."""

    def __init__(self, urgent: bool) -> None:
        self.options = SimpleNamespace(_timeout=timedelta(minutes=7), is_high_priority_stream=urgent)
        self._device_types = [torch.device("cpu"), torch.device("cuda")]

    def _get_backend(self, device: torch.device) -> FakeGroup:
        assert device.type == "cuda"
        return self

    def size(self) -> int:
        return 2


@pytest.mark.parametrize(("urgent", "reuse"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("named", "by_device", "asked"),
    [
        ("nccl", "cuda:nccl", "nccl"),
        ("cpu:gloo,cuda:nccl", "cpu:gloo,cuda:nccl", "cpu:gloo,cuda:nccl"),
        ("undefined", "cpu:gloo,cuda:nccl", "cpu:gloo,cuda:nccl"),  # of init_process_group() without a backend
    ],
)
def test_streams_of_messages_have_high_priority(
    named: str, by_device: str, asked: str, urgent: bool, reuse: bool
) -> None:
    """A group over NCCL serves as an axis if its streams are urgent, or if another one isn't wanted."""
    parent: Any = FakeGroup(urgent)
    made = mock.Mock(spec=dist.ProcessGroup)
    with (
        mock.patch.object(dist, "get_backend", return_value=named),
        mock.patch.object(dist, "get_backend_config", return_value=by_device),
        mock.patch.object(groups, "new_name", return_value=nullcontext()),
        mock.patch.object(dist, "new_group", return_value=made) as new_group,
        mock.patch.object(dist, "ProcessGroupNCCL", create=True) as nccl,
    ):
        nccl.Options = lambda is_high_priority_stream: SimpleNamespace(is_high_priority_stream=is_high_priority_stream)
        found = groups.subgroup((4, 5), parent, reuse)
    if urgent or reuse:
        assert found is parent
        new_group.assert_not_called()
    else:
        assert found is made
        given = new_group.call_args.kwargs
        assert given["backend"] == asked
        assert given["pg_options"].is_high_priority_stream
        assert given["timeout"] == given["pg_options"]._timeout == timedelta(minutes=7)
        assert new_group.call_args.args == ([4, 5],)


def masks_kept(rank: int, batches: int) -> tuple[int, bool]:
    """How many masks a grid keeps plans of after so many packs, and whether the layers of the last share one."""
    assert dist.group.WORLD is not None
    grid = Grid.from_group(dist.group.WORLD, rows=2, cols=2)
    for batch in range(batches):
        mask = Mask.of_one(Band(2 + batch, 0), 4, 1000)
        plans = [axes(grid, mask, f"layer {n}")[0] for n in range(3)]
    (_, row, column), again = axes(grid, mask, "layer 2"), axes(grid, mask, "layer 2")[1]
    assert row is again
    assert row.label.startswith("layer 2, queries")
    assert column.label.startswith("layer 2, keys")
    return len(grid.derived), plans[0] is plans[1] is plans[2]


def test_plans_of_old_batches_are_let_go(pool: RankPool) -> None:
    assert pool.run(masks_kept, 4, 100) == [(64, True)] * 4
