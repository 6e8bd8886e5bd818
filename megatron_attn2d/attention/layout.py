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

Sliding windows and padding have no such prefixes. There each query chunk makes a call for every run of key chunks whose
tokens follow each other, trimmed to the rows and keys that have something to do with each other; chunks that nobody in
the tile sees are not gathered. Packed sequences are each cut into 2P chunks of their own; a rank's lower half is the
lower chunks of all sequences one after the other, and each sequence has calls of its own within the same buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

LOWER, UPPER = 0, 1


class Band(NamedTuple):
    """Row i of a block of sq x sk scores sees the keys j with -left <= j - i - (sk - sq) <= right; None: no limit.

    Aligned at the bottom right: the last row stands on the last key. Over whole sequences, sq = sk, it is what the
    attention masks.
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
        """Sorts chunks as their tokens stand in the sequence, for any number of ranks."""
        return (self.half, self.rank if self.half == LOWER else -self.rank)

    def position(self, ranks: int) -> int:
        """Where the chunk stands among the 2 * ranks of the sequence."""
        return self.rank if self.half == LOWER else 2 * ranks - 1 - self.rank


@dataclass(frozen=True)
class Mask:
    """What a call attends, all tiles alike.

    Attributes:
        band: who sees whom within each sequence.
        ranks: P; where it is left out, only full and causal masks without padding can be planned.
        chunks: tokens of a chunk of each sequence, one sequence unless they are packed.
        lengths: tokens of each sequence that are no padding; without it, all.
        key_chunks: the same as `chunks` for keys, where those are of another sequence.
    """

    band: Band
    ranks: int = 0
    chunks: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] | None = None
    key_chunks: tuple[int, ...] | None = None

    @property
    def padded(self) -> bool:
        """Whether some token is padding."""
        whole = tuple(2 * self.ranks * chunk for chunk in self.chunks)
        return self.lengths is not None and self.lengths != whole

    @property
    def pack(self) -> bool:
        """Whether there are several sequences."""
        return len(self.chunks) > 1

    @property
    def real_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence that are no padding."""
        return self.lengths or tuple(2 * self.ranks * chunk for chunk in self.chunks)

    @property
    def own_apart(self) -> bool:
        """Whether windows let a chunk attend itself apart. Padding differs between a rank's two: there they don't."""
        return not self.padded and self.band.right == 0

    @property
    def windows(self) -> bool:
        """Whether kernels must serve bands besides full rectangles and causal squares."""
        return self.band not in (FULL, CAUSAL)


class Call(NamedTuple):
    """Query tokens [start, stop) attend the key tokens [first, last) of one sequence in the gathered chunks."""

    start: int
    stop: int
    first: int
    last: int
    band: Band = FULL

    @property
    def pairs(self) -> int:
        """Visible pairs of query and key."""
        rows, keys = self.stop - self.start, self.last - self.first
        left, right = self.band
        total = 0
        for row in range(rows):
            at = row + keys - rows
            low = 0 if left is None else max(0, at - left)
            high = keys if right is None else min(keys, at + right + 1)
            total += max(0, high - low)
        return total


@dataclass(frozen=True)
class Part:
    """The kernel calls of one sequence. Its tokens are [offset, offset + chunk) of each chunk, of keys likewise.

    Where `diagonal` is set, the tile's own rank attends its own two chunks under that band, besides the calls: each to
    itself, or as `TilePlan.own` says.
    """

    offset: int
    chunk: int
    key_offset: int
    key_chunk: int
    calls: tuple[Call, ...] = field(repr=False)
    diagonal: Band | None


@dataclass(frozen=True)
class TilePlan:
    """The kernel calls of one tile; `queries` and `keys` name the chunk in each slot of the two gathered buffers.

    Attributes:
        queries, keys: as above.
        parts: the calls by sequence.
        keys_apart: calls cover whole key slots and few of them the same, so gradients of keys are kept call by call.
        own: the own rank's two chunks as one sequence, a tile with one causal call, where they are not attended each
            to itself.
    """

    queries: tuple[Chunk, ...]
    keys: tuple[Chunk, ...]
    parts: tuple[Part, ...]
    keys_apart: bool = False
    own: TilePlan | None = None

    @property
    def own_joined(self) -> bool:
        """Whether the own two chunks are attended as one sequence."""
        return self.own is not None

    @property
    def diagonal(self) -> bool:
        """Whether the tile's own rank attends its own chunks besides the calls."""
        return self.parts[0].diagonal is not None

    @property
    def own_squares(self) -> float:
        """Work of the own rank's own chunks besides the calls, in squares of chunk x chunk, all sequences together."""
        chunk, work = max(1, sum(part.chunk for part in self.parts)), 0.0
        for part in self.parts:
            if part.diagonal is not None:
                left = part.diagonal.left
                width = 1.0 if left is None or left >= part.chunk else (left + 1) / part.chunk
                work += (2 * (width - width**2 / 2) + self.own_joined) * (part.chunk / chunk) ** 2
        return work

    @property
    def squares(self) -> float:
        """All work, in squares of chunk x chunk, all sequences together."""
        chunk, key_chunk = (sum(getattr(part, name) for part in self.parts) for name in ("chunk", "key_chunk"))
        calls = [call for part in self.parts for call in part.calls]
        pairs = sum((c.stop - c.start) * (c.last - c.first) if c.band == FULL else c.pairs for c in calls)
        return self.own_squares + pairs / (chunk * key_chunk)


def visible_prefix(query: Chunk, key_ranks: tuple[int, ...], causal: bool) -> int:
    """How many key chunks of a tile, in token order, `query` sees in full (its own diagonal square apart)."""
    if not causal:
        return 2 * len(key_ranks)
    if query.half == LOWER:
        return sum(rank < query.rank for rank in key_ranks)
    return len(key_ranks) + sum(rank > query.rank for rank in key_ranks)


def tile_plan(query_ranks: tuple[int, ...], key_ranks: tuple[int, ...], mask: Mask) -> TilePlan:
    """The plan of a tile, made once. A pack's, which are large and seldom come again, are kept for a few batches."""
    made = _plan_of_pack if mask.pack else _plan_of_sequence
    return made(query_ranks, key_ranks, mask)


def tile_slots(
    query_ranks: tuple[int, ...], key_ranks: tuple[int, ...], mask: Mask
) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...]]:
    """`queries` and `keys` of `tile_plan`, without the calls: what other ranks need to know of a tile."""
    if mask.windows or mask.padded:
        return _visible_chunks(query_ranks, key_ranks, mask)
    one = replace(mask, chunks=(1,), key_chunks=None, lengths=None)  # who sees whom does not depend on lengths
    plan = _plan_of_sequence(query_ranks, key_ranks, one)
    return plan.queries, plan.keys


def _plan(query_ranks: tuple[int, ...], key_ranks: tuple[int, ...], mask: Mask) -> TilePlan:
    """Plan the tile of the queries of `query_ranks` against the keys of `key_ranks`.

    Args:
        query_ranks: context-parallel ranks whose queries are gathered (a row of the grid).
        key_ranks: ranks whose keys are gathered (a column). The two share one rank at most.
        mask: what is attended.
    """
    shared = set(query_ranks) & set(key_ranks)
    assert len(shared) <= 1, "a row and a column of a grid share one rank"
    if mask.windows or mask.padded:
        return _plan_runs(query_ranks, key_ranks, mask)
    causal = mask.band == CAUSAL
    keys_travel, queries_travel = len(key_ranks) > 1, len(query_ranks) > 1
    own_joined = causal and bool(shared) and not (keys_travel and queries_travel)
    if own_joined and queries_travel:
        query_ranks = tuple(rank for rank in query_ranks if rank not in shared)
    elif own_joined:
        key_ranks = tuple(rank for rank in key_ranks if rank not in shared)
    prefix = {
        Chunk(rank, half): visible_prefix(Chunk(rank, half), key_ranks, causal)
        for rank in query_ranks
        for half in (LOWER, UPPER)
    }
    queries = tuple(sorted((c for c in prefix if prefix[c]), key=lambda c: (prefix[c], c)))
    keys = sorted(_chunks(key_ranks), key=lambda c: c.token_order)
    staircase = []  # from this slot of queries to that, which see so many keys
    for seen, run in groupby(range(len(queries)), key=lambda slot: prefix[queries[slot]]):
        slots = list(run)
        staircase.append((slots[0], slots[-1] + 1, seen))
    if queries_travel:  # each query's partial result comes from one call, and is rounded once
        rectangles = [(start, stop, 0, seen) for start, stop, seen in staircase]
    else:  # the same for the gradient of keys
        seen_before = (0, *(seen for _, _, seen in staircase))
        rectangles = [
            (start, len(queries), before, seen)
            for (start, _, seen), before in zip(staircase, seen_before, strict=False)
        ]
    parts = tuple(
        Part(
            *place,
            tuple(Call(a * place[1], b * place[1], c * place[3], d * place[3]) for a, b, c, d in rectangles),
            CAUSAL if causal and shared else None,
        )
        for place in _places(mask)
    )
    seen_keys = tuple(keys[: max(prefix.values())])
    own = _own_sequence(min(shared), mask) if own_joined else None
    return TilePlan(queries, seen_keys, parts, not (keys_travel and queries_travel), own)


_plan_of_sequence, _plan_of_pack = lru_cache(maxsize=4096)(_plan), lru_cache(maxsize=128)(_plan)


def _own_sequence(rank: int, mask: Mask) -> TilePlan:
    """A rank's two chunks, upper after lower, under a causal mask."""
    chunks = tuple(_chunks((rank,)))
    parts = tuple(Part(*place, (Call(0, 2 * place[1], 0, 2 * place[1], CAUSAL),), None) for place in _places(mask))
    return TilePlan(chunks, chunks, parts, keys_apart=True)


def _chunks(ranks: tuple[int, ...]) -> list[Chunk]:
    return [Chunk(rank, half) for rank in ranks for half in (LOWER, UPPER)]


def _places(mask: Mask) -> Iterator[tuple[int, int, int, int]]:
    """Offset and tokens in a chunk of each sequence, of queries and of keys."""
    offset = key_offset = 0
    for chunk, key_chunk in zip(mask.chunks, mask.key_chunks or mask.chunks, strict=True):
        yield offset, chunk, key_offset, key_chunk
        offset, key_offset = offset + chunk, key_offset + key_chunk


def _plan_runs(query_ranks: tuple[int, ...], key_ranks: tuple[int, ...], mask: Mask) -> TilePlan:
    """The plan under any band, with padding: for each query chunk a call a run of key chunks."""
    lengths, apart = mask.real_lengths, mask.own_apart
    queries, keys = _visible_chunks(query_ranks, key_ranks, mask)
    parts = []
    for place, length in zip(_places(mask), lengths, strict=True):
        n, calls = place[1], []
        for slot, query in enumerate(queries):
            for first, last in _runs(query, keys, mask, apart):
                at, key_at = query.position(mask.ranks) * n, keys[first].position(mask.ranks) * n
                found = _trimmed(at, n, key_at, (last - first) * n, length, mask.band)
                if found is not None:
                    rows, columns = slot * n - at, first * n - key_at
                    calls.append(
                        Call(found[0] + rows, found[1] + rows, found[2] + columns, found[3] + columns, found[4])
                    )
        left = mask.band.left
        diagonal = Band(None if left is None or left >= n - 1 else left, 0)
        parts.append(Part(*place, tuple(calls), diagonal if apart and set(query_ranks) & set(key_ranks) else None))
    return TilePlan(queries, keys, tuple(parts))


def _visible_chunks(
    query_ranks: tuple[int, ...], key_ranks: tuple[int, ...], mask: Mask
) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...]]:
    """Chunks in token order that see, and that are seen by, some chunk of the tile, under any band and with padding."""
    order = sorted(_chunks(query_ranks), key=lambda c: c.token_order)
    key_order = sorted(_chunks(key_ranks), key=lambda c: c.token_order)
    lengths, apart = mask.real_lengths, mask.own_apart

    def visible(query: Chunk, key: Chunk) -> bool:
        if mask.band.right == 0 and key.position(mask.ranks) > query.position(mask.ranks):
            return False  # said first, as it saves a look at each sequence
        return not (apart and query == key) and any(
            _trimmed(query.position(mask.ranks) * n, n, key.position(mask.ranks) * n, n, length, mask.band)
            for n, length in zip(mask.chunks, lengths, strict=True)
        )

    queries = tuple(query for query in order if any(visible(query, key) for key in key_order))
    keys = tuple(key for key in key_order if any(visible(query, key) for query in order))
    return queries, keys


def _runs(query: Chunk, keys: tuple[Chunk, ...], mask: Mask, apart: bool) -> Iterator[tuple[int, int]]:
    """Slots [first, last) of key chunks that follow each other in the sequence.

    The query chunk itself is left out where it is attended apart, and by itself under a causal mask without a window:
    then every call is a full rectangle or a causal square, which every kernel serves.
    """
    first = 0
    for slot in range(1, len(keys) + 1):
        if (
            slot == len(keys)
            or keys[slot].position(mask.ranks) != keys[slot - 1].position(mask.ranks) + 1
            or (mask.band.right == 0 and query in (keys[slot], keys[slot - 1]))
        ):
            if not (apart and keys[first] == query):
                yield first, slot
            first = slot


def _trimmed(
    at: int, rows: int, key_at: int, columns: int, length: int, band: Band
) -> tuple[int, int, int, int, Band] | None:
    """Rows [start, stop), keys [first, last), in tokens of the sequence, and band of what is visible in a block.

    Args:
        at, rows: first query and number of queries.
        key_at, columns: of keys.
        length: tokens of the sequence; others are padding.
        band: of the sequence.
    """
    stop, last = min(at + rows, length), min(key_at + columns, length)
    # Row i sees a key of the block if i - left < last and i + right >= key_at.
    start = at if band.right is None else max(at, key_at - band.right)
    stop = stop if band.left is None else min(stop, last + band.left)
    if start >= stop or key_at >= last:
        return None
    first = key_at if band.left is None else max(key_at, start - band.left)
    last = last if band.right is None else min(last, stop + band.right)
    sq, sk = stop - start, last - first
    ahead = stop - last  # of the last row before the last key
    left = None if band.left is None or band.left - ahead >= sk - 1 else band.left - ahead
    right = None if band.right is None or band.right + ahead >= sq - 1 else band.right + ahead
    return start, stop, first, last, Band(left, right)


def place_ranks(rows: int, cols: int, tile_rows: int, tile_cols: int) -> tuple[tuple[int, ...], ...]:
    """Ranks [row][column] that fill tile after tile, down the columns within a tile and of tiles."""

    def rank(row: int, column: int) -> int:
        tile = (column // tile_cols) * (rows // tile_rows) + row // tile_rows
        return (tile * tile_cols + column % tile_cols) * tile_rows + row % tile_rows

    return tuple(tuple(rank(r, c) for c in range(cols)) for r in range(rows))
