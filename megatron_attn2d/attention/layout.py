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

Where only keys or only queries travel (C = 1 or R = 1), a rank attends its own two chunks as one causal sequence, lower
keys to upper queries included, and the tile has the others' chunks alone. Where only keys travel, those that the same
queries see make a call, so that what returns is rounded once.

Two chunk pairs of ranks a != b hold 1 + [a > b] + [a < b] = 2 squares of causal work, a rank with itself 1 + 2/2 = 2:
every tile of every grid has the same work, in whatever order the ranks lie on it.

Packed sequences are each cut into 2P chunks of their own; a rank's lower half is the lower chunks of all sequences one
after the other. So who sees whom in chunks is the same for all of them, and a rectangle of chunks is a table of one
segment of rows and keys per sequence (`tables`). Padding shortens segments. Under a sliding window a plan says only
which chunks have to do with each other; chunks that nobody in the tile sees are not gathered.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

LOWER, UPPER = 0, 1


class Band(NamedTuple):
    """Row i of a block of sq x sk scores sees the keys j with -left <= j - i - (sk - sq) <= right; None: no limit.

    It is aligned at the bottom right: the last row is on the diagonal of the last key. Over whole sequences, sq = sk,
    it is the mask of the attention.
    """

    left: int | None
    right: int | None


FULL, CAUSAL = Band(None, None), Band(None, 0)


class Chunk(NamedTuple):
    """One of the two chunks that a context-parallel rank holds."""

    rank: int
    half: int

    @property
    def token_order(self) -> tuple[int, int]:
        """A key that sorts chunks as their tokens follow each other in the sequence, for any number of ranks."""
        return (self.half, self.rank if self.half == LOWER else -self.rank)

    def position(self, ranks: int) -> int:
        """The number of the chunk among the 2 * ranks chunks of the sequence."""
        return self.rank if self.half == LOWER else 2 * ranks - 1 - self.rank


type Steps = tuple[tuple[int, int], ...]
"""(stop, reach), ascending by stop: chunks at positions below `stop`, and not below the stop before, reach so far."""


@dataclass(frozen=True)
class Mask:
    """Which chunks of a call have to do with which; the same for all of its tiles.

    Attributes:
        band: who sees whom within each sequence.
        ranks: P. Where it is left out, only full and causal masks without padding can be planned.
        used: the number of chunks, in token order, that hold tokens besides padding; None if all do.
        back: under a window, how many chunks before it a chunk of queries sees, by its position.
        ahead: under a window, how many chunks before it still see a chunk of keys, by the position of the keys.
    """

    band: Band
    ranks: int = 0
    used: int | None = None
    back: Steps = ()
    ahead: Steps = ()

    @classmethod
    def of_one(cls, band: Band, ranks: int, chunk: int) -> Mask:
        """The mask of one sequence without padding, in chunks of `chunk` tokens."""
        if band in (FULL, CAUSAL):
            return cls(band, ranks)
        back, ahead = (2 * ranks if side is None else -(-side // chunk) for side in band)
        return cls(band, ranks, None, ((2 * ranks, back),), ((2 * ranks, ahead),))

    @property
    def windows(self) -> bool:
        """Whether kernels must serve bands besides full rectangles and causal squares."""
        return self.band not in (FULL, CAUSAL)


class Rectangle(NamedTuple):
    """Query slots [start, stop) see all of key slots [first, last)."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class TilePlan:
    """What one tile attends, in chunks.

    Attributes:
        queries, keys: the chunk in each slot of the two buffers, in token order where the same keys are seen. On an
            axis on which nothing travels they are the rank's own two.
        rectangles: what is seen in full, under masks without a window.
        diagonal: the tile's own rank attends its own chunks besides, each to itself.
        diagonal_joined: there its upper chunk attends its lower chunk as well.
        queries_travel, keys_travel: chunks of other ranks are among them.
    """

    queries: tuple[Chunk, ...]
    keys: tuple[Chunk, ...]
    rectangles: tuple[Rectangle, ...] = field(repr=False)
    diagonal: bool
    diagonal_joined: bool
    queries_travel: bool
    keys_travel: bool

    @property
    def diagonal_squares(self) -> float:
        """Work of the own rank's own chunks besides the rectangles, in squares of chunk x chunk, without a window."""
        return (1.0 + self.diagonal_joined) if self.diagonal else 0.0

    @property
    def squares(self) -> float:
        """All work, in squares of chunk x chunk, under masks without a window."""
        return self.diagonal_squares + sum((r.stop - r.start) * (r.last - r.first) for r in self.rectangles)


def visible_prefix(query: Chunk, key_ranks: tuple[int, ...], causal: bool) -> int:
    """How many key chunks of a tile, in token order, `query` sees in full (its own diagonal square apart)."""
    if not causal:
        return 2 * len(key_ranks)
    if query.half == LOWER:
        return sum(rank < query.rank for rank in key_ranks)
    return len(key_ranks) + sum(rank > query.rank for rank in key_ranks)


@lru_cache(maxsize=4096)
def tile_plan(query_ranks: tuple[int, ...], key_ranks: tuple[int, ...], mask: Mask) -> TilePlan:
    """Plan the tile of the queries of `query_ranks` against the keys of `key_ranks`.

    Args:
        query_ranks: context-parallel ranks whose queries are gathered (a row of the grid).
        key_ranks: ranks whose keys are gathered (a column). The two share one rank at most.
        mask: what is attended.
    """
    shared = set(query_ranks) & set(key_ranks)
    assert len(shared) <= 1, "a row and a column of a grid share one rank"
    queries_travel, keys_travel = len(query_ranks) > 1, len(key_ranks) > 1
    travel = queries_travel, keys_travel
    if mask.windows:
        queries, keys = _within_reach(query_ranks, key_ranks, mask)
        return TilePlan(
            queries if queries_travel else _chunks(query_ranks),
            keys if keys_travel else _chunks(key_ranks),
            (),
            bool(shared),
            False,
            *travel,
        )
    causal = mask.band == CAUSAL
    diagonal_joined = causal and bool(shared) and not (keys_travel and queries_travel)
    if diagonal_joined and queries_travel:
        query_ranks = tuple(rank for rank in query_ranks if rank not in shared)
    elif diagonal_joined:
        key_ranks = tuple(rank for rank in key_ranks if rank not in shared)
    keys = _used(_chunks(key_ranks), mask) if keys_travel else _chunks(key_ranks)
    found = _used(_chunks(query_ranks), mask) if queries_travel else _chunks(query_ranks)
    most = len(_used(keys, mask))  # keys that do not travel stay in the plan, those of padding too
    prefix = {chunk: min(most, visible_prefix(chunk, key_ranks, causal)) for chunk in found}
    # Stable: those that see the same keys stand in token order, so that padding is at the end of them.
    queries = tuple(sorted((c for c in found if prefix[c] or not queries_travel), key=lambda c: prefix[c]))
    staircase = [  # from this slot of queries to that, which see so many keys
        (slots[0], slots[-1] + 1, seen)
        for seen, run in groupby(range(len(queries)), key=lambda slot: prefix[queries[slot]])
        if seen and (slots := list(run))
    ]
    if queries_travel:  # each query's partial result comes from one call, and is rounded once
        rectangles = [Rectangle(start, stop, 0, seen) for start, stop, seen in staircase]
    else:  # the same for the gradient of keys
        seen_before = (0, *(seen for _, _, seen in staircase))
        rectangles = [
            Rectangle(start, len(queries), before, seen)
            for (start, _, seen), before in zip(staircase, seen_before, strict=False)
        ]
    seen_keys = keys[: max(prefix.values(), default=0)] if keys_travel else keys
    return TilePlan(queries, seen_keys, tuple(rectangles), causal and bool(shared), diagonal_joined, *travel)


def tile_slots(
    query_ranks: tuple[int, ...], key_ranks: tuple[int, ...], mask: Mask
) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...]]:
    """`queries` and `keys` of `tile_plan`: what other ranks need to know of a tile."""
    plan = tile_plan(query_ranks, key_ranks, mask)
    return plan.queries, plan.keys


def _chunks(ranks: tuple[int, ...]) -> tuple[Chunk, ...]:
    """Their chunks in token order."""
    return tuple(sorted((Chunk(rank, half) for rank in ranks for half in (LOWER, UPPER)), key=lambda c: c.token_order))


def _used(chunks: tuple[Chunk, ...], mask: Mask) -> tuple[Chunk, ...]:
    """Those that hold more than padding."""
    return chunks if mask.used is None else tuple(c for c in chunks if c.position(mask.ranks) < mask.used)


def _within_reach(
    query_ranks: tuple[int, ...], key_ranks: tuple[int, ...], mask: Mask
) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...]]:
    """Chunks in token order that see, and that are seen by, another chunk of the tile under a window.

    A chunk reaches no farther the later it stands, so its nearest neighbours on both sides decide.
    """
    queries, keys = _chunks(query_ranks), _chunks(key_ranks)
    rows, columns = ([chunk.position(mask.ranks) for chunk in chunks] for chunks in (queries, keys))

    def sees(query: int | None, key: int | None) -> bool:
        if query is None or key is None:
            return False
        return query - key <= _reach(mask.back, query) if key < query else key - query <= _reach(mask.ahead, key)

    return (
        tuple(c for c, row in zip(queries, rows, strict=True) if any(sees(row, key) for key in _next_to(row, columns))),
        tuple(c for c, key in zip(keys, columns, strict=True) if any(sees(row, key) for row in _next_to(key, rows))),
    )


def _next_to(position: int, others: list[int]) -> tuple[int | None, int | None]:
    """The nearest of ascending positions before and after this one."""
    before, after = bisect_left(others, position), bisect_right(others, position)
    return others[before - 1] if before else None, others[after] if after < len(others) else None


def _reach(steps: Steps, position: int) -> int:
    return next((reach for stop, reach in steps if position < stop), 0)


def place_ranks(rows: int, cols: int, block_rows: int, block_cols: int) -> tuple[tuple[int, ...], ...]:
    """Ranks [row][column] that fill block after block, down the columns within a block and of blocks."""

    def rank(row: int, column: int) -> int:
        block = (column // block_cols) * (rows // block_rows) + row // block_rows
        return (block * block_cols + column % block_cols) * block_rows + row % block_rows

    return tuple(tuple(rank(r, c) for c in range(cols)) for r in range(rows))
