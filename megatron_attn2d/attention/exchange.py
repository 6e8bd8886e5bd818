"""Chunks between the ranks of one axis of the grid: gather them into a tile, give partial results back.

One `Axis` is a row (its chunks are queries) or a column (keys and values). `gather` brings the chunks a tile needs
into one buffer, in the order of the tile's plan; `give_back` returns one partial result per slot to the chunk's owner.
All messages of one are a batched launch, and kernels may run until `Pending.wait`. Where ranks share nodes (`relay`)
there are two launches, between nodes and within.

Messages from rank to rank rather than all-gathers, for they place each chunk where the plan wants it. No buffer is
permuted by a copy, and what the causal mask hides is left out. The bytes per rank are an all-gather's at most.
"""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist

from megatron_attn2d.attention.axis import Axis, DirectAxis
from megatron_attn2d.attention.grid import Grid
from megatron_attn2d.attention.layout import Chunk, Mask, TilePlan, tile_plan, tile_slots
from megatron_attn2d.attention.relay import RelayAxis, relay_of
from megatron_attn2d.attention.routes import by_nodes, plan_routes, script_of

_MOST_MASKS = 64


def axes(grid: Grid, mask: Mask, label: str) -> tuple[TilePlan, Axis, Axis]:
    """The plan of the caller's tile, its row (queries) and its column (keys and values); `label` names the layer."""
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
    """An axis of these ranks, by node, whose global ranks are `peers` and whose tiles need the chunks of `slots`."""
    rank, mine = grid.rank, slots[grid.rank]
    order = dict.fromkeys(slots, 0)
    if group is not None:  # whose ranks torch may have sorted
        order = {each: dist.get_group_rank(group, peer) for each, peer in zip(slots, peers, strict=True)}
    routes = plan_routes(nodes, slots)
    if len(nodes[0]) == 1:
        return DirectAxis(group, mine, peers, script=script_of(routes.between, rank, mine, order))
    node = next(node for node in nodes if rank in node)
    return RelayAxis(group, mine, peers, relay=relay_of(routes, node, rank, mine, order))
