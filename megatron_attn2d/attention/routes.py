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

BETWEEN, WITHIN = 0, 1
"""The stages of an exchange, between nodes and within them."""

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
    """The ranks of an axis, `size` of them a node."""
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

    def of[T](self, places: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
        """What is sent to each rank and received from it."""
        sent, received = self._pick
        return sent(places), received(places)

    @cached_property
    def _pick(self) -> tuple[Any, Any]:
        return itemgetter(*self.sends), itemgetter(*self.receives)


def rounds(
    messages: Sequence[Message],
    rank: int,
    order: Mapping[int, int],
    place_sent: Callable[[Message], int],
    place_received: Callable[[Message], int],
) -> tuple[Round, ...]:
    """The messages of all ranks of a group in rounds, as `rank` sees them: the k-th of a pair of ranks is in round k.

    Args:
        messages: those of all ranks, in the same order on each.
        rank: the one that asks.
        order: the place of each rank in the group.
        place_sent, place_received: where a message of `rank` leaves and where one to it lands.
    """
    counts: Counter[tuple[int, int]] = Counter()
    found: list[tuple[list[int], list[int]]] = []
    for message in messages:
        pair = message.sender, message.receiver
        if counts[pair] == len(found):
            found.append(([NOWHERE] * len(order), [NOWHERE] * len(order)))
        sends, receives = found[counts[pair]]
        counts[pair] += 1
        if message.sender == rank:
            sends[order[message.receiver]] = place_sent(message)
        if message.receiver == rank:
            receives[order[message.sender]] = place_received(message)
    return tuple(Round(tuple(sends), tuple(receives)) for sends, receives in found)


class Landing(NamedTuple):
    """What returns to a rank in one stage: so many results, first those of its lower, then of its upper chunk."""

    lower: int
    both: int
    all: int


@dataclass(frozen=True)
class Script:
    """What one rank does along an axis in each call, told in places of lists of tensors.

    Attributes:
        own: half and slot of the own chunks that the own tile needs.
        carried: how many chunks the rank passes on that its tile does not need.
        gather: by stage, rounds over [own lower chunk, own upper chunk, slots, carried chunks, nothing].
        landing: by stage, what returns.
        combined: for each chunk of which the rank's node has several results the places of those in
            [slots, what returned within the node].
        give_back: by stage, rounds over [slots, what returns within the node, combined results, what returns between
            nodes, nothing]; the first stage knows the first two.
    """

    own: tuple[tuple[int, int], ...]
    carried: int
    gather: tuple[tuple[Round, ...], ...]
    landing: tuple[Landing, ...]
    combined: tuple[tuple[int, ...], ...]
    give_back: tuple[tuple[Round, ...], ...]


def script_of(routes: Routes, rank: int, slots: Sequence[Chunk], order: Mapping[int, int]) -> Script:
    """The script of `rank`, whose tile needs `slots`; `order` is the place of each rank of the axis in its group."""
    stages = routes.between, routes.within
    slot_of = {chunk: slot for slot, chunk in enumerate(slots)}
    to_carry = [m.chunk for m in routes.between if m.receiver == rank]
    carried = [chunk for chunk in to_carry if chunk not in slot_of]

    def held(message: Message) -> int:
        chunk = message.chunk
        if chunk.rank == rank:
            return chunk.half
        return 2 + (slot_of[chunk] if chunk in slot_of else len(slots) + carried.index(chunk))

    # The way back: what came to a rank goes out again, what it sent returns.
    landings = [sorted((m for m in stage if m.sender == rank), key=_own_first(rank)) for stage in stages]
    back = [[Message(m.receiver, m.sender, m.chunk) for m in stage] for stage in stages]
    near = {message: len(slots) + i for i, message in enumerate(landings[WITHIN])}
    result: dict[Chunk, int] = {}
    combined: list[tuple[int, ...]] = []
    for chunk in to_carry:
        pieces = [slot_of[chunk]] if chunk in slot_of else []
        pieces += [place for message, place in near.items() if message.chunk == chunk]
        result[chunk] = pieces[0] if len(pieces) == 1 else len(slots) + len(near) + len(combined)
        if len(pieces) > 1:
            combined.append(tuple(pieces))
    first = len(slots) + len(near) + len(combined)
    far = {message: first + i for i, message in enumerate(landings[BETWEEN])}

    def landed(places: Mapping[Message, int]) -> Callable[[Message], int]:
        return lambda message: places[Message(message.receiver, message.sender, message.chunk)]

    return Script(
        tuple((half, slot_of[Chunk(rank, half)]) for half in (LOWER, UPPER) if Chunk(rank, half) in slot_of),
        len(carried),
        tuple(rounds(stage, rank, order, held, held) for stage in stages),
        tuple(_landing(rank, messages) for messages in landings),
        tuple(combined),
        (
            rounds(back[BETWEEN], rank, order, lambda message: result[message.chunk], landed(far)),
            rounds(back[WITHIN], rank, order, lambda message: slot_of[message.chunk], landed(near)),
        ),
    )


def _own_first(rank: int) -> Callable[[Message], tuple[bool, int]]:
    return lambda message: (message.chunk.rank != rank, message.chunk.half)


def _landing(rank: int, messages: Sequence[Message]) -> Landing:
    own = [message.chunk.half for message in messages if message.chunk.rank == rank]
    return Landing(own.count(LOWER), len(own), len(messages))
