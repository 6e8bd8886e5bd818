"""Old names work, warn at the caller's line and say the new one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_attn2d import Grid, attention2d


@pytest.fixture(scope="module")
def world() -> Iterator[dist.ProcessGroup]:
    """Rank 0 of eight, whose others are faked."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def on_one_rank(**how: Any) -> torch.Tensor:
    return attention2d(*torch.randn(3, 4, 1, 2, 8), Grid.single(), **how)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda world: on_one_rank(head_groups=2),
            r"attention2d\(head_groups=...\) is deprecated: pass over",
        ),
        (lambda world: Grid.from_group(world, rows=2, cols=2, heads=2).ulysses_size == 2, "pass ulysses_size="),
        (lambda world: Grid.from_group(world, rows=4, cols=2, tile=(2, 2)).node_rows == 2, "pass node_block="),
        (lambda world: Grid.single().heads == 1, "Grid.heads is deprecated: read Grid.ulysses_size"),
        (lambda world: Grid.single().head_rank == 0, "read Grid.ulysses_rank"),
        (lambda world: Grid.single().head_group is None, "read Grid.ulysses_group"),
        (lambda world: Grid.single().head_peers == (0,), "read Grid.ulysses_peers"),
        (lambda world: grid_of_groups(world).ulysses_size == 2, "pass ulysses_group="),
    ],
)
def test_old_names_work_and_say_the_new_one(
    call: Callable[[dist.ProcessGroup], object], message: str, world: dist.ProcessGroup
) -> None:
    with pytest.warns(DeprecationWarning, match=message) as warned:
        assert call(world) is not False
    assert [warning.filename for warning in warned] == [__file__]


def test_both_names_of_an_argument_are_refused() -> None:
    with pytest.raises(TypeError, match=r"attention2d\(\) got overlap_groups= and its old name head_groups="):
        on_one_rank(head_groups=2, overlap_groups=1)


def grid_of_groups(world: dist.ProcessGroup) -> Grid:
    """2 x 2 x 2, by existing groups of rank 0."""
    grid = Grid.from_group(world, rows=2, cols=2, ulysses_size=2)
    assert grid.kv_group is not None
    assert grid.q_group is not None
    return Grid.from_groups(kv_group=grid.kv_group, q_group=grid.q_group, head_group=grid.ulysses_group)
