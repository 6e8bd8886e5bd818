"""Which chunk travels from whom to whom along one axis of the grid, in integers alone.

Where several ranks of an axis share a node, a chunk crosses the network once for each node that needs it, to the rank
of that node that stands where the owner stands in its own, its *carrier*, which passes it on over the node's links:

    nodes (0 1) (2 3), owner 1:      1 --network--> 3 --within--> 2         and  1 --within--> 0

Partial results return the same way: to the carrier, which combines those of its node, then to the owner. Nodes of one
rank each make every chunk travel directly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple

from megatron_attn2d.attention.layout import LOWER, UPPER, Chunk

NOWHERE = -1
"""The place of no message: the last one of each list."""


class Message(NamedTuple):
    """A chunk on its way from one context-parallel rank to another."""

    sender: int
    receiver: int
    chunk: Chunk


@dataclass(frozen=True)
class Routes:
    """All messages that gather an axis: first `between` nodes, then `within` them."""

    between: tuple[Message, ...]
    within: tuple[Message, ...]


def by_nodes(ranks: tuple[int, ...], size: int) -> tuple[tuple[int, ...], ...]:
    """The ranks of an axis, `size` of them per node."""
    return tuple(ranks[i : i + size] for i in range(0, len(ranks), size))


def plan_routes(nodes: tuple[tuple[int, ...], ...], slots: Mapping[int, tuple[Chunk, ...]]) -> Routes:
    """Routes along an axis.

    Args:
        nodes: the ranks of the axis by node; all nodes have the same number of them.
        slots: the chunks that each rank's tile needs.
    """
    place = {rank: i for node in nodes for i, rank in enumerate(node)}
    between, within = [], []
    for node in nodes:
        for chunk in dict.fromkeys(chunk for rank in node for chunk in slots[rank]):
            if chunk.rank not in node:
                between.append(Message(chunk.rank, node[place[chunk.rank]], chunk))
        for rank in node:
            for chunk in slots[rank]:
                carrier = node[place[chunk.rank]]
                if carrier != rank:
                    within.append(Message(carrier, rank, chunk))
    return Routes(tuple(between), tuple(within))


@dataclass(frozen=True)
class Round:
    """At most one message from and to each rank of a group: by rank its place in a list of tensors, or NOWHERE."""

    sends: tuple[int, ...]
    receives: tuple[int, ...]

    @property
    def back(self) -> Round:
        """The same round the other way."""
        return Round(self.receives, self.sends)

    def of[T](self, places: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
        """What is sent to each rank and received from it."""
        sent, received = self._pick
        return sent(places), received(places)

    @cached_property
    def _pick(self) -> tuple[Any, Any]:
        return itemgetter(*self.sends), itemgetter(*self.receives)


class Run(NamedTuple):
    """Chunks [first, last) of those that the sender holds, on their way to a rank of its node."""

    sender: int
    receiver: int
    first: int
    last: int


def rounds[M: (Message, Run)](
    messages: Sequence[M],
    rank: int,
    order: Mapping[int, int],
    place_sent: Callable[[M], int],
    place_received: Callable[[M], int],
) -> tuple[Round, ...]:
    """The messages of all ranks of a group in rounds, as `rank` sees them: the k-th of a pair of ranks is in round k.

    Args:
        messages: those of all ranks, in the same order on each.
        rank: the one that asks.
        order: the place of each rank in the group.
        place_sent, place_received: where a message of `rank` leaves and where one to it lands.
    """
    number = max(Counter((m.sender, m.receiver) for m in messages).values(), default=0)
    found = [([NOWHERE] * len(order), [NOWHERE] * len(order)) for _ in range(number)]
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for message in messages:
        if message.sender == rank:
            found[sent[message.receiver]][0][order[message.receiver]] = place_sent(message)
            sent[message.receiver] += 1
        elif message.receiver == rank:
            found[received[message.sender]][1][order[message.sender]] = place_received(message)
            received[message.sender] += 1
    return tuple(Round(tuple(sends), tuple(receives)) for sends, receives in found)


@dataclass(frozen=True)
class Script:
    """What one rank does along an axis in each call, told in places of lists of tensors; every chunk travels directly.

    Attributes:
        own: half and slot of the own chunks that the own tile needs.
        gather: rounds over [own lower chunk, own upper chunk, slots, nothing].
        give_back: rounds over [slots, what returns, nothing].
        returning: how many results return of the own lower chunk, then of the upper one.
    """

    own: tuple[tuple[int, int], ...]
    gather: tuple[Round, ...]
    give_back: tuple[Round, ...]
    returning: tuple[int, int]


def script_of(messages: Sequence[Message], rank: int, slots: Sequence[Chunk], order: Mapping[int, int]) -> Script:
    """The script of `rank`, whose tile needs `slots`; `order` is the place of each rank of the axis in its group."""
    slot_of = {chunk: slot for slot, chunk in enumerate(slots)}
    place_of, returning = returns(messages, rank)
    way = rounds(messages, rank, order, lambda m: m.chunk.half, lambda m: 2 + slot_of[m.chunk])
    back = rounds(messages, rank, order, lambda m: len(slots) + place_of[m], lambda m: slot_of[m.chunk])
    return Script(own_slots(rank, slot_of), way, tuple(each.back for each in back), returning)


def own_slots(rank: int, slot_of: Mapping[Chunk, int]) -> tuple[tuple[int, int], ...]:
    """Half and slot of a rank's own chunks, of those that have one."""
    return tuple((half, slot_of[Chunk(rank, half)]) for half in (LOWER, UPPER) if Chunk(rank, half) in slot_of)


def returns(messages: Sequence[Message], rank: int) -> tuple[dict[Message, int], tuple[int, int]]:
    """Where the result of each message of `rank` lands, the lower chunk's first, and how many there are."""
    own = sorted((m for m in messages if m.sender == rank), key=lambda m: m.chunk.half)
    lower = sum(m.chunk.half == LOWER for m in own)
    return {m: i for i, m in enumerate(own)}, (lower, len(own) - lower)
