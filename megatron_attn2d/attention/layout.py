"""Who sees whom: the zigzag layout and the plan of a tile, in integers alone.

The sequence of N tokens is cut into 2P chunks for P context-parallel ranks. Rank i holds chunk i, its *lower* half, and
chunk 2P-1-i, its *upper* half, in this order (Megatron's and Transformer Engine's load-balanced layout):

    P = 4      chunk   0   1   2   3   4   5   6   7
               rank    0   1   2   3   3   2   1   0
                       lower ------>   <------ upper

A tile is the block of the score matrix between the queries of some ranks (a row of the grid) and the keys of others (a
column). Keep the gathered keys in token order: lower halves by ascending rank, then upper halves by descending rank.
Then all that a query chunk sees of the tile, save the square on its own diagonal, is a *prefix* of the key chunks:

    keys of ranks 0, 1 (R = 2)         lower 0   lower 1   upper 1   upper 0
    queries  lower 0 (own)                \\                                    prefix 0 + diagonal
             lower 1 (own)                #         \\                          prefix 1 + diagonal
             lower 2, lower 3             #         #                          prefix 2
             upper 3, upper 2             #         #                          prefix 2
             upper 1 (own)                #         #         \\                prefix 2 + diagonal
             upper 0 (own)                #         #         #         \\      prefix 3 + diagonal

Query chunks with the same prefix are gathered next to each other and cost one rectangular kernel call together. On
grids whose columns are runs of ranks, as Megatron's contiguous groups are, a tile has at most four rectangles and, for
the rank's own two chunks, one batched causal call. A query chunk that sees no key of a tile is never sent to it, nor is
a key chunk that no query of the tile sees.

Two chunk pairs of ranks a != b hold 1 + [a > b] + [a < b] = 2 squares of causal work, a rank with itself 1 + 2/2 = 2:
every tile of every grid has the same work, in whatever order the ranks lie on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

LOWER, UPPER = 0, 1


class Chunk(NamedTuple):
    """One of the two chunks that a context-parallel rank holds."""

    rank: int
    half: int

    @property
    def token_order(self) -> tuple[int, int]:
        """Sorts chunks as their tokens stand in the sequence, for any number of ranks."""
        return (self.half, self.rank if self.half == LOWER else -self.rank)


class Rectangle(NamedTuple):
    """Query slots [start, stop) attend, unmasked, the first `keys` key slots."""

    start: int
    stop: int
    keys: int


@dataclass(frozen=True)
class TilePlan:
    """The kernel calls of one tile, in units of chunks.

    `queries` and `keys` name the chunk in each slot of the two gathered buffers. Where `diagonal` is set, the tile's
    own rank attends its own two chunks causally besides the rectangles.
    """

    queries: tuple[Chunk, ...]
    keys: tuple[Chunk, ...]
    rectangles: tuple[Rectangle, ...]
    diagonal: bool

    @property
    def squares(self) -> float:
        """Work in chunk x chunk squares; a causal diagonal square counts one half."""
        return sum((r.stop - r.start) * r.keys for r in self.rectangles) + (2 * 0.5 if self.diagonal else 0.0)


def visible_prefix(query: Chunk, key_ranks: tuple[int, ...], causal: bool) -> int:
    """How many key chunks of a tile, in token order, `query` sees in full (its own diagonal square apart)."""
    if not causal:
        return 2 * len(key_ranks)
    if query.half == LOWER:
        return sum(rank < query.rank for rank in key_ranks)
    return len(key_ranks) + sum(rank > query.rank for rank in key_ranks)


@lru_cache(maxsize=65536)
def tile_plan(query_ranks: tuple[int, ...], key_ranks: tuple[int, ...], causal: bool) -> TilePlan:
    """Plan the tile of the queries of `query_ranks` against the keys of `key_ranks`.

    Args:
        query_ranks: context-parallel ranks whose queries are gathered (a row of the grid).
        key_ranks: ranks whose keys are gathered (a column). The two share one rank at most.
        causal: causal mask over the whole sequence, or none.
    """
    shared = set(query_ranks) & set(key_ranks)
    assert len(shared) <= 1, "a row and a column of a grid share one rank"
    prefix = {
        Chunk(rank, half): visible_prefix(Chunk(rank, half), key_ranks, causal)
        for rank in query_ranks
        for half in (LOWER, UPPER)
    }
    queries = tuple(sorted((c for c in prefix if prefix[c]), key=lambda c: (prefix[c], c)))
    keys = sorted((Chunk(rank, half) for rank in key_ranks for half in (LOWER, UPPER)), key=lambda c: c.token_order)
    rectangles = []
    for seen, run in groupby(range(len(queries)), key=lambda slot: prefix[queries[slot]]):
        slots = list(run)
        rectangles.append(Rectangle(slots[0], slots[-1] + 1, seen))
    longest = max(prefix.values())
    return TilePlan(queries, tuple(keys[:longest]), tuple(rectangles), diagonal=causal and bool(shared))


def place_ranks(rows: int, cols: int, tile_rows: int, tile_cols: int) -> tuple[tuple[int, ...], ...]:
    """Ranks [row][column] that fill tile after tile, down the columns within a tile and of tiles."""

    def rank(row: int, column: int) -> int:
        tile = (column // tile_cols) * (rows // tile_rows) + row // tile_rows
        return (tile * tile_cols + column % tile_cols) * tile_rows + row % tile_rows

    return tuple(tuple(rank(r, c) for c in range(cols)) for r in range(rows))
