"""Chunks between the ranks of one axis of the grid: gather them into a tile, give partial results back.

One `Axis` is a row (its chunks are queries) or a column (keys and values). `gather` brings the chunks a tile needs
into one buffer, in the order of the tile's plan; `give_back` returns one partial result a slot to the chunk's owner.
Both put all their messages into one batched launch and return at once: kernels may run until `Pending.wait`.

Point-to-point messages rather than all-gathers, for they place each chunk where the plan wants it, so that no buffer is
permuted by a copy, and they leave out what the causal mask hides. The bytes a rank moves are an all-gather's at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.attention.grid import Grid
from megatron_attn2d.attention.layout import LOWER, UPPER, Chunk, TilePlan, tile_plan


@dataclass
class Pending:
    """Messages in flight. They keep their buffers alive until `wait`."""

    works: list[dist.Work] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)

    def wait(self) -> None:
        """Make the current stream (on CPU: the caller) wait for the messages."""
        for work in self.works:
            work.wait()
        self.works.clear()
        self.buffers.clear()


type Returned = tuple[list[list[list[Tensor]]], Pending]
"""What `Axis.give_back` returns: the tensors on their way, [kind][half], and the messages to wait for."""


@dataclass(frozen=True)
class Axis:
    """What one rank sends and receives along one axis of the grid.

    Attributes:
        group: process group of the axis; None if it has one rank.
        own: context-parallel rank of the caller.
        slots: the chunks that the caller's tile needs, by slot.
        holders: for every other rank of the axis, the caller's chunks that its tile needs, in that tile's order.
        peers: global rank of each context-parallel rank of the axis.
    """

    group: dist.ProcessGroup | None
    own: int
    slots: tuple[Chunk, ...]
    holders: dict[int, tuple[Chunk, ...]]
    peers: dict[int, int]

    def own_slot(self, half: int) -> int | None:
        """Slot of the caller's own chunk; None where the tile has no use for it."""
        chunk = Chunk(self.own, half)
        return self.slots.index(chunk) if chunk in self.slots else None

    def gather(self, shards: Sequence[Tensor], *, tag: int) -> tuple[list[Tensor], Pending]:
        """Start to gather the tile's chunks of each tensor.

        Args:
            shards: contiguous tensors [2, n, ...], lower and upper chunk of n tokens.
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
        buffers = [shard.new_empty((len(self.slots), *shard.shape[1:])) for shard in shards]
        for half in (LOWER, UPPER):
            slot = self.own_slot(half)
            if slot is not None:
                for buffer, shard in zip(buffers, shards, strict=True):
                    buffer[slot].copy_(shard[half])
        receives = [
            (self.peers[chunk.rank], buffer[slot])
            for buffer in buffers
            for slot, chunk in enumerate(self.slots)
            if chunk.rank != self.own
        ]
        sends = [
            (self.peers[rank], shard[chunk.half])
            for shard in shards
            for rank, chunks in self.holders.items()
            for chunk in chunks
        ]
        return buffers, launch(self.group, sends, receives, tag)

    def give_back(self, partials: Sequence[Sequence[Tensor]], *, tag: int) -> Returned:
        """Start to return each slot's partial results to the chunk's owner.

        Args:
            partials: for each kind of result, a tensor for each slot; all of one kind have one shape.
            tag: as in `gather`.

        Returns:
            For each kind the received tensors, [kind][half]: a list in the order of the axis's ranks.
        """
        received: list[list[list[Tensor]]] = [[[], []] for _ in partials]
        if self.group is None:
            return received, Pending()
        receives = []
        for kind, results in enumerate(partials):
            count = sum(map(len, self.holders.values()))
            landing = iter(results[0].new_empty((count, *results[0].shape)).unbind())
            for rank, chunks in self.holders.items():
                for chunk in chunks:
                    buffer = next(landing)
                    received[kind][chunk.half].append(buffer)
                    receives.append((self.peers[rank], buffer))
        sends = [
            (self.peers[chunk.rank], result.contiguous())
            for results in partials
            for chunk, result in zip(self.slots, results, strict=True)
            if chunk.rank != self.own
        ]
        return received, launch(self.group, sends, receives, tag)


def launch(
    group: dist.ProcessGroup, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], tag: int
) -> Pending:
    """Start all messages, (global rank, contiguous tensor) each, as one batch.

    The k-th message to a rank meets that rank's k-th from here.
    """
    operations = []
    for call, messages in ((dist.irecv, receives), (dist.isend, sends)):
        count: dict[int, int] = {}
        for peer, buffer in messages:
            k = count[peer] = count.get(peer, -1) + 1
            operations.append(dist.P2POp(call, buffer, peer, group, tag * 4096 + k))
    if not operations:
        return Pending()
    return Pending(dist.batch_isend_irecv(operations), [buffer for _, buffer in (*sends, *receives)])


def axes(grid: Grid, causal: bool) -> tuple[TilePlan, Axis, Axis]:
    """The plan of the caller's tile, its row (queries) and its column (keys and values)."""
    row, column = grid.query_ranks, grid.key_ranks(grid.column)
    plan = tile_plan(row, column, causal)

    def mine(chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
        return tuple(chunk for chunk in chunks if chunk.rank == grid.rank)

    queries = Axis(
        grid.q_group,
        grid.rank,
        plan.queries,
        {
            rank: mine(tile_plan(row, grid.key_ranks(c), causal).queries)
            for c, rank in enumerate(row)
            if c != grid.column
        },
        dict(zip(row, grid.q_peers, strict=True)),
    )
    keys = Axis(
        grid.kv_group,
        grid.rank,
        plan.keys,
        {rank: mine(tile_plan(grid.ranks[r], column, causal).keys) for r, rank in enumerate(column) if r != grid.row},
        dict(zip(column, grid.kv_peers, strict=True)),
    )
    return plan, queries, keys
