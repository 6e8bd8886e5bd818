"""Messages as lists, as NCCL takes them: exact attention, and launches that do not grow with the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_attn2d import Grid, attention2d
from megatron_attn2d.attention import messages
from tests.attention.dense import dense_gradients, inputs, zigzag
from tests.pool import RankPool

type Axes = tuple[int, int, int]


def one_by_one(
    group: dist.ProcessGroup, rounds: Sequence[messages.Lists], device: torch.device, transport: Any
) -> list[dist.Work]:
    """What NCCL makes of the rounds, over Gloo: what is empty is left out."""
    all_counts: list[Any] = [None] * group.size()
    dist.all_gather_object(all_counts, len(rounds), group)
    assert len(set(all_counts)) == 1, f"ranks make different numbers of calls: {all_counts}"
    ranks, works = dist.get_process_group_ranks(group), []
    for number, (sends, receives) in enumerate(rounds):
        assert len(sends) == len(receives) == group.size()
        assert len({x.dtype for x in (*sends, *receives)}) == 1
        assert all(x.is_contiguous() for x in (*sends, *receives))
        assert not sends[group.rank()].numel()
        assert not receives[group.rank()].numel()
        for call, tensors in ((dist.irecv, receives), (dist.isend, sends)):
            works += [call(x, ranks[i], group=group, tag=number) for i, x in enumerate(tensors) if x.numel()]
    return [work for work in works if work is not None]


def errors(
    rank: int, axes: Axes, tile: tuple[int, int] | None, causal: bool, window: tuple[int, int], groups: int
) -> float:
    """Largest absolute error of O, dQ, dK, dV on this rank, with messages as lists."""
    size = dist.get_world_size()
    whole = inputs(6 * size, 1, (4, 2))
    mine = zigzag(6 * size, size, rank)
    q, k, v = (x[mine].requires_grad_() for x in whole[:3])
    assert dist.group.WORLD is not None
    grid = Grid.from_group(dist.group.WORLD, ulysses_size=axes[0], rows=axes[1], cols=axes[2], node_block=tile)
    how = messages._Transport(lists=True, coalesces=False, faked=False)
    with (
        mock.patch.object(messages, "_all_to_all", one_by_one),
        mock.patch.object(messages, "_transport", return_value=how),
    ):
        out = attention2d(q, k, v, grid, causal=causal, window=window, overlap_groups=groups)
        found = (out, *torch.autograd.grad(out, (q, k, v), whole[3][mine]))
    expected = dense_gradients(*whole, causal, window)
    return max((a - b[mine]).abs().max().item() for a, b in zip(found, expected, strict=True))


LISTS: list[tuple[Axes, tuple[int, int] | None, dict[str, Any]]] = [
    ((1, 4, 1), None, {}),
    ((1, 1, 4), None, {}),
    ((1, 2, 2), None, {}),
    ((1, 2, 2), None, {"causal": False, "groups": 2}),
    ((1, 2, 3), None, {}),
    ((1, 4, 1), None, {"window": (7, 0)}),
    ((2, 1, 2), None, {}),
    ((1, 4, 2), (2, 2), {}),
    ((1, 4, 2), (2, 1), {"window": (20, 0)}),
    ((1, 2, 4), (1, 2), {"causal": False}),
    ((2, 2, 2), (1, 2), {}),
]


@pytest.mark.parametrize(("axes", "tile", "how"), LISTS, ids=str)
def test_lists_of_messages_are_exact(
    pool: RankPool, axes: Axes, tile: tuple[int, int] | None, how: dict[str, Any]
) -> None:
    case: dict[str, Any] = {"causal": True, "window": (-1, -1), "groups": 1} | how
    found = pool.run(errors, axes[0] * axes[1] * axes[2], axes, tile, **case)
    assert max(found) <= 1e-12, found
