"""Chunks between the ranks of one axis of the grid: gather them into a tile, give partial results back.

One `Axis` is a row (its chunks are queries) or a column (keys and values). `gather` brings the chunks a tile needs
into one buffer, in the order of the tile's plan; `give_back` returns one partial result a slot to the chunk's owner.
All messages of one are a batched launch, and kernels may run until `Pending.wait`. Where ranks share nodes (see
`routes`) there are two launches, between nodes and within: `gather` makes the second in `wait`; `give_back` waits for
its first, within nodes, before it makes the second and returns.

Point-to-point messages rather than all-gathers, for they place each chunk where the plan wants it, so that no buffer is
permuted by a copy, and they leave out what the causal mask hides. The bytes a rank moves are an all-gather's at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.attention.grid import Grid
from megatron_attn2d.attention.layout import LOWER, Chunk, Mask, TilePlan, tile_plan, tile_slots
from megatron_attn2d.attention.messages import Lists, Pending, launch, nothing
from megatron_attn2d.attention.routes import BETWEEN, WITHIN, Landing, Round, Script, by_nodes, plan_routes, script_of

_MOST_MASKS = 64

type Returned = tuple[list[list[list[Tensor]]], Pending]
"""What `Axis.give_back` returns: stacks of tensors on their way, [kind][half], and the messages to wait for."""

type Combine = Callable[[list[list[list[Tensor]]]], list[list[Tensor]]]
"""Partial results of chunks, [kind][chunk][partial], into one of each chunk, [kind][chunk]."""


@dataclass(frozen=True)
class Axis:
    """What one rank sends and receives along one axis of the grid.

    Attributes:
        group: process group of the axis; None if it has one rank.
        slots: the chunks that the caller's tile needs, by slot.
        script: what is sent, received and copied, the same in every call.
        peers: global ranks of the axis.
        label: whose axis it is, in errors.
    """

    group: dist.ProcessGroup | None
    slots: tuple[Chunk, ...]
    script: Script
    peers: tuple[int, ...]
    label: str = "attention, axis"

    def own_slot(self, half: int) -> int | None:
        """Slot of the caller's own chunk; None where the tile has no use for it."""
        return dict(self.script.own).get(half)

    def gather(self, shards: Sequence[Tensor], *, tag: int) -> tuple[list[Tensor], Pending]:
        """Start to gather the tile's chunks of each tensor.

        Args:
            shards: tensors [2, n, ...], lower and upper chunk of n tokens.
            tag: tells messages apart that are in flight on the same axis at once.

        Returns:
            A buffer [slots, n, ...] for each shard, to be read after `Pending.wait`. It is a view of the shard where
            nothing has to be moved.
        """
        if self.group is None:
            halves = [chunk.half for chunk in self.slots]
            assert halves == sorted(halves), "a rank's own chunks stand in token order"
            first = halves[0] if halves else LOWER
            return [shard[first : first + len(halves)] for shard in shards], Pending()
        buffers, places = [], []
        later: list[tuple[Tensor, Tensor]] = []
        for shard in shards:
            buffer = shard.new_empty((len(self.slots), *shard.shape[1:]))
            slots = buffer.unbind()
            carried = shard.new_empty((self.script.carried, *shard.shape[1:])).unbind() if self.script.carried else ()
            buffers.append(buffer)
            places.append((*self._outgoing(shard, slots, later), *slots, *carried, nothing(shard)))
        pending = self._launch(self.script.gather, BETWEEN, places, tag, "gathering")
        _copy(later)
        if self.script.gather[WITHIN]:
            pending.then = lambda: self._launch(self.script.gather, WITHIN, places, tag, "gathering")
        return buffers, pending

    def _outgoing(self, shard: Tensor, slots: Sequence[Tensor], later: list[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
        """What to send, lower and upper chunk; copies (to, from) of own chunks that can wait until then go to `later`.

        Messages are contiguous. A head group's chunk is not: it is copied into its slot first and leaves from there.
        """
        chunks = shard.unbind()
        if chunks[LOWER].is_contiguous():
            later += [(slots[slot], chunks[half]) for half, slot in self.script.own]
            return chunks
        places = dict(self.script.own)
        return [slots[places[i]].copy_(x) if i in places else x.contiguous() for i, x in enumerate(chunks)]

    def give_back(
        self, partials: Sequence[Sequence[Tensor]], like: Sequence[Tensor], combine: Combine, *, tag: int
    ) -> Returned:
        """Start to return each slot's partial results to the chunk's owner.

        Args:
            partials: for each kind of result, a tensor for each slot; all of one kind have one shape.
            like: a tensor of the shape and dtype of each kind: the own tile may have no slot.
            combine: makes one partial result of those that several ranks of a node have of a chunk.
            tag: as in `gather`.

        Returns:
            For each kind what is received, [kind][half]: stacks [senders, ...] in a fixed order of the senders.
        """
        received: list[list[list[Tensor]]] = [[[], []] for _ in like]
        if self.group is None:
            return received, Pending()
        script = self.script
        places = [list(_contiguous(kind)) for kind in partials]
        _land(script.landing[WITHIN], like, places, received)
        if script.give_back[WITHIN]:
            self._launch(script.give_back, WITHIN, _ended(places, like), tag, "returning results").wait()
        if script.combined:
            several = [[[kind[i] for i in pieces] for pieces in script.combined] for kind in places]
            for kind, results in zip(places, combine(several), strict=True):
                kind += results
        _land(script.landing[BETWEEN], like, places, received)
        return received, self._launch(script.give_back, BETWEEN, _ended(places, like), tag, "returning results")

    def _launch(
        self, script: Sequence[Sequence[Round]], stage: int, places: Sequence[Sequence[Tensor]], tag: int, what: str
    ) -> Pending:
        """Start the messages of a stage, of each kind of tensor those that stand at its places."""
        assert self.group is not None
        lists: list[Lists] = [each.of(kind) for kind in places for each in script[stage]]
        return launch(self.group, lists, 2 * tag + stage, self._about[what])

    @cached_property
    def _about(self) -> dict[str, str]:
        """What is exchanged, and between which global ranks, for errors."""
        where = f"{self.label} of ranks {list(self.peers)}"
        return {what: f"{where}: {what}" for what in ("gathering", "returning results")}


def _ended(places: Sequence[Sequence[Tensor]], like: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The places of each kind and, last, nothing."""
    return [(*kind, nothing(x)) for kind, x in zip(places, like, strict=True)]


def _land(
    landing: Landing, like: Sequence[Tensor], places: Sequence[list[Tensor]], received: list[list[list[Tensor]]]
) -> None:
    """Add buffers for what returns in a stage to the places, one allocation a kind, and those for the own chunks to
    `received`.
    """
    if not landing.all:
        return
    for kind, room, halves in zip(like, places, received, strict=True):
        buffer = kind.new_empty((landing.all, *kind.shape))
        room += buffer.unbind()
        bounds = (0, landing.lower), (landing.lower, landing.both)
        for half, (first, last) in enumerate(bounds):
            if first < last:
                halves[half].append(buffer[first:last])


def _contiguous(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors, of one shape, all of them copied by one launch unless they are contiguous."""
    if all(x.is_contiguous() for x in tensors):
        return tensors
    return torch.stack(list(tensors)).unbind()


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first, those of a dtype by one launch."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for to, source in pairs:
        targets, sources = by_dtype.setdefault(to.dtype, ([], []))
        targets.append(to)
        sources.append(source)
    for targets, sources in by_dtype.values():
        torch._foreach_copy_(targets, sources)


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
    """An axis of ranks `slots`, by node, whose global ranks are `peers` and whose tiles need these chunks."""
    order = dict.fromkeys(slots, 0)
    if group is not None:  # whose ranks torch may have sorted
        order = {rank: dist.get_group_rank(group, peer) for rank, peer in zip(slots, peers, strict=True)}
    script = script_of(plan_routes(nodes, slots), grid.rank, slots[grid.rank], order)
    return Axis(group, slots[grid.rank], script, peers)
