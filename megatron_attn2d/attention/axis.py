"""An axis of the grid on which every chunk travels directly, and what an axis is: see `exchange`."""

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

type Returned = tuple[list[list[list[Tensor]]], Pending]
"""What `Axis.give_back` returns: stacks of tensors on their way, [kind][half], and the messages to wait for."""


@dataclass(frozen=True)
class Combine:
    """How results of the same chunks from several ranks become one.

    Attributes:
        results: of each kind, partial results of chunks, [chunks, ...] or stacks of such, [ranks, chunks, ...]; returns
            one of each kind, [chunks, ...].
        empty: of each kind the value that counts for nothing; there may be fewer kinds.
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
        label: whose axis it is, in errors.
    """

    group: dist.ProcessGroup | None
    slots: tuple[Chunk, ...]
    peers: tuple[int, ...]
    label: str = "attention, axis"

    @property
    @abstractmethod
    def own(self) -> tuple[tuple[int, int], ...]:
        """Half and slot of the caller's own chunks, of those that its tile needs."""

    def own_slot(self, half: int) -> int | None:
        """Slot of the caller's own chunk; None where the tile has no use for it."""
        return dict(self.own).get(half)

    @abstractmethod
    def gather(self, shards: Sequence[Tensor], *, tag: int) -> tuple[list[Tensor], Pending]:
        """Start to gather the tile's chunks of each tensor.

        Args:
            shards: tensors [2, n, ...], lower and upper chunk of n tokens.
            tag: tells messages apart that are in flight on the same axis at once.

        Returns:
            A buffer [slots, n, ...] for each shard, to be read after `Pending.wait`. It is a view of the shard where
            nothing has to be moved.
        """

    @abstractmethod
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

    def launch(self, script: Sequence[Round], places: Sequence[Sequence[Tensor]], tag: int, what: str) -> Pending:
        """Start the messages of a script, of each kind of tensor those that stand at its places."""
        assert self.group is not None
        lists: list[Lists] = [each.of(kind) for kind in places for each in script]
        return launch(self.group, lists, tag, self._about[what])

    @cached_property
    def _about(self) -> dict[str, str]:
        """What is exchanged, and between which global ranks, for errors."""
        where = f"{self.label} of ranks {list(self.peers)}"
        return {what: f"{where}: {what}" for what in (GATHERING, RETURNING)}


GATHERING, RETURNING = "gathering", "returning results"


@dataclass(frozen=True, kw_only=True)
class DirectAxis(Axis):
    """Each rank counts as a node."""

    script: Script

    @property
    def own(self) -> tuple[tuple[int, int], ...]:
        """See `Axis.own`."""
        return self.script.own

    def gather(self, shards: Sequence[Tensor], *, tag: int) -> tuple[list[Tensor], Pending]:
        """See `Axis.gather`."""
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
            # Messages are contiguous. A head group's chunk is not: it is copied into its slot and leaves from there.
            chunks = list(shard.unbind())
            if chunks[LOWER].is_contiguous():
                later += [(slots[slot], chunks[half]) for half, slot in self.own]
            else:
                for half, slot in self.own:
                    chunks[half] = slots[slot].copy_(chunks[half])
                chunks = [chunk.contiguous() for chunk in chunks]
            buffers.append(buffer)
            places.append((*chunks, *slots, nothing(shard)))
        pending = self.launch(self.script.gather, places, tag, GATHERING)
        copy(later)
        return buffers, pending

    def give_back(
        self, partials: Sequence[Sequence[Tensor]], like: Sequence[Tensor], combine: Combine, *, tag: int
    ) -> Returned:
        """See `Axis.give_back`."""
        received: list[list[list[Tensor]]] = [[[], []] for _ in like]
        if self.group is None:
            return received, Pending()
        places = []
        for kind, sample, halves in zip(partials, like, received, strict=True):
            room = landing(sample, self.script.returning, halves)
            places.append((*contiguous(kind), *room.unbind(), nothing(sample)))
        return received, self.launch(self.script.give_back, places, tag, RETURNING)


def landing(like: Tensor, returning: tuple[int, int], halves: Sequence[list[Tensor]]) -> Tensor:
    """Room for so many results of the own lower and upper chunk; the stacks of both are added to `halves`."""
    room = like.new_empty((sum(returning), *like.shape))
    for half, stack, count in zip(halves, room.split(returning), returning, strict=True):
        if count:
            half.append(stack)
    return room


def contiguous(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors, of one shape, all of them copied by one launch unless they are contiguous."""
    if all(x.is_contiguous() for x in tensors):
        return tensors
    return torch.stack(list(tensors)).unbind()


def copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first, those of a dtype by one launch."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for to, source in pairs:
        targets, sources = by_dtype.setdefault(to.dtype, ([], []))
        targets.append(to)
        sources.append(source)
    for targets, sources in by_dtype.values():
        torch._foreach_copy_(targets, sources)
