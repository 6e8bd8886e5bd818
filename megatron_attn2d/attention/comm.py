"""The row and the column of a tile: chunks come into its slots, partial results go back to the chunks' owners.

Chunks of queries travel in the row, chunks of keys and values in the column. `TileAxis.gather` brings the chunks that
the tile needs into one buffer, in the order of the tile's plan. `TileAxis.return_partials` returns one partial result
per slot to the chunk's owner. Each of the two starts all of its messages by one launch, and kernels may run until the
messages are waited for. Where ranks share nodes (`relay`) there are two launches, between nodes and within.

Messages go from rank to rank. An all-gather would need a copy afterwards to permute its buffer into the plan's order,
and it would move what the causal mask hides. The bytes per rank are those of an all-gather at most.

Legend as in `attention2d`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.attention.axis import Axis, Combine, DirectAxis
from megatron_attn2d.attention.grid import Grid
from megatron_attn2d.attention.layout import LOWER, UPPER, Chunk, Mask, TilePlan, tile_plan, tile_slots
from megatron_attn2d.attention.merge import merge_partials, sum_partials
from megatron_attn2d.attention.messages import Pending
from megatron_attn2d.attention.partials import Slots
from megatron_attn2d.attention.relay import RelayAxis, relay_of
from megatron_attn2d.attention.routes import by_nodes, plan_routes, script_of
from megatron_attn2d.attention.tile import Tile


@dataclass(frozen=True)
class TileAxis:
    """An axis of the grid as a tile uses it.

    Where nothing travels, the tile's slots are the two halves of the rank's shard as it is.

    Attributes:
        axis: who sends which chunk to whom.
        tile: whose slots are filled.
    """

    axis: Axis
    tile: Tile

    @property
    def travels(self) -> bool:
        """Whether others' chunks come here and ours go to others."""
        return self.axis.group is not None

    def gather(self, *halves: Tensor, statistics: Tensor | None = None) -> Gathered:
        """Start to gather chunks.

        Args:
            halves: tensors whose two chunks a rank owns, [2, n, b, heads, d].
            statistics: numbers of each row of queries, [2, ..., n].
        """
        tile, shards = self.tile, list(halves)
        if self.travels and not tile.packing.one:
            shards = [tile.chunks(x.flatten(0, 1), 2, True) for x in shards]
        if statistics is not None:
            shards.append(tile.statistics_to_send(statistics, self.travels))
        return Gathered(*self.axis.gather(shards, tag=0), self, statistics is not None)

    def return_partials(self, kinds: list[Slots], like: list[Tensor], combine: Combine) -> Returned:
        """Start to return partial results to the owners of their chunks, where chunks travel.

        Args:
            kinds: per kind of result, the partial results by slot; one per slot where chunks travel.
            like: per kind, a tensor of the shape and dtype of one result.
            combine: makes one result of those that ranks of a node have of a chunk.
        """
        if not self.travels:
            return Returned(kinds, [[[], []] for _ in kinds], Pending())
        own = dict(self.axis.own_slots)
        local: list[Slots] = [[slots[own[half]] if half in own else [] for half in (LOWER, UPPER)] for slots in kinds]
        only = [[partial for (partial,) in slots] for slots in kinds]
        return Returned(local, *self.axis.return_partials(only, like, combine, tag=1))


class Gathered:
    """Chunks on their way into the slots of a tile."""

    def __init__(self, buffers: list[Tensor], pending: Pending, axis: TileAxis, statistics: bool) -> None:
        self._buffers, self._pending = buffers, pending
        self._axis, self._statistics = axis, statistics

    def wait(self) -> list[Tensor]:
        """The statistics, if there are any, and the chunks, as `tile.attend` and `tile.differentiate` take them.

        The caller alone holds them then, so that their memory is free when it drops them.
        """
        self._pending.wait()
        buffers, self._buffers = self._buffers, []
        tile = self._axis.tile
        statistics = [tile.statistics_in_order(buffers.pop())] if self._statistics else []
        return [*statistics, *tile.in_order(buffers, self._axis.travels)]


class Returned:
    """Partial results of the caller's own two chunks: those of its own tile, and those of other tiles on their way."""

    def __init__(self, local: list[Slots], remote: list[Slots], pending: Pending) -> None:
        self._local, self._remote, self._pending = local, remote, pending

    def wait(self) -> None:
        """Wait until all of them are here."""
        self._pending.wait()

    def with_diagonal(self, *diagonal: Slots, of: Callable[[Tensor], Tensor]) -> list[Slots]:
        """Per kind all partial results of both chunks, for some heads.

        Args:
            diagonal: per kind the results of the diagonal, for those heads.
            of: takes the heads out of a tensor.
        """
        kinds = zip(self._local, diagonal, self._remote, strict=True)
        return [
            [[*map(of, local[half]), *own[half], *map(of, remote[half])] for half in (LOWER, UPPER)]
            for local, own, remote in kinds
        ]


def _merged(kinds: list[list[Tensor]]) -> list[Tensor]:
    """One of partial outputs [chunks, n, b, h, d] and log-sum-exps [chunks, b, h, n], or of stacks of them."""
    outs, lses = kinds
    out, lse = outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)
    for i in range(out.size(2)):  # one launch for all chunks of a sequence, which take the place of the batch
        merge_partials(
            [[_of_sequence(x, i) for x in outs]],
            [[x.select(-3, i) for x in lses]],
            [_of_sequence(out, i)],
            [lse.select(-3, i)],
        )
    return [out, lse]


def _summed(kinds: list[list[Tensor]]) -> list[Tensor]:
    """One of partial gradients [chunks, n, b, heads, d] of each kind, or of stacks of them."""
    totals = [partials[0].new_empty(partials[0].shape) for partials in kinds]
    for partials, total in zip(kinds, totals, strict=True):
        for i in range(total.size(2)):
            sum_partials([[_of_sequence(x, i) for x in partials]], [_of_sequence(total, i)])
    return totals


def _of_sequence(chunks: Tensor, i: int) -> Tensor:
    """[..., chunks, n, b, heads, d] -> [..., n, chunks, heads, d] of sequence i of the batch, a view."""
    return chunks.select(-3, i).transpose(-4, -3)


MERGED = Combine(_merged, (0.0, -torch.inf))
"""Outputs and log-sum-exps."""
SUMMED = Combine(_summed, (0.0, 0.0))
"""Gradients, of queries or of keys and values."""


_MOST_MASKS = 64


def axes(grid: Grid, mask: Mask, label: str) -> tuple[TilePlan, Axis, Axis]:
    """The plan of the caller's tile, its row (queries) and its column (keys and values); `label` names the call."""
    if mask not in grid.derived:
        if len(grid.derived) >= _MOST_MASKS:  # packed sequences: each batch has lengths of its own
            del grid.derived[next(iter(grid.derived))]
        grid.derived[mask] = {}
    by_label: dict[str, tuple[TilePlan, Axis, Axis]] = grid.derived[mask]
    if label not in by_label:
        plan, row, column = next(iter(by_label.values()), None) or _axes(grid, mask)
        row = replace(row, label=f"{label}, queries in the row")
        by_label[label] = plan, row, replace(column, label=f"{label}, keys and values in the column")
    return by_label[label]


def _axes(grid: Grid, mask: Mask) -> tuple[TilePlan, Axis, Axis]:
    row, column = grid.query_ranks, grid.key_ranks(grid.column)
    plan = tile_plan(row, column, mask)
    queries = {rank: tile_slots(row, grid.key_ranks(c), mask)[0] for c, rank in enumerate(row)}
    keys = {rank: tile_slots(line, column, mask)[1] for line, rank in zip(grid.ranks, column, strict=True)}
    return (
        plan,
        _axis(grid, grid.q_group, by_nodes(row, grid.node_cols), queries, grid.q_peers),
        _axis(grid, grid.kv_group, by_nodes(column, grid.node_rows), keys, grid.kv_peers),
    )


def _axis(
    grid: Grid,
    group: dist.ProcessGroup | None,
    nodes: tuple[tuple[int, ...], ...],
    slots: dict[int, tuple[Chunk, ...]],
    peers: tuple[int, ...],
) -> Axis:
    """An axis of these ranks, by node; `peers` are their global ranks, and their tiles need the chunks of `slots`."""
    rank, mine = grid.rank, slots[grid.rank]
    order = dict.fromkeys(slots, 0)
    if group is not None:  # whose ranks torch may have sorted
        order = {each: dist.get_group_rank(group, peer) for each, peer in zip(slots, peers, strict=True)}
    routes = plan_routes(nodes, slots)
    if len(nodes[0]) == 1:
        return DirectAxis(group, mine, peers, script=script_of(routes.between, rank, mine, order))
    node = next(node for node in nodes if rank in node)
    return RelayAxis(group, mine, peers, relay=relay_of(routes, node, rank, mine, order))
