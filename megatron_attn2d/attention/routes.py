"""Which chunk travels from which rank to which along one axis of the grid, in integers alone.

Where several ranks of an axis share a node, a chunk crosses the network once per node that needs it. It goes to its
*carrier*: the rank that has the same position in its node as the owner has in the owner's. The carrier sends it on over
the node's links:

    nodes (0 1) (2 3), owner 1:      1 --network--> 3 --within--> 2         and  1 --within--> 0

Partial results return the same way: to the carrier, which combines the results of its node, then to the owner. Where
each node has one rank, every chunk travels directly.
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
"""The position of no message: the last one of each list."""


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
    position = {rank: i for node in nodes for i, rank in enumerate(node)}
    between, within = [], []
    for node in nodes:
        for chunk in dict.fromkeys(chunk for rank in node for chunk in slots[rank]):
            if chunk.rank not in node:
                between.append(Message(chunk.rank, node[position[chunk.rank]], chunk))
        for rank in node:
            for chunk in slots[rank]:
                carrier = node[position[chunk.rank]]
                if carrier != rank:
                    within.append(Message(carrier, rank, chunk))
    return Routes(tuple(between), tuple(within))


@dataclass(frozen=True)
class Round:
    """At most one message from and to each rank of a group: by rank its position in a list of tensors, or NOWHERE."""

    sends: tuple[int, ...]
    receives: tuple[int, ...]

    @property
    def back(self) -> Round:
        """The same round the other way."""
        return Round(self.receives, self.sends)

    def of[T](self, tensors: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
        """What is sent to each rank and received from it."""
        sent, received = self._pick
        return sent(tensors), received(tensors)

    @cached_property
    def _pick(self) -> tuple[Any, Any]:
        return itemgetter(*self.sends), itemgetter(*self.receives)


class Run(NamedTuple):
    """Chunks [first, last) of the ones that the sender holds, on their way to a rank of its node."""

    sender: int
    receiver: int
    first: int
    last: int


def rounds[M: (Message, Run)](
    messages: Sequence[M],
    rank: int,
    order: Mapping[int, int],
    position_sent: Callable[[M], int],
    position_received: Callable[[M], int],
) -> tuple[Round, ...]:
    """The messages of all ranks of a group in rounds, as `rank` sees them: the k-th of a pair of ranks is in round k.

    Args:
        messages: the messages of all ranks, in the same order on each.
        rank: the rank that asks.
        order: the rank in the group, by rank of the axis.
        position_sent, position_received: where a message of `rank` leaves and where a message to it lands.
    """
    number = max(Counter((m.sender, m.receiver) for m in messages).values(), default=0)
    found = [([NOWHERE] * len(order), [NOWHERE] * len(order)) for _ in range(number)]
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for message in messages:
        if message.sender == rank:
            found[sent[message.receiver]][0][order[message.receiver]] = position_sent(message)
            sent[message.receiver] += 1
        elif message.receiver == rank:
            found[received[message.sender]][1][order[message.sender]] = position_received(message)
            received[message.sender] += 1
    return tuple(Round(tuple(sends), tuple(receives)) for sends, receives in found)


@dataclass(frozen=True)
class Script:
    """What one rank does along an axis in each call, where every chunk travels directly.

    Rounds give positions in lists of tensors.

    Attributes:
        own_slots: half and slot of the own chunks that the own tile needs.
        gather: rounds over [own lower chunk, own upper chunk, slots, nothing].
        back: rounds over [slots, what returns, nothing].
        returning: how many results return of the own lower chunk, then of the upper one.
    """

    own_slots: tuple[tuple[int, int], ...]
    gather: tuple[Round, ...]
    back: tuple[Round, ...]
    returning: tuple[int, int]


def script_of(messages: Sequence[Message], rank: int, slots: Sequence[Chunk], order: Mapping[int, int]) -> Script:
    """The script of `rank`, whose tile needs `slots`; `order` is the rank in the group, by rank of the axis."""
    slot_of = {chunk: slot for slot, chunk in enumerate(slots)}
    position_of, returning = returns(messages, rank)
    way = rounds(messages, rank, order, lambda m: m.chunk.half, lambda m: 2 + slot_of[m.chunk])
    back = rounds(messages, rank, order, lambda m: len(slots) + position_of[m], lambda m: slot_of[m.chunk])
    return Script(own_slots(rank, slot_of), way, tuple(each.back for each in back), returning)


def own_slots(rank: int, slot_of: Mapping[Chunk, int]) -> tuple[tuple[int, int], ...]:
    """Half and slot of those of a rank's own chunks that have a slot."""
    return tuple((half, slot_of[Chunk(rank, half)]) for half in (LOWER, UPPER) if Chunk(rank, half) in slot_of)


def returns(messages: Sequence[Message], rank: int) -> tuple[dict[Message, int], tuple[int, int]]:
    """Where the result of each message of `rank` lands, and how many return of its lower and of its upper chunk.

    The results of the lower chunk come first.
    """
    own = sorted((m for m in messages if m.sender == rank), key=lambda m: m.chunk.half)
    lower = sum(m.chunk.half == LOWER for m in own)
    return {m: i for i, m in enumerate(own)}, (lower, len(own) - lower)
