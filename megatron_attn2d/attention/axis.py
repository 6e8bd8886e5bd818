"""An axis of the grid: which chunks one rank sends and receives on it, and the axis on which each travels directly.

`comm` uses an axis for the slots of a tile; `relay` has the axis whose ranks share nodes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.attention.layout import LOWER, Chunk
from megatron_attn2d.attention.messages import Lists, Pending, launch, nothing
from megatron_attn2d.attention.routes import Round, Script

type Arriving = tuple[list[list[list[Tensor]]], Pending]
"""Stacks of tensors on their way, [kind][half], and the messages to wait for."""


@dataclass(frozen=True)
class Combine:
    """How results of the same chunks from several ranks become one.

    Attributes:
        results: takes, per kind, partial results of chunks [chunks, ...] or stacks of them [ranks, chunks, ...];
            returns one result per kind, [chunks, ...].
        empty: per kind the value that counts for nothing; a call may have fewer kinds.
    """

    results: Callable[[list[list[Tensor]]], list[Tensor]]
    empty: tuple[float, ...]


@dataclass(frozen=True)
class Axis(ABC):
    """What one rank sends and receives along one axis of the grid.

    Attributes:
        group: process group of the axis; None if it has one rank.
        slots: the chunks that the caller's tile needs, by slot.
        peers: global ranks of the axis.
        label: names the axis in errors.
    """

    group: dist.ProcessGroup | None
    slots: tuple[Chunk, ...]
    peers: tuple[int, ...]
    label: str = "attention, axis"

    @property
    @abstractmethod
    def own_slots(self) -> tuple[tuple[int, int], ...]:
        """Half and slot of those of the caller's own chunks that its tile needs."""

    @abstractmethod
    def gather(self, shards: Sequence[Tensor], *, tag: int) -> tuple[list[Tensor], Pending]:
        """Start to gather the tile's chunks of each tensor.

        Args:
            shards: tensors [2, n, ...], lower and upper chunk of n tokens.
            tag: tells messages apart that are in flight on the same axis at once.

        Returns:
            A buffer [slots, n, ...] per shard, to be read after `Pending.wait`. It is a view of the shard where
            nothing has to be moved.
        """

    @abstractmethod
    def return_partials(
        self, partials: Sequence[Sequence[Tensor]], like: Sequence[Tensor], combine: Combine, *, tag: int
    ) -> Arriving:
        """Start to return each slot's partial results to the chunk's owner.

        Args:
            partials: per kind of result, a tensor per slot; all of one kind have one shape.
            like: per kind a tensor of that shape and dtype, as the caller's tile may have no slot.
            combine: makes one partial result of those that several ranks of a node have of a chunk.
            tag: as in `gather`.

        Returns:
            What others return of the caller's own chunks: stacks [senders, ...], the senders in a fixed order.
        """

    def launch(self, rounds: Sequence[Round], kinds: Sequence[Sequence[Tensor]], tag: int, what: str) -> Pending:
        """Start the messages of these rounds, which say by position which of each kind's tensors travel."""
        assert self.group is not None
        lists: list[Lists] = [each.of(tensors) for tensors in kinds for each in rounds]
        return launch(self.group, lists, tag, self._about[what])

    @cached_property
    def _about(self) -> dict[str, str]:
        """What travels, and between which global ranks, for errors."""
        where = f"{self.label} of ranks {list(self.peers)}"
        return {what: f"{where}: {what}" for what in (GATHERING, RETURNING)}


GATHERING, RETURNING = "gathering", "returning results"


@dataclass(frozen=True, kw_only=True)
class DirectAxis(Axis):
    """Each rank counts as a node."""

    script: Script

    @property
    def own_slots(self) -> tuple[tuple[int, int], ...]:
        """See `Axis.own_slots`."""
        return self.script.own_slots

    def gather(self, shards: Sequence[Tensor], *, tag: int) -> tuple[list[Tensor], Pending]:
        """See `Axis.gather`."""
        if self.group is None:
            halves = [chunk.half for chunk in self.slots]
            assert halves == sorted(halves), "a rank's own chunks are in token order"
            first = halves[0] if halves else LOWER
            return [shard[first : first + len(halves)] for shard in shards], Pending()
        buffers, kinds = [], []
        later: list[tuple[Tensor, Tensor]] = []
        for shard in shards:
            buffer = shard.new_empty((len(self.slots), *shard.shape[1:]))
            slots = buffer.unbind()
            # Messages are contiguous. The chunk of a group of heads is not: it is copied into its slot and leaves from
            # there.
            chunks = list(shard.unbind())
            if chunks[LOWER].is_contiguous():
                later += [(slots[slot], chunks[half]) for half, slot in self.own_slots]
            else:
                for half, slot in self.own_slots:
                    chunks[half] = slots[slot].copy_(chunks[half])
                chunks = [chunk.contiguous() for chunk in chunks]
            buffers.append(buffer)
            kinds.append((*chunks, *slots, nothing(shard)))
        pending = self.launch(self.script.gather, kinds, tag, GATHERING)
        copy(later)
        return buffers, pending

    def return_partials(
        self, partials: Sequence[Sequence[Tensor]], like: Sequence[Tensor], combine: Combine, *, tag: int
    ) -> Arriving:
        """See `Axis.return_partials`."""
        received: list[list[list[Tensor]]] = [[[], []] for _ in like]
        if self.group is None:
            return received, Pending()
        kinds = []
        for kind, sample, halves in zip(partials, like, received, strict=True):
            room = landing(sample, self.script.returning, halves)
            kinds.append((*contiguous(kind), *room.unbind(), nothing(sample)))
        return received, self.launch(self.script.back, kinds, tag, RETURNING)


def landing(like: Tensor, returning: tuple[int, int], halves: Sequence[list[Tensor]]) -> Tensor:
    """Room for so many results of the own lower and upper chunk; a stack of each is added to its half of `halves`."""
    room = like.new_empty((sum(returning), *like.shape))
    for half, stack, count in zip(halves, room.split(returning), returning, strict=True):
        if count:
            half.append(stack)
    return room


def contiguous(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors, all of one shape; one launch copies them all unless they are contiguous."""
    if all(x.is_contiguous() for x in tensors):
        return tensors
    return torch.stack(list(tensors)).unbind()


def copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first, all pairs of one dtype by one launch."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for to, source in pairs:
        targets, sources = by_dtype.setdefault(to.dtype, ([], []))
        targets.append(to)
        sources.append(source)
    for targets, sources in by_dtype.values():
        torch._foreach_copy_(targets, sources)
