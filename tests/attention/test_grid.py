"""Every way to make a grid: same places, same groups, exact attention; wrong ones are refused."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_attn2d import Grid, attention2d
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
        ("groups", r"must share exactly the calling rank"),
        ("mesh", "takes a mesh of 2 axes, this one has 1"),
        ("axis", "kv_axis=2 is no axis of a 2-D mesh: give 0 or 1"),
    ],
)
def test_refusals(pool: RankPool, how: str, message: str) -> None:
    for found in pool.run(refusal, 4, how):
        assert re.search(message, found), found


def many_grids(rank: int, count: int) -> int:
    """Grids of one group cost no new process groups where they have one row or one column."""
    assert dist.group.WORLD is not None
    groups = {id(Grid.from_group(dist.group.WORLD, rows=4, cols=1).kv_group) for _ in range(count)}
    return len(groups)


def test_one_column_uses_the_group_itself(pool: RankPool) -> None:
    assert pool.run(many_grids, 4, 10) == [1] * 4
