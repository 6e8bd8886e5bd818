"""Tables of segments: many pieces of attention of one band, so that one kernel call attends them all.

A segment is a run of query rows and a run of key rows of two flat buffers. Packed sequences, padding and windows make
many segments. Their number changes the size of a table and never the number of kernel calls.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
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
    """

    columns: Callable[[], Columns]
    band: Band
    most_q: int
    most_k: int
    host: Numbers | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

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

    def made[Value](self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What kernels derive once from the table."""
        if key not in self._made:
            self._made[key] = make()
        value: Value = self._made[key]
        return value

    def by_length(
        self, short: int, few: int, q_rows: int, k_rows: int, device: torch.device
    ) -> tuple[Segments | None, Segments | None]:
        """The segments of more than `short` query rows, and the others if there are more than `few`.

        Both are tables of the same buffers, of `q_rows` and `k_rows` on `device`, None where there are none. The first
        has all segments where only the device knows them.
        """

        def split() -> list[Segments | None] | None:
            if self.host is None:
                return None
            taken, brief = self.host[:, 1] > 0, self.host[:, 1] <= short
            chosen = [taken & ~brief, taken & brief]
            if np.count_nonzero(chosen[1]) <= few:
                return None
            parts = iter(Segments.several([self.host[x] for x in chosen if x.any()], self.band, q_rows, k_rows, device))
            return [next(parts) if x.any() else None for x in chosen]

        # Not the table itself where it stays whole: it would keep itself alive.
        long, others = self.made(("by length", short, few, q_rows, k_rows), split) or (self, None)
        return long, others

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
        """A table of numbers that the host knows, copied to `device` when a kernel asks for it; nothing waits for it.

        Args:
            host: the segments, ascending.
            band: of all of them.
            q_rows, k_rows: of the two buffers.
            device: where the rows are.
        """
        (table,) = cls.several([host], band, q_rows, k_rows, device)
        return table

    @classmethod
    def several(
        cls, hosts: Sequence[Numbers], band: Band, q_rows: int, k_rows: int, device: torch.device
    ) -> list[Segments]:
        """Several such tables of the same buffers, by one copy."""
        placed = cache(lambda: _placed(hosts, q_rows, k_rows, device))

        def table(i: int, host: Numbers) -> Segments:
            most_q, most_k = (int(host[:, column].max(initial=0)) for column in (1, 3))
            return cls(lambda: placed()[i], band, most_q, most_k, host)

        return [table(i, host) for i, host in enumerate(hosts)]


_ALIGNED = 4
"""Numbers of 16 bytes. Kernels copy or compile anew what begins elsewhere."""


def _placed(hosts: Sequence[Numbers], q_rows: int, k_rows: int, device: torch.device) -> list[Columns]:
    """The columns of several tables."""
    widths = [-(-(len(host) + 1) // _ALIGNED) * _ALIGNED for host in hosts]
    numbers = np.zeros((len(Columns._fields), sum(widths)), dtype=np.int32)
    begin, places = 0, []
    for host, width in zip(hosts, widths, strict=True):
        count = len(host)
        numbers[:, begin : begin + count] = host.T
        numbers[:, begin + count] = q_rows, 0, k_rows, 0
        places.append((begin, count))
        begin += width
    rows = to_device(numbers, device).unbind()
    return [
        Columns(*(row.narrow(0, at, count + starts) for row, starts in zip(rows, (1, 0, 1, 0), strict=True)))
        for at, count in places
    ]
