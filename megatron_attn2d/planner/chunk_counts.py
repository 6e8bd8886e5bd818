"""Counts the chunks that each rank sends and receives in an exchange along the axes of a grid.

A chunk that the causal mask hides is not sent. In the zigzag (`attention.layout`) the tile of a row's queries and a
column's keys needs all upper query chunks and all lower key chunks. It needs the lower query chunk of a rank behind the
first rank of the column, which then sees a key, and the upper key chunk of a rank behind the first rank of the row. So
a rank that sends to another rank or node sends one chunk or two. Which of them depends on two numbers: its rank, and
the first rank on the other side of the tile. To know who sends how much it is enough to count ranks behind a rank, for
all ranks at once, without a list of messages: 4,096 ranks take milliseconds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_attn2d.attention.layout import place_ranks

type _Integers = npt.NDArray[np.int64]


class Busiest(NamedTuple):
    """Numbers of query chunks and key chunks of the ranks, or nodes, that are the busiest for some bytes per chunk."""

    queries: _Integers
    keys: _Integers

    @classmethod
    def of(cls, queries: _Integers, keys: _Integers) -> Busiest:
        """The Pareto front: those that no other one exceeds in both numbers."""
        order = np.lexsort((-keys, -queries))
        queries, keys = queries[order], keys[order]
        before = np.concatenate(([-1], np.maximum.accumulate(keys)[:-1]))
        return cls(queries[keys > before], keys[keys > before])

    def weighed(self, queries: float, keys: float) -> float:
        """The largest sum, with these weights per chunk of queries and of keys."""
        return float((self.queries * queries + self.keys * keys).max())


class Stage(NamedTuple):
    """One stage of the exchange along both axes, between blocks of the grid or within them, in numbers of chunks.

    Attributes:
        total, outside: chunks of queries and of keys that all ranks send together.
        link, rank, node: chunks of the busiest ones; see `Phase`.
        gathered, returned: chunks that a rank receives when chunks are gathered, and when partial results return.
    """

    total: tuple[int, int]
    outside: tuple[int, int]
    link: Busiest
    rank: Busiest
    node: Busiest
    gathered: Busiest
    returned: Busiest


@lru_cache(maxsize=4096)
def stages(
    axes: tuple[int, int, int], tile: tuple[int, int] | None, ranks_per_node: int, causal: bool
) -> tuple[Stage, Stage]:
    """The stage between blocks and the stage within them; each of the U ranks of a place sends the same."""
    u, rows, cols = axes
    ranks = np.array(place_ranks(rows, cols, *(tile or (rows, 1))), np.int64)
    block_rows, block_cols = tile or (1, 1)
    nothing = np.full(rows * cols, -1)
    queries = _Axis(ranks, ranks.min(0) if causal else nothing[:cols], block_cols)
    keys = _Axis(ranks.T, ranks.min(1) if causal else nothing[:rows], block_rows)
    # All pairs of context ranks that share a node, and their place among the U ranks; the lower one first.
    everyone = np.arange(u * rows * cols)
    low, high = [], []
    for apart in range(u, ranks_per_node, u):
        first = everyone[:-apart]
        first = first[first // ranks_per_node == (first + apart) // ranks_per_node]
        low.append(first)
        high.append(first + apart)
    senders, receivers = (np.concatenate([*a, *b, np.empty(0, np.int64)]) for a, b in ((low, high), (high, low)))
    near = [axis.pairs(senders // u, receivers // u) for axis in (queries, keys)]
    sides = [(axis.between(), axis.within()) for axis in (queries, keys)]
    return tuple(  # type: ignore[return-value]
        _stage(u, ranks_per_node, [side[i] for side in sides], [pairs[i] for pairs in near], senders, receivers)
        for i in range(2)
    )


def _stage(
    u: int,
    ranks_per_node: int,
    sides: list[tuple[_Integers, _Integers]],
    near: list[_Integers],
    senders: _Integers,
    receivers: _Integers,
) -> Stage:
    """One stage of the exchange.

    Args:
        u: ranks over heads, U.
        ranks_per_node: number of consecutive ranks that share a node.
        sides: for queries and for keys, the chunks that each place of the grid sends and receives.
        near: for queries and for keys, the chunks that each pair of ranks of a node sends.
        senders, receivers: the ranks of these pairs.
    """
    links, ranks, nodes, totals, outsides = [], [], [], [], []
    for (sent, received), pairs in zip(sides, near, strict=True):
        everything = np.repeat(sent, u), np.repeat(received, u)
        size = len(everything[0])
        within = [np.bincount(ends, pairs, size).astype(np.int64) for ends in (senders, receivers)]
        across = [whole - part for whole, part in zip(everything, within, strict=True)]
        node = np.arange(size) // ranks_per_node
        links.append(np.concatenate(within))
        ranks.append(np.concatenate(across))
        nodes.append(np.concatenate([np.bincount(node, side).astype(np.int64) for side in across]))
        totals.append(int(everything[0].sum()))
        outsides.append(int(across[0].sum()))
    return Stage(
        (totals[0], totals[1]),
        (outsides[0], outsides[1]),
        Busiest.of(*links),
        Busiest.of(*ranks),
        Busiest.of(*nodes),
        Busiest.of(*(received for _, received in sides)),
        Busiest.of(*(sent for sent, _ in sides)),
    )


class _Axis:
    """One axis of the grid: the numbers of chunks that its ranks send to each other in both stages.

    Lines are the rows, along which queries travel, or the columns, along which keys travel. The members of a line are
    cut into blocks of `size`, the nodes of the exchange. Between blocks a chunk goes to the member of each block that
    has the same place in it as the owner in its own; within a block that member sends it to whoever needs it
    (`attention.routes`).

    Args:
        lines: ranks, [lines, members].
        lowest: [members], the first rank on the other side of a member's tile, or -1 without a mask.
        size: members per block.
    """

    def __init__(self, lines: _Integers, lowest: _Integers, size: int) -> None:
        count, members = lines.shape
        self.blocks, self.size, self.lowest = members // size, size, lowest
        self.block_lowest = lowest.reshape(self.blocks, size).min(1)
        self.line, self.member = (np.empty(lines.size, np.int64) for _ in range(2))  # by rank
        self.line[lines], self.member[lines] = np.indices(lines.shape)
        # By line and place, the ranks at that place of each block: a member hands their chunks on within its block.
        self._classes = np.sort(lines.reshape(count, self.blocks, size).swapaxes(1, 2).reshape(-1, self.blocks), 1)
        self._stride = lines.size + 1
        offsets = self._stride * np.arange(len(self._classes))
        self._sorted = (self._classes + offsets[:, None]).ravel()

    def behind(self, line: _Integers, place: _Integers, rank: _Integers) -> _Integers:
        """How many ranks at `place` of the blocks of `line` are behind `rank`."""
        which = line * self.size + place
        found = np.searchsorted(self._sorted, which * self._stride + rank, "right")
        return (which + 1) * self.blocks - found

    def between(self) -> tuple[_Integers, _Integers]:
        """Chunks that each rank sends and receives between blocks."""
        ranks = np.arange(len(self.line))
        block, place = np.divmod(self.member, self.size)
        own = ranks > self.block_lowest[block]  # the second chunk that it would send to its own block
        sent = np.searchsorted(np.sort(self.block_lowest), ranks, "left") - own
        received = self.behind(self.line, place, self.block_lowest[block]) - own
        return self.blocks - 1 + sent, self.blocks - 1 + received

    def within(self) -> tuple[_Integers, _Integers]:
        """Chunks that each rank sends and receives within its block."""
        sent, received = (np.zeros(len(self.line), np.int64) for _ in range(2))
        if self.size == 1:
            return sent, received
        block, place = np.divmod(self.member, self.size)
        for other in range(self.size):  # the place of the other member of the block
            apart = place != other
            received += apart * (self.blocks + self.behind(self.line, other + 0 * place, self.lowest[self.member]))
            sent += apart * (self.blocks + self.behind(self.line, place, self.lowest[block * self.size + other]))
        return sent, received

    def pairs(self, sender: _Integers, receiver: _Integers) -> tuple[_Integers, _Integers]:
        """Chunks that each `sender` sends to its `receiver` between blocks, and within blocks."""
        (block, place), (to_block, to_place) = (np.divmod(self.member[r], self.size) for r in (sender, receiver))
        meet = self.line[sender] == self.line[receiver]
        between = meet & (block != to_block) & (place == to_place)
        within = meet & (block == to_block)
        chunks = self.blocks + self.behind(self.line[sender], place, self.lowest[self.member[receiver]])
        return between * (1 + (sender > self.block_lowest[to_block])), within * chunks
