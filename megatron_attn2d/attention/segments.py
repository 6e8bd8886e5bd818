"""Tables of segments: many pieces of attention of one band, so that one kernel call attends them all.

A segment is a run of query rows and a run of key rows of two flat buffers. Packed sequences, padding and windows make
many of them; how many there are changes the size of a table and never the number of kernel calls.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_attn2d.attention.layout import Band
from megatron_attn2d.attention.staging import to_device

type Numbers = np.ndarray[tuple[int, int], np.dtype[np.int64]]
"""[S, 4]: query start and length, key start and length of each segment."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Pieces of attention of one band, for one kernel call.

    Segment i attends the query rows [q_starts[i], q_starts[i] + q_lengths[i]) to the key rows likewise. No two segments
    share a query row or a key row, and both starts ascend. Rows that no segment has are legal.

    Attributes:
        q_starts, k_starts: [S + 1] int32, contiguous, on the device of the rows; the last entry is the number of rows.
        q_lengths, k_lengths: [S] int32, on the same device. Either both lengths of a segment are 0 or neither is.
        band: who sees whom within each segment. Every row of a segment sees a key.
        most_q, most_k: upper bounds of the lengths; they need no synchronisation.
        host: the segments as numbers of the host, for reading; None where only the device knows them.
    """

    q_starts: Tensor
    q_lengths: Tensor
    k_starts: Tensor
    k_lengths: Tensor
    band: Band
    most_q: int
    most_k: int
    host: Numbers | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def made[Value](self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What kernels derive from the table once."""
        if key not in self._made:
            self._made[key] = make()
        value: Value = self._made[key]
        return value

    def by_length(self, short: int, few: int, q_rows: int, k_rows: int) -> tuple[Segments | None, Segments | None]:
        """The segments of more than `short` query rows, and the others if there are more than `few`.

        Both are tables of the same buffers, of `q_rows` and `k_rows`, None where there are none. The first has all
        segments where only the device knows them.
        """

        def split() -> tuple[Segments | None, Segments | None]:
            host = self.host
            if host is None:
                return self, None
            taken, brief = host[:, 1] > 0, host[:, 1] <= short
            if (taken & brief).sum() <= few:
                return self, None
            long, others = (
                Segments.of(host[chosen], self.band, q_rows, k_rows, self.q_starts.device) if chosen.any() else None
                for chosen in (taken & ~brief, taken & brief)
            )
            return long, others

        return self.made(("by length", short, few, q_rows, k_rows), split)

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """Query start and length, key start and length of each segment that is not empty; reads a device's numbers."""
        numbers = self.host
        if numbers is None:
            columns = (self.q_starts[:-1], self.q_lengths, self.k_starts[:-1], self.k_lengths)
            numbers = torch.stack(columns, 1).cpu().numpy()
        for q_start, q_length, k_start, k_length in numbers.tolist():
            if q_length:
                yield q_start, q_length, k_start, k_length

    @classmethod
    def of(cls, host: Numbers, band: Band, q_rows: int, k_rows: int, device: torch.device) -> Segments:
        """A table of numbers that the host knows, copied to `device` without waiting for it.

        Args:
            host: the segments, ascending.
            band: of all of them.
            q_rows, k_rows: of the two buffers.
            device: where the rows are.
        """
        count = len(host)
        numbers = np.empty((4, count + 1), dtype=np.int32)
        numbers[:, :count] = host.T
        numbers[:, count] = q_rows, 0, k_rows, 0
        q_starts, q_lengths, k_starts, k_lengths = to_device(numbers, device).unbind()
        q_lengths, k_lengths = q_lengths[:count], k_lengths[:count]
        most_q, most_k = (int(host[:, column].max(initial=0)) for column in (1, 3))
        return cls(q_starts, q_lengths, k_starts, k_lengths, band, most_q, most_k, host)
