"""Which chunk travels from whom to whom along one axis of the grid, in integers alone.

Where several ranks of an axis share a node, a chunk crosses the network once for each node that needs it, to the rank
of that node that stands where the owner stands in its own, its *carrier*, which passes it on over the node's links:

    nodes (0 1) (2 3), owner 1:      1 --network--> 3 --within--> 2         and  1 --within--> 0

Partial results return the same way: to the carrier, which combines those of its node, then to the owner. Nodes of one
rank each make every chunk travel directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megatron_attn2d.attention.layout import Chunk


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
