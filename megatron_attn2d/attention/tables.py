"""A tile's plan over packed sequences, padding and windows, as tables of segments: a constant number of kernel calls.

A plan in chunks is the same for every sequence. Its rows lie by sequence (see `packing`), where a run of chunk slots is
one run of rows per sequence. So a rectangle of slots is a table of one segment per sequence. Of chunks in token order
the real rows are the first: padding shortens segments.

Under a window of l tokens back, a chunk of queries [a, a + x) sees two pieces of the chunks before it:

    keys           a - l         T              a            T = a + x - 1 - l, the first key that the last row sees
    row a            # # # # # # # # # # # # # #  own
    ...                # # # # # # # # # # # # #  chunk,       [a - l, T)  a triangle, of band (0, all)
    row a + x - 1              # # # # # # # # #  apart        [T, a)      a full rectangle

The tile holds some of the keys of these chunks. The keys that it holds follow each other in its buffer. So do those of
the triangle: it is shorter than a chunk, so it touches two neighbours at most.

Keys after a chunk of queries, under a window of r tokens ahead, are the mirror image, with one difference: a band ends
at the bottom right. There the triangle must be a square. Where a missing chunk or the end of the sequence cuts the
square short, the rows below it see all of its keys: a full rectangle.

Tables of numbers that the host knows have no empty segments. Tables of a GPU's numbers may have some.

Legend: J sequences, Q and K slots of the plan's queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_attn2d.attention.layout import CAUSAL, FULL, LOWER, UPPER, Band, Chunk, Rectangle, TilePlan
from megatron_attn2d.attention.packing import Packing
from megatron_attn2d.attention.segments import Bundle, Columns, Numbers, Segments


@dataclass(frozen=True)
class KernelCall:
    """One kernel call: no two calls of one `layer` share a query row."""

    segments: Segments
    layer: int


@dataclass(frozen=True)
class KeyGroup:
    """Calls of which no two share a key row.

    Attributes:
        calls: the calls.
        slots: their keys are in the first so many slots.
        covered: together they have every row of these slots.
    """

    calls: tuple[KernelCall, ...]
    slots: int
    covered: bool


@dataclass(frozen=True)
class TileTables:
    """The kernel calls of a tile.

    Attributes:
        groups: all calls. Where groups share keys, the one with the most keys comes last, and it has all slots.
        covered: per layer, whether its calls have every query row.
    """

    groups: tuple[KeyGroup, ...]
    covered: tuple[bool, ...]

    @property
    def calls(self) -> Iterator[KernelCall]:
        """All calls."""
        return (call for group in self.groups for call in group.calls)


def tile_tables(plan: TilePlan, packing: Packing, band: Band, share_keys: bool) -> TileTables:
    """The calls of a tile: all of its attention but the diagonal.

    Under a mask without a window calls either share keys and no queries, or queries and no keys. Where queries travel,
    they are those of the plan, which share keys. A single call is the same both ways and is made once.
    """
    share_keys |= plan.queries_travel or [(r.stop, r.first) for r in plan.rectangles] == [(len(plan.queries), 0)]
    key = plan, band, share_keys or band not in (FULL, CAUSAL)
    return packing.made(key, lambda: _Rows(plan, packing).tables(band, share_keys))


def diagonal_tables(plan: TilePlan, packing: Packing, rank: int, band: Band) -> TileTables:
    """The call of the diagonal: each of a rank's two chunks to itself, or joined as the plan says; none without it."""
    if not plan.diagonal:
        return TileTables((), ())
    key = "diagonal", plan.diagonal_joined, rank, band
    return packing.made(key, lambda: _Rows.diagonal(rank, packing).squares(band, plan.diagonal_joined))


def whole_tables(packing: Packing, band: Band) -> TileTables:
    """The call of whole sequences on one rank."""
    return packing.made(("whole", band), lambda: _Rows.diagonal(0, packing).squares(band, True))


type _Column = Any
"""Numbers by slot and sequence, int64 [slots, J] or [J], on the host or a GPU as the packing's are."""


class _Pieces(NamedTuple):
    """Segments by slot and sequence, all of one shape."""

    q_start: _Column
    q_length: _Column
    k_start: _Column
    k_length: _Column


class _Rows:
    """Rows of the two buffers of a plan by slot and sequence.

    NumPy works on the host's numbers, in a third of torch's time. The functions used here exist in both.
    """

    def __init__(self, plan: TilePlan, packing: Packing) -> None:
        self._plan, self._packing = plan, packing
        self._np: Any = np if packing.known else torch
        self._n: _Column = packing.chunks
        self._offset: _Column = packing.offsets
        self._queries, self._keys = (
            tuple(chunk.position(packing.ranks) for chunk in chunks) for chunks in (plan.queries, plan.keys)
        )
        self._found: dict[tuple[int, ...], _Column] = {}

    def tables(self, band: Band, share_keys: bool) -> TileTables:
        """See `tile_tables`."""
        if not self._queries or not self._keys:
            return TileTables((), ())
        if band in (FULL, CAUSAL):
            return self._of_rectangles(share_keys)
        return self._of_window(band)

    @classmethod
    def diagonal(cls, rank: int, packing: Packing) -> _Rows:
        """The rows of a rank's own shard."""
        pair = Chunk(rank, LOWER), Chunk(rank, UPPER)
        return cls(TilePlan(pair, pair, (), True, False, False, False), packing)

    def squares(self, band: Band, joined: bool) -> TileTables:
        """Each chunk to itself; with `joined` both chunks of a sequence as one."""
        start, length = self._run(self._queries, 0, 2) if joined else self._each(self._queries)
        most = (1 + joined) * self._packing.longest
        left, right = (None if side is None or side >= most - 1 else side for side in band)
        segments = self._table(_Pieces(start, length, start, length), Band(left, right), most, most)
        covered = not self._packing.padded
        if segments is None:  # all is padding
            return TileTables((), (False,))
        return TileTables((KeyGroup((KernelCall(segments, 0),), len(self._keys), covered),), (covered,))

    def _of_rectangles(self, share_keys: bool) -> TileTables:
        """Rectangles that share no query row, or no key row; see `tile_tables`."""
        plan, most, whole = self._plan, self._packing.longest, not self._packing.padded
        rectangles = plan.rectangles
        if share_keys and not plan.queries_travel:
            stops = (*(r.start for r in rectangles[1:]), len(plan.queries))
            rectangles = tuple(Rectangle(r.start, stop, 0, r.last) for r, stop in zip(rectangles, stops, strict=True))
        calls = []
        for rectangle in rectangles:
            start, stop, first, last = rectangle
            pieces = _Pieces(*self._run(self._queries, start, stop), *self._run(self._keys, first, last))
            segments = self._table(pieces, FULL, (stop - start) * most, (last - first) * most)
            if segments is not None:
                calls.append((rectangle, segments))
        if share_keys:
            groups = []
            for i, (rectangle, segments) in enumerate(calls, 1):
                # Rows that see the last keys may all be padding: the last call that there is finds zeros for these.
                slots = rectangle.last if plan.keys_travel and i < len(calls) else len(plan.keys)
                groups.append(KeyGroup((KernelCall(segments, 0),), slots, whole and slots == rectangle.last))
            all_rows = whole and sum(r.stop - r.start for r, _ in calls) == len(plan.queries)
            return TileTables(tuple(groups), (all_rows,) if calls else ())
        together = tuple(KernelCall(segments, layer) for layer, (_, segments) in enumerate(calls))
        covered = tuple(whole and (r.start, r.stop) == (0, len(plan.queries)) for r, _ in calls)
        all_keys = whole and sum(r.last - r.first for r, _ in calls) == len(plan.keys)
        return TileTables((KeyGroup(together, len(plan.keys), all_keys),) if calls else (), covered)

    def _of_window(self, band: Band) -> TileTables:
        """Full rectangles and edges before each chunk of queries, and after it where the window reaches ahead."""
        pieces = [(0, FULL, piece) for piece in self._apart(self._seen_before(band))]
        if band.left is not None:
            pieces.append((1, Band(0, None), self._left_edge(band.left)))
        if band.right != 0:
            pieces += [(2, FULL, piece) for piece in self._apart(self._seen_after(band))]
        if band.right:
            edge, below = self._right_edge(band.right)
            pieces += [(3, CAUSAL, edge), (3, FULL, below)]
        most = self._packing.longest
        tables = [(layer, self._table(p, kind, most, len(self._keys) * most)) for layer, kind, p in pieces]
        found = [(layer, table) for layer, table in tables if table is not None]
        layers = sorted({layer for layer, _ in found})
        groups = (KeyGroup((KernelCall(table, layers.index(layer)),), len(self._keys), False) for layer, table in found)
        return TileTables(tuple(groups), (False,) * len(layers))

    # Pieces of a window. Positions are tokens of the sequence.
    def _seen_before(self, band: Band) -> _Pieces:
        """What every row of a chunk sees of earlier chunks."""
        at, real = self._at, self._real(self._queries)
        last_row_sees = at - at if band.left is None else at + real - 1 - band.left
        return self._piece(0, real, self._np.minimum(last_row_sees, at), at)

    def _left_edge(self, left: int) -> _Pieces:
        at, real = self._at, self._real(self._queries)
        stop = self._np.minimum(at + real - 1 - left, at)
        end = self._end(stop)  # of the keys that the tile holds of them
        return self._piece(0, self._np.where(real > 0, end + left - at, 0), at - left, stop)

    def _seen_after(self, band: Band) -> _Pieces:
        """What every row of a chunk sees of later chunks: they hold tokens only where it is full."""
        at, length = self._at, self._packing.lengths
        seen = length if band.right is None else self._np.minimum(at + band.right + 1, length)
        return self._piece(0, self._real(self._queries), at + self._n, seen)

    def _right_edge(self, right: int) -> tuple[_Pieces, _Pieces]:
        """Squares, and the rows below them that see all of their keys."""
        at, after = self._at, self._at + self._n
        start = self._np.maximum(at + right + 1, after)
        stop = self._np.minimum(after + right, self._packing.lengths)
        first, last = self._begin(start), self._end(stop)
        square = self._piece(first - right - at, last - first, start, stop)
        below = self._piece(last - right - at, after - (last - right), start, stop)
        return square, below

    def _piece(self, first: _Column, rows: _Column, start: _Column, stop: _Column) -> _Pieces:
        """Rows from the `first` of each chunk on, and the keys that the tile holds of positions [start, stop)."""
        key, end = self._held(start), self._held(stop)
        empty = (rows <= 0) | (end <= key)
        starts = self._starts(self._queries)
        q_start = self._np.where(empty, starts, starts + first)
        q_length, k_length = self._np.where(empty, 0, rows), self._np.where(empty, 0, end - key)
        return _Pieces(q_start, q_length, len(self._keys) * self._offset + key, k_length)

    @cached_property
    def _at(self) -> _Column:
        """The first position of each chunk of queries."""
        return self._times(self._queries)

    def _held(self, position: _Column) -> _Column:
        """How many keys before this position of its sequence the tile holds."""
        chunk, position = self._chunk_of(position)
        before, held = self._lookup
        return before[chunk] * self._n + held[chunk] * (position - chunk * self._n)

    def _end(self, stop: _Column) -> _Column:
        """`stop`, or the end of the chunk before if the tile does not hold the key before `stop`."""
        chunk, last = self._chunk_of(stop - 1)
        return self._np.where(self._is_held(chunk), last + 1, chunk * self._n)

    def _begin(self, start: _Column) -> _Column:
        """`start`, or the start of the next chunk if the tile does not hold this key."""
        chunk, start = self._chunk_of(start)
        return self._np.where(self._is_held(chunk), start, (chunk + 1) * self._n)

    def _is_held(self, chunk: _Column) -> _Column:
        return self._lookup[1][chunk] > 0

    @property
    def _lookup(self) -> tuple[_Column, _Column]:
        device = None if self._packing.known else self._n.device
        return _lookup(self._keys, 2 * self._packing.ranks, device)

    def _chunk_of(self, position: _Column) -> tuple[_Column, _Column]:
        """Number of the chunk of a position, and the position, both within the sequence and its end."""
        position = self._np.minimum(self._np.clip(position, 0, None), 2 * self._packing.ranks * self._n)
        return position // self._np.clip(self._n, 1, None), position

    def _apart(self, pieces: _Pieces) -> Iterator[_Pieces]:
        """The same pieces so that those of one table share no key row.

        Starts and ends of their keys ascend, so pieces that share a row follow each other: with at most m of these,
        every m-th goes into one table. A GPU's numbers are not known: there each slot has a table.
        """
        if not self._packing.known:
            for slot in range(len(self._queries)):
                yield _Pieces(*(x[slot] for x in pieces))
            return
        rows = _in_order(pieces).T
        rows = _joined(rows[rows[:, 1] > 0])
        start, end = rows[:, 2], rows[:, 2] + rows[:, 3]
        most = 1
        while most < len(rows) and (end[:-most] > start[most:]).any():
            most += 1
        for i in range(most):
            yield _Pieces(*rows[i::most].T)

    def _run(self, positions: tuple[int, ...], start: int, stop: int) -> tuple[_Column, _Column]:
        """Where the slots [start, stop) begin, and how many rows of them are no padding, [J] each."""
        first = len(positions) * self._offset + start * self._n
        if not self._packing.padded:
            return first, (stop - start) * self._n
        return first, self._real(positions)[start:stop].sum(0)

    def _each(self, positions: tuple[int, ...]) -> tuple[_Column, _Column]:
        """The same of each slot."""
        return self._starts(positions), self._real(positions)

    def _starts(self, positions: tuple[int, ...]) -> _Column:
        """The first row of each slot."""
        return len(positions) * self._offset + self._times(range(len(positions)))

    def _real(self, positions: tuple[int, ...]) -> _Column:
        """The rows of each slot that are no padding: its first."""
        if positions not in self._found:
            real = self._np.broadcast_to(self._n, (len(positions), len(self._n)))
            if self._packing.padded:
                behind = self._packing.lengths - self._times(positions)
                real = self._np.minimum(self._np.clip(behind, 0, None), self._n)
            self._found[positions] = real
        return self._found[positions]

    def _times(self, numbers: Sequence[int]) -> _Column:
        """So many chunks, in tokens, by slot."""
        if self._packing.known:
            return np.multiply.outer(numbers, self._n)
        return torch.stack([self._n * number for number in numbers])  # numbers of the host would wait for the GPU

    def _table(self, pieces: _Pieces, band: Band, most_q: int, most_k: int) -> Segments | None:
        """None where the host knows that all are empty."""
        packing = self._packing
        q_rows, k_rows = (len(slots) * packing.tokens for slots in (self._queries, self._keys))
        if packing.known:
            rows = _in_order(pieces)
            if rows.size and rows[1::2].min() <= 0:
                rows = rows.compress((rows[1] > 0) & (rows[3] > 0), 1)
            if not rows.size:
                return None
            bundle = packing.made("tables", lambda: Bundle(packing.device))
            return bundle.add(rows, band, q_rows, k_rows, *rows[1::2].max(1).tolist())
        empty = (pieces.q_length <= 0) | (pieces.k_length <= 0)
        q_starts, k_starts = (
            torch.cat((_by_sequence(x), x.new_full((1,), rows))).int()
            for x, rows in ((pieces.q_start, q_rows), (pieces.k_start, k_rows))
        )
        q_lengths, k_lengths = (
            _by_sequence(torch.where(empty, 0, x)).int() for x in (pieces.q_length, pieces.k_length)
        )
        columns = Columns(q_starts, q_lengths, k_starts, k_lengths)
        return Segments(lambda: columns, band, most_q, most_k)


def _by_sequence(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers by slot and sequence in the order of rows: all slots of the first sequence, all of the second, ..."""
    return numbers.movedim(0, -1).flatten()


def _in_order(pieces: _Pieces) -> np.ndarray[Any, Any]:
    """The same of all columns of the host, [4, segments]."""
    if pieces.q_start.ndim == 1:
        return np.stack(pieces)
    slots, sequences = pieces.q_start.shape
    rows = np.empty((len(pieces), sequences, slots), dtype=np.int64)
    for column, numbers in zip(rows, pieces, strict=True):
        for slot in range(slots):  # a few: to transpose takes several times as long
            column[:, slot] = numbers[slot]
    return rows.reshape(len(pieces), -1)


def _joined(rows: Numbers) -> Numbers:
    """Neighbouring full rectangles of the same keys as one."""
    if len(rows) < 2:
        return rows
    same = (rows[1:, 2:] == rows[:-1, 2:]).all(1) & (rows[1:, 0] == rows[:-1, 0] + rows[:-1, 1])
    first = np.flatnonzero(np.append(True, ~same))
    joined = rows[first]
    joined[:, 1] = np.add.reduceat(rows[:, 1], first)
    return joined


@lru_cache(maxsize=1024)
def _lookup(held: tuple[int, ...], chunks: int, device: torch.device | None) -> tuple[_Column, _Column]:
    """For each position of a chunk, and behind the last: how many held chunks stand before it, whether it is held.

    With a device tensors there, else arrays of the host.
    """
    flags = [int(position in held) for position in range(chunks)] + [0]
    before = list(accumulate(flags, initial=0))[:-1]
    if device is None:
        return np.array(before), np.array(flags)
    return torch.tensor(before, device=device), torch.tensor(flags, device=device)
