"""Tables of segments: many pieces of attention of one band, so that one kernel call attends them all.

A segment is a run of query rows and a run of key rows of two flat buffers. Packed sequences, padding and windows make
many segments. Their number changes the size of a table and never the number of kernel calls.

Tables that the host makes belong to a `Bundle`: one copy brings all of a bundle to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_attn2d.attention.layout import Band
from megatron_attn2d.attention.staging import to_device

type Numbers = np.ndarray[tuple[int, int], np.dtype[np.int64]]
"""[S, 4]: query start and length, key start and length of each segment."""


class Columns(NamedTuple):
    """A table where its rows are: starts [S + 1] and lengths [S], int32, contiguous."""

    q_starts: Tensor
    q_lengths: Tensor
    k_starts: Tensor
    k_lengths: Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Pieces of attention of one band, for one kernel call.

    Segment i attends the query rows [q_starts[i], q_starts[i] + q_lengths[i]) to the key rows of the same form. No two
    segments share a query row or a key row, and both starts ascend. A row may be in no segment.

    Attributes:
        columns: makes the table where the rows are. The last entry of the starts is the number of rows; either both
            lengths of a segment are 0 or neither is.
        band: who sees whom within each segment. Every row of a segment sees a key.
        most_q, most_k: upper bounds of the lengths; they need no synchronisation.
        host: the segments as numbers of the host, for reading; None where only the device knows them.
        bundle: the tables that the host made together with this one; None as for `host`.
        number: of this table in the bundle.
    """

    columns: Callable[[], Columns]
    band: Band
    most_q: int
    most_k: int
    host: Numbers | None = None
    bundle: Bundle | None = None
    number: int = 0

    @property
    def q_starts(self) -> Tensor:
        """See `Columns`; the same for the others."""
        return self.columns().q_starts

    @property
    def q_lengths(self) -> Tensor:
        """See `Columns`."""
        return self.columns().q_lengths

    @property
    def k_starts(self) -> Tensor:
        """See `Columns`."""
        return self.columns().k_starts

    @property
    def k_lengths(self) -> Tensor:
        """See `Columns`."""
        return self.columns().k_lengths

    def by_length(self, short: int, few: int) -> tuple[Segments | None, Segments | None]:
        """The segments of more than `short` query rows, and the others if there are more than `few`.

        Both are tables of the same buffers, None where there are none. The first has all segments where only the device
        knows them.
        """
        return (self, None) if self.bundle is None else self.bundle.by_length(self.number, short, few)

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """Query start and length, key start and length of each segment that is not empty; reads a device's numbers."""
        numbers = self.host
        if numbers is None:
            q_starts, q_lengths, k_starts, k_lengths = self.columns()
            numbers = torch.stack((q_starts[:-1], q_lengths, k_starts[:-1], k_lengths), 1).cpu().numpy()
        for q_start, q_length, k_start, k_length in numbers.tolist():
            if q_length:
                yield q_start, q_length, k_start, k_length

    @classmethod
    def of(cls, host: Numbers, band: Band, q_rows: int, k_rows: int, device: torch.device) -> Segments:
        """A table of numbers that the host knows, alone in its bundle.

        Args:
            host: the segments, ascending.
            band: of all of them.
            q_rows, k_rows: of the two buffers.
            device: where the rows are.
        """
        most_q, most_k = host[:, 1::2].max(0, initial=0).tolist()
        return Bundle(device).add(host.T, band, q_rows, k_rows, most_q, most_k)


class _Host(NamedTuple):
    """A table as the host knows it: `rows` are [4, S], the columns of `Numbers`."""

    rows: np.ndarray[Any, Any]
    band: Band
    q_rows: int
    k_rows: int
    most_q: int
    most_k: int


class Bundle:
    """Tables that the host makes together.

    The first kernel that asks for one of them brings to the device, by one copy for which nothing waits, all that are
    there by then: so new lengths cost little more for three tables than for one.

    Attributes:
        heads: on the device, of each table that the copy brought, [tables, HEAD] int32: where in `numbers` its four
            columns begin, how many segments it has, its band with `FAR` for no limit, the rows of its two buffers, and
            where its part of a buffer begins that has two numbers for each of the rows.
        numbers: on the device, the columns of all tables, int32.
    """

    heads: Tensor
    numbers: Tensor

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._hosts: list[_Host] = []
        self._columns: list[Columns] = []
        self._parts: dict[tuple[int, int], list[tuple[Segments | None, Segments | None]]] = {}
        self._made: dict[Hashable, Any] = {}

    def add(
        self, rows: np.ndarray[Any, Any], band: Band, q_rows: int, k_rows: int, most_q: int, most_k: int
    ) -> Segments:
        """One more table, of `rows` [4, S]; other arguments as of `Segments.of` and `Segments`."""
        number = len(self._hosts)
        self._hosts.append(_Host(rows, band, q_rows, k_rows, most_q, most_k))
        return Segments(partial(self.columns, number), band, most_q, most_k, rows.T, self, number)

    def columns(self, number: int) -> Columns:
        """The columns of a table."""
        if number >= len(self._columns):
            _place([self], self._device)
        return self._columns[number]

    def by_length(self, number: int, short: int, few: int) -> tuple[Segments | None, Segments | None]:
        """See `Segments.by_length`: all tables are split at once, and one copy brings the parts of all."""
        parts = self._parts.setdefault((short, few), [])
        if number >= len(parts):
            long, brief = Bundle(self._device), Bundle(self._device)
            parts += [_split(host, short, few, long, brief) for host in self._hosts[len(parts) :]]
            _place([long, brief], self._device)
        return parts[number]

    def made[Value](self, key: Hashable, make: Callable[[list[tuple[int, int, int]]], Value]) -> Value:
        """What kernels derive once from all tables; `make` is given the number of segments and rows of each."""
        if key not in self._made:
            self._made[key] = make([(host.rows.shape[1], host.q_rows, host.k_rows) for host in self._hosts])
        value: Value = self._made[key]
        return value


HEAD = 12
FAR = 2**30
_ALIGNED = 4
"""Numbers of 16 bytes. Kernels copy or compile anew what begins elsewhere."""


def aligned(count: int) -> int:
    """The next multiple of 16 bytes of so many numbers."""
    return -(-count // _ALIGNED) * _ALIGNED


def _split(host: _Host, short: int, few: int, long: Bundle, brief: Bundle) -> tuple[Segments | None, Segments | None]:
    """The parts of a table that `Segments.by_length` returns, added to a bundle each."""
    lengths = host.rows[1]
    is_brief = lengths <= short
    count = np.count_nonzero(is_brief)
    if count <= few:
        return long.add(*host), None
    rows = host.rows.take(is_brief.argsort(kind="stable"), 1)
    others, found = rows[:, :-count], rows[:, -count:]  # `few` is not negative
    return long.add(others, *host[1:]) if others.size else None, brief.add(found, *host[1:])


def _place(bundles: Sequence[Bundle], device: torch.device) -> None:
    """Bring the tables of these bundles to the device that are not there yet, all of them by one copy."""
    numbers = np.zeros(sum(_room(bundle) for bundle in bundles), dtype=np.int32)
    sizes: list[int] = []  # of what lies in a row: per bundle its heads, per column the column and what aligns the next
    at = 0
    for bundle in bundles:
        hosts = bundle._hosts[len(bundle._columns) :]
        head, at, before = at, at + HEAD * len(hosts), 0
        sizes.append(at - head)
        for rows, band, q_rows, k_rows, *_ in hosts:
            count = rows.shape[1]
            width = aligned(count + 1)
            columns = numbers[at : at + 4 * width].reshape(4, width)
            columns[:, :count] = rows
            columns[0, count], columns[2, count] = q_rows, k_rows
            sizes += (count + 1, width - count - 1, count, width - count) * 2
            sides = (FAR if side is None else side for side in band)
            places = range(at, at + 4 * width, width)
            numbers[head : head + HEAD - 2] = *places, count, *sides, q_rows, k_rows, before
            head, before = head + HEAD, before + 2 * (aligned(q_rows) + aligned(k_rows))
            at += 4 * width
    placed = to_device(numbers, device)
    pieces = iter(placed.split(sizes))
    for bundle in bundles:
        bundle.heads, bundle.numbers = next(pieces), placed
        for _ in bundle._hosts[len(bundle._columns) :]:
            found = [next(pieces) for _ in range(8)]
            bundle._columns.append(Columns(*found[::2]))


def _room(bundle: Bundle) -> int:
    """How many numbers `_place` needs for the tables of a bundle."""
    return sum(HEAD + 4 * aligned(host.rows.shape[1] + 1) for host in bundle._hosts[len(bundle._columns) :])
