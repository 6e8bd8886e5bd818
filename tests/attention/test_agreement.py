"""Ranks that ask for different attention are told so, all of them, before a message is sent."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.messages import ExchangeError
from tests.pool import RankPool

Layout = tuple[int, int, int] | None
LAYOUTS: list[Layout] = [(1, 2, 2), (1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (4, 1, 1), None]  # U, R, C; a ring


def attention(layout: Layout, group: dist.ProcessGroup | None = None) -> Callable[..., Tensor]:
    group = group or dist.group.WORLD
    assert group is not None
    if layout is None:
        return lambda *shards, **how: ring_attention(*shards, group, **how)
    heads, rows, cols = layout
    grid = Grid.from_group(group, ulysses_size=heads, rows=rows, cols=cols)
    return lambda *shards, **how: attention2d(*shards, grid, **how)


def shards(tokens: int = 8, dtype: torch.dtype = torch.float32, heads: int = 4) -> list[Tensor]:
    return [torch.ones(tokens, 1, heads, 8, dtype=dtype) for _ in range(3)]


DIFFERING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the last rank's shards and of its call
    "shape of q": ({"tokens": 6}, {}),
    "dtype": ({"dtype": torch.bfloat16}, {}),
    "mask": ({}, {"causal": False}),
    "softmax_scale": ({}, {"softmax_scale": 0.5}),
    "dropout": ({}, {"dropout": Dropout(0.5, 1)}),
    "sink": ({}, {"sink": torch.zeros(4)}),
}


def refusal(rank: int, layout: Layout, what: str) -> str:
    of_shards, of_call = DIFFERING[what] if rank == dist.get_world_size() - 1 else ({}, {})
    try:
        attention(layout)(*shards(**of_shards), **of_call, label="layer 7")
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", DIFFERING)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_refuses_what_one_asks_for_differently(pool: RankPool, layout: Layout, what: str) -> None:
    found = pool.run(refusal, 4, layout, what, timeout=60)
    for rank, message in enumerate(found):
        assert message.startswith(f"layer 7: all ranks must pass the same on rank {rank}: "), message
    assert re.search(rf"{what} is .* here and another on global rank [012]$|{what} is .*; ", found[3])
    assert any(f"{what} is" in message and "another on global rank 3" in message for message in found[:3])


def comparisons(rank: int, layout: Layout) -> list[int]:
    """How many collectives compare arguments in each of three calls, of which the last is another one."""
    attend, counts = attention(layout), []
    for how in ({}, {}, {"causal": False}):
        with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as all_gather:
            attend(*shards(), **how)
        counts.append(all_gather.call_count)
    return counts


@pytest.mark.parametrize(("layout", "groups"), [((1, 2, 2), 2), ((1, 4, 1), 1), ((2, 1, 2), 2), (None, 1)], ids=str)
def test_the_first_call_alone_compares(pool: RankPool, layout: Layout, groups: int) -> None:
    assert pool.run(comparisons, 4, layout) == [[groups, 0, 0]] * 4


def alone(rank: int, layout: Layout) -> str:
    """What rank 0 is told where no other rank calls within its group's time."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    assert isinstance(group, dist.ProcessGroup)
    attend = attention(layout, group)
    message = ""
    if rank == 0:
        try:
            attend(*shards(), label="layer 7")
        except ExchangeError as error:
            message = str(error)
    dist.barrier()
    return message


@pytest.mark.parametrize("layout", [(1, 2, 1), None], ids=str)
def test_a_first_call_that_waits_in_vain_names_the_ranks(pool: RankPool, layout: Layout) -> None:
    said = pool.run(alone, 2, layout, timeout=60)[0]
    assert said.startswith("layer 7: comparing arguments of ranks [0, 1] failed on rank 0: ")


def groups_of_rings_and_a_grid(rank: int) -> float:
    """A mesh's groups, of which some ranks alone have used one for a ring before all lay a grid on both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("q", "kv"))
    grid, (q, k, v) = Grid.from_mesh(mesh), shards()
    ring_attention(q, k, v, mesh.get_group("kv"))
    if rank in (0, 2):
        ring_attention(q, k, v, mesh.get_group("q"))
    return attention2d(q, k, v, grid).mean().item()


def test_groups_that_some_ranks_have_used_before(pool: RankPool) -> None:
    assert pool.run(groups_of_rings_and_a_grid, 4, timeout=60) == pytest.approx([1.0] * 4)
