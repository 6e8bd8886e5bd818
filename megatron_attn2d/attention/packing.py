"""Packed sequences (THD): several sequences one after the other, each of them spread over the ranks on its own.

Tokens of several chunks, here of two, lie in one of two orders:

    by slot        s1 lower, s2 lower, ..., s1 upper, s2 upper, ...    a chunk is one message, whatever is packed
    by sequence    s1 lower, s1 upper, s2 lower, s2 upper, ...         what a kernel attends of a sequence is one run

A rank's shard comes by sequence, as Megatron and Transformer Engine have it; gathered chunks come by slot. Both orders
are one where there is a single sequence.

A sequence may be shorter than its padded length: the rest is padding, which sees no key and is seen by no query. Tokens
after the last sequence are padding too.

Totals may be numbers of the host or tensors of a GPU. A tensor of a GPU is never read back: what depends on it is made
on the GPU, whole chunks travel, and its numbers are not checked.

Legend: J sequences, n tokens of a chunk of all of them together.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_attn2d.attention.layout import CAUSAL, FULL, Band, Mask, Steps
from megatron_attn2d.attention.merge import on_gpu
from megatron_attn2d.attention.staging import to_device

type Totals = Sequence[int] | Tensor
"""Running totals [0, s1, s1 + s2, ...] of tokens: numbers of the host, or int32 or int64 on any device."""

type Numbers = np.ndarray[Any, np.dtype[np.int64]] | Tensor
"""Whole numbers, int64: an array where the host knows them, else a tensor of the GPU that does."""

_MOST_PACKS = 8


@dataclass(frozen=True, eq=False)
class Packing:
    """Where sequences lie in the chunks of `ranks` ranks; one sequence without padding is a packing too.

    Attributes:
        chunks: [J], tokens of a chunk of each sequence.
        lengths: [J], tokens of each sequence that are no padding.
        ranks: P.
        tokens: n.
        longest: at least the largest of `chunks`.
        padded: some token is padding, or may be.
        device: where the sequences' tokens are.
        facts: tells packings apart that the host knows.
    """

    chunks: Numbers
    lengths: Numbers
    ranks: int
    tokens: int
    longest: int
    padded: bool
    device: torch.device
    facts: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of_one(cls, chunk: int, ranks: int, device: torch.device) -> Packing:
        """A single sequence of chunks of `chunk` tokens, all of them real."""
        return _of_one(chunk, ranks, device)

    @classmethod
    def of(
        cls,
        cu_seqlens: Totals,
        cu_seqlens_padded: Totals | None,
        tokens: int,
        ranks: int,
        device: torch.device,
        max_seqlen: int | None = None,
    ) -> Packing:
        """From running totals as in Megatron's PackedSeqParams; kept for the layers of a few batches.

        Args:
            cu_seqlens: [0, length of the first, of the first two, ...]. The numbers of a tensor on a GPU are not
                compared with those of the last call. Changes of it are noticed if torch counts them
                (`Tensor._version`). Torch counts neither messages of torch.distributed, nor replays of CUDA graphs, nor
                writes through `.data`.
            cu_seqlens_padded: the same with padding, where there is any between sequences.
            tokens: of the whole pack, all ranks together.
            ranks: context-parallel size.
            device: where the tokens are.
            max_seqlen: tokens of the longest sequence with its padding, if totals are on a GPU.

        Raises:
            ValueError: totals that the host knows don't fit each other, the tokens or the ranks.
        """
        padded = cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded
        if cls.on_gpu(cu_seqlens):
            assert isinstance(cu_seqlens, Tensor)
            assert isinstance(padded, Tensor)
            arguments = (cu_seqlens, padded, tokens, ranks, device, max_seqlen)
            captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            if captured or cu_seqlens.is_inference() or padded.is_inference():
                # A replay makes all of it anew. Changes of inference tensors leave no trace.
                return _on_device(*arguments)
            versions = tuple((id(x), x._version) for x in (cu_seqlens, padded))
            return _kept((tokens, ranks, device, versions, max_seqlen), lambda: (_on_device(*arguments), arguments))
        totals = _tuple(cu_seqlens)
        padded = totals if cu_seqlens_padded is None else _tuple(cu_seqlens_padded)
        return _kept(
            (tokens, ranks, device, totals, padded), lambda: (_on_host(totals, padded, tokens, ranks, device), None)
        )

    @staticmethod
    def on_gpu(totals: Totals) -> bool:
        """Whether reading them would wait for a GPU."""
        return isinstance(totals, Tensor) and totals.is_cuda

    @property
    def known(self) -> bool:
        """The host knows `chunks` and `lengths`."""
        return isinstance(self.chunks, np.ndarray)

    @property
    def one(self) -> bool:
        """There is a single sequence, so that both orders of its tokens are the same."""
        return len(self.chunks) == 1

    @property
    def plain(self) -> bool:
        """It has no padding either."""
        return self.one and not self.padded

    @property
    def padded_lengths(self) -> list[int]:
        """Tokens of each sequence with its padding, for packings that the host knows."""
        numbers: list[int] = (2 * self.ranks * self.chunks).tolist()
        return numbers

    def over(self, parts: int) -> Packing:
        """The same sequences on 1/`parts` of the ranks, in chunks of `parts` times the tokens."""
        if parts == 1:
            return self
        return self.made(
            ("over", parts),
            lambda: replace(
                self,
                chunks=self.chunks * parts,
                ranks=self.ranks // parts,
                tokens=self.tokens * parts,
                longest=self.longest * parts,
                _made={},
            ),
        )

    def mask(self, band: Band) -> Mask:
        """Which chunks have to do with each other. Chunks of nothing but padding are left out where the host knows."""
        return self.made(("mask", band), lambda: self._mask(band))

    def diagonal_share(self, band: Band) -> float:
        """Work of the diagonal under a band, relative to one sequence of n tokens per chunk without a window.

        Where the host does not know the lengths, all tokens count as one sequence.
        """

        def share() -> float:
            if not self.known:
                return 1.0
            chunks = np.asarray(self.chunks, dtype=np.float64)
            width = chunks if band.left is None else np.minimum(chunks, band.left + 1)
            return float((width * (2 * chunks - width)).sum()) / self.tokens**2

        return self.made(("share", band), share)

    def by_slot(self, x: Tensor, slots: int, first: int | None = None) -> Tensor:
        """Chunks by sequence, [slots * n, ...], -> [slots, n, ...], or the `first` of them alone."""
        first = slots if first is None else first
        if self.one:
            return x.unflatten(0, (slots, -1))[:first]
        return x.index_select(0, self.slot_rows(slots)[: first * self.tokens]).unflatten(0, (first, -1))

    def by_sequence(self, x: Tensor) -> Tensor:
        """Chunks by slot, [slots, n, ...], -> [slots * n, ...]."""
        rows = x.flatten(0, 1)
        return rows if self.one else rows.index_select(0, self.sequence_rows(x.size(0)))

    def statistics_by_slot(self, x: Tensor, slots: int) -> Tensor:
        """Numbers per row by sequence, [..., slots * n], -> by slot, [slots, ..., n]."""
        if not self.one:
            x = x.index_select(-1, self.slot_rows(slots))
        return x.unflatten(-1, (slots, -1)).movedim(-2, 0)

    def statistics_by_sequence(self, x: Tensor) -> Tensor:
        """Numbers per row by slot, [slots, ..., n], -> by sequence, [..., slots * n]."""
        rows = x.movedim(0, -2).flatten(-2)
        return rows if self.one else rows.index_select(-1, self.sequence_rows(x.size(0)))

    def slot_rows(self, slots: int) -> Tensor:
        """The position by sequence of each row of `slots` chunks by slot, [slots * n] int32."""
        return self._rows(slots)[0]

    def sequence_rows(self, slots: int) -> Tensor:
        """The position by slot of each row of `slots` chunks by sequence, [slots * n] int32."""
        return self._rows(slots)[1]

    def spread_rows(self, parts: int) -> Tensor:
        """The position in a shard by sequence of each row of two chunks by slot, [parts * 2n] int32.

        Rows are cut into `parts` parts: the first part of all rows comes first, then the second of all rows, ...
        """

        def rows() -> Tensor:
            first = torch.arange(parts, dtype=torch.int32, device=self.device)
            return first[:, None].add(self.slot_rows(2), alpha=parts).flatten()

        return self.made(("spread", parts), rows)

    def collected_rows(self, parts: int) -> Tensor:
        """The way back: the position of each part of each row of the shard, [2n * parts] int32."""

        def rows() -> Tensor:
            step = 2 * self.tokens
            starts = torch.arange(0, parts * step, step, dtype=torch.int32, device=self.device)
            return (self.sequence_rows(2)[:, None] + starts).flatten()

        return self.made(("collected", parts), rows)

    def positions(self, chunks: Sequence[int]) -> Tensor:
        """Positions in the whole pack of the rows of these chunks, by sequence, [1, slots * n] int64.

        They are made on the device: a copy from the host would wait for it and can't be captured in a CUDA graph.
        """

        def found() -> Tensor:
            offset, chunk = self._of_each_row()
            first = torch.arange(self.tokens, device=self.device) + (2 * self.ranks - 1) * offset
            return self.by_sequence(torch.stack([first + position * chunk for position in chunks])).unsqueeze(0)

        return self.made(("positions", tuple(chunks)), found)

    def made[Value](self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What is made once for all layers of a batch."""
        if key not in self._made:
            self._made[key] = make()
        value: Value = self._made[key]
        return value

    def keep_if_captured(self) -> None:
        """While a CUDA graph is captured: keep the tables on the device, which each replay reads, for good.

        What depends on numbers that only the GPU knows is part of the graph itself.
        """
        if self.known and self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured.add(self)

    @property
    def offsets(self) -> Numbers:
        """[J], tokens of a chunk before those of each sequence."""
        return self.made("offsets", lambda: self.chunks.cumsum(0) - self.chunks)

    def order_rows(self, *counts: int) -> None:
        """Make the orders of rows of so many chunks, each of these numbers; on a GPU by one launch.

        A number may be 0: nothing travels to a tile whose scores are all masked.
        """
        missing = [slots for slots in dict.fromkeys(counts) if ("rows", slots) not in self._made]
        if not missing:
            return
        offsets, chunks = self._on_device
        if on_gpu(offsets):
            from megatron_attn2d.attention.kernels.triton.orders import row_orders

            orders = row_orders(offsets, chunks, self.tokens, missing)
        else:
            orders = [self._row_order(slots) for slots in missing]
        self._made.update({("rows", slots): order for slots, order in zip(missing, orders, strict=True)})

    def _rows(self, slots: int) -> tuple[Tensor, Tensor]:
        """`slot_rows` and `sequence_rows`."""
        self.order_rows(slots)
        rows: tuple[Tensor, Tensor] = self._made["rows", slots]
        return rows

    def _row_order(self, slots: int) -> tuple[Tensor, Tensor]:
        """The same, made by torch."""
        offset, chunk = self._of_each_row()
        first = torch.arange(self.tokens, device=self.device) + (slots - 1) * offset
        there = (first + torch.arange(slots, device=self.device)[:, None] * chunk).flatten().int()
        here = torch.arange(len(there), device=self.device, dtype=torch.int32)
        return there, torch.empty_like(there).scatter_(0, there.long(), here)

    @property
    def _on_device(self) -> tuple[Tensor, Tensor]:
        """`offsets` and `chunks` on the device, [J] int32 each."""

        def placed() -> tuple[Tensor, Tensor]:
            if isinstance(self.offsets, Tensor) and isinstance(self.chunks, Tensor):
                return self.offsets.int(), self.chunks.int()
            offsets, chunks = to_device(np.stack((self.offsets, self.chunks)), self.device).unbind()
            return offsets, chunks

        return self.made("on device", placed)

    def _of_each_row(self) -> tuple[Tensor, Tensor]:
        """Per row of a chunk, `offsets` and `chunks` of its sequence, [n] each, on the device."""

        def found() -> tuple[Tensor, Tensor]:
            offsets, chunks = (x.long() for x in self._on_device)
            rows = torch.arange(self.tokens, device=self.device)
            sequence = torch.searchsorted(offsets + chunks, rows, right=True)
            return offsets[sequence], chunks[sequence]

        return self.made("of each row", found)

    def _mask(self, band: Band) -> Mask:
        whole = 2 * self.ranks
        if not self.known:
            reach: Steps = ((whole, whole),)
            return Mask(band, self.ranks) if band in (FULL, CAUSAL) else Mask(band, self.ranks, None, reach, reach)
        chunks, lengths = np.asarray(self.chunks), np.asarray(self.lengths)
        if band in (FULL, CAUSAL):
            most = int(_ceil(lengths, chunks).max()) if self.padded else whole
            return Mask(band, self.ranks, None if most == whole else most)
        used = _ceil(lengths, chunks)
        back, ahead = (_steps(used, np.full_like(chunks, whole) if s is None else _ceil(s, chunks)) for s in band)
        return Mask(band, self.ranks, None, back, ahead)


@lru_cache(maxsize=64)
def _of_one(chunk: int, ranks: int, device: torch.device) -> Packing:
    chunks = np.array([chunk])
    return Packing(chunks, 2 * ranks * chunks, ranks, chunk, chunk, False, device, ((chunk,),))


def _on_host(
    totals: tuple[int, ...], padded: tuple[int, ...], tokens: int, ranks: int, device: torch.device
) -> Packing:
    unit = 2 * ranks
    lengths = _steps_between("cu_seqlens", totals)
    places = lengths if padded is totals else _steps_between("cu_seqlens_padded", padded)
    if len(totals) != len(padded) or len(totals) < 2 or totals[0] != 0 or padded[0] != 0:
        raise ValueError(f"cu_seqlens {_short(totals)} and cu_seqlens_padded {_short(padded)} don't fit")
    if lengths.min() < 0 or (lengths > places).any():
        i = int(np.argmax((lengths < 0) | (lengths > places)))
        raise ValueError(f"packed sequence {i} has {lengths[i]} tokens, but {places[i]} in cu_seqlens_padded")
    chunks = places // unit
    if (chunks * unit != places).any():
        i = int(np.argmax(chunks * unit != places))
        lower = int(chunks[i]) * unit
        raise ValueError(
            f"packed sequence {i} takes {places[i]} tokens, no multiple of 2 * cp = {unit}: pad it to "
            f"{lower + unit} (cu_seqlens_padded){f' or cut it to {lower}' if lower else ''}"
        )
    rest = tokens - padded[-1]
    if rest < 0 or rest % unit:
        raise ValueError(
            f"packed sequences take {padded[-1]} of {tokens} tokens: what is left must be a multiple of 2 * cp = {unit}"
        )
    if rest:
        chunks, lengths = np.append(chunks, rest // unit), np.append(lengths, 0)
    if not chunks.all():  # sequences of no length are legal, and are nothing
        taken = chunks > 0
        chunks, lengths = chunks[taken], lengths[taken]
    if not len(chunks):
        raise ValueError(f"cu_seqlens {_short(totals)} pack no token")
    return Packing(
        chunks, lengths, ranks, tokens // unit, int(chunks.max()), totals[-1] < tokens, device, (totals, padded)
    )


def _steps_between(name: str, totals: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
    try:
        if any(isinstance(total, Tensor) for total in (*totals[:2], *totals[-1:])):
            raise TypeError("a tensor would be waited for")
        numbers = np.frombuffer(array("q", totals), dtype=np.int64)  # refuses 1.5, which NumPy takes for 1
    except (TypeError, OverflowError):
        raise ValueError(f"{name} must hold running totals of tokens, as int: got {list(totals[:8])}") from None
    return numbers[1:] - numbers[:-1]


def _on_device(
    cu_seqlens: Tensor, padded: Tensor, tokens: int, ranks: int, device: torch.device, max_seqlen: int | None
) -> Packing:
    if cu_seqlens.shape != padded.shape:
        raise ValueError(f"cu_seqlens {list(cu_seqlens.shape)} and cu_seqlens_padded {list(padded.shape)} don't fit")
    totals, padded = (x.flatten().to(device, torch.int64) for x in (cu_seqlens, padded))
    rest = tokens - padded[-1:]  # after the last sequence there may be a place without one
    chunks = torch.cat((padded.diff(), rest)) // (2 * ranks)
    lengths = torch.cat((totals.diff(), torch.zeros_like(rest)))
    longest = tokens if max_seqlen is None else min(max_seqlen, tokens)
    return Packing(chunks, lengths, ranks, tokens // (2 * ranks), -(-longest // (2 * ranks)), True, device)


_captured: set[Packing] = set()
"""Those that CUDA graphs read."""
_packs: list[tuple[object, Packing, object]] = []


def _kept(key: object, make: Callable[[], tuple[Packing, object]]) -> Packing:
    """The packing of `key`, made now in place of the oldest one if there is none. `make` says what must live as long.

    Keys are compared one by one: in every layer it would take longer to hash the totals of a thousand sequences.
    """
    place = next((i for i, (known, *_) in enumerate(_packs) if known == key), None)
    if place is None:
        entry = key, *make()
        del _packs[: len(_packs) + 1 - _MOST_PACKS]
    else:
        entry = _packs.pop(place)
    _packs.append(entry)
    return entry[1]


def _tuple(totals: Totals) -> tuple[int, ...]:
    return tuple(totals.flatten().tolist() if isinstance(totals, Tensor) else totals)


def _steps(used: np.ndarray, reach: np.ndarray) -> Steps:
    """The farthest reach of a chunk by its position, from each sequence's used chunks and reach."""
    order = np.argsort(used)
    stops, farthest = used[order], np.maximum.accumulate(reach[order][::-1])[::-1]
    last = np.append(farthest[1:] != farthest[:-1], True)
    return tuple((int(stop), int(most)) for stop, most in zip(stops[last], farthest[last], strict=True) if stop)


def _ceil(a: Any, b: np.ndarray) -> np.ndarray:
    return -(-a // b)


def _short(totals: Sequence[int]) -> str:
    shown = ", ".join(map(str, totals[:8]))
    return f"[{shown}{', ...' if len(totals) > 8 else ''}]"
