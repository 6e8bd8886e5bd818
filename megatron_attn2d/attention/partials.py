"""Partial results of a tile, by slot, and how the partial results of all tiles become a chunk's result.

Several kernel calls of a tile may have results of one chunk. Results that stay on the rank are merged or summed with
all others of the chunk at once, so that they are rounded once. Results that travel are first reduced to one per slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_attn2d.attention.layout import LOWER, UPPER
from megatron_attn2d.attention.merge import accumulation_dtype, merge_partials, sum_partials

type Slots = list[list[Tensor]]
"""By slot, the partial results of its chunk, [n, b, heads, d] or [b, h, n], each over all of its rows."""


@dataclass(frozen=True)
class Partials:
    """Partial outputs of a tile, by query slot: `outs` [n, b, h, d] and `lses` [b, h, n]."""

    outs: Slots
    lses: Slots

    def reduced(self) -> Partials:
        """One output and one log-sum-exp per slot."""
        outs, lses = [], []
        for slot, slot_lses in zip(self.outs, self.lses, strict=True):
            out, lse = slot[0], slot_lses[0]
            if len(slot) > 1:
                out, lse = torch.empty_like(out), torch.empty_like(lse)
                merge_partials([slot], [slot_lses], [out], [lse])
            outs.append([out])
            lses.append([lse])
        return Partials(outs, lses)


@dataclass(frozen=True)
class PartialGradients:
    """Partial gradients of a tile: dq by query slot, dk and dv by key slot, [n, b, heads, d]."""

    dq: Slots
    dk: Slots
    dv: Slots

    def reduced(self, queries: bool, keys: bool) -> PartialGradients:
        """The same with one sum per slot of queries, of keys and values, or of both."""
        dk, dv = (_summed(slots) if keys else slots for slots in (self.dk, self.dv))
        return PartialGradients(_summed(self.dq) if queries else self.dq, dk, dv)


def _summed(slots: Slots) -> Slots:
    sums = []
    for slot in slots:
        total = slot[0]
        if len(slot) > 1:
            total = torch.empty_like(total)
            sum_partials([slot], [total])
        sums.append([total])
    return sums


class KeyGradients:
    """Gradients of keys or values by slot, to which several calls of a tile contribute.

    Where each call has a prefix of the keys, the shortest first, gradients are added up in place: kept apart they would
    take a multiple of the memory.

    Args:
        shape: [K, n, b, g, d], of all chunks.
        like: gives dtype and device.
        apart: gradients are kept as they come, to be rounded once with all others of their chunk.
        few: there are so few calls that the gradients' dtype serves for the sum.
    """

    def __init__(self, shape: torch.Size, like: Tensor, apart: bool, few: bool) -> None:
        self._shape, self._dtype, self._device = shape, like.dtype, like.device
        self._few = few
        self._kept = no_results(shape[0]) if apart else None
        self._total: Tensor | None = None

    def add(self, first: int, chunks: Tensor) -> None:
        """Gradients [slots, n, b, g, d] of the slots from `first` on, which is 0 where they are added up."""
        if self._kept is not None:
            add_results(self._kept, first, chunks)
            return
        if self._total is None:
            self._total = chunks if self._few else self._zeros(accumulation_dtype(self._dtype))
            if self._few:
                return
        more, less = (chunks, self._total) if len(chunks) > len(self._total) else (self._total, chunks)
        more[: len(less)].add_(less)  # with += the sum is copied onto itself afterwards
        self._total = more

    def slots(self) -> Slots:
        """The gradients by slot; zeros for a slot to which no call contributed."""
        if self._kept is not None:
            return self._kept
        total = self._zeros(self._dtype) if self._total is None else self._total.to(self._dtype)
        assert len(total) == self._shape[0], "somebody sees the last key chunk"
        return one_per_slot(total)

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self._shape, dtype=dtype, device=self._device)


def no_results(slots: int) -> Slots:
    """So many slots without a result."""
    return [[] for _ in range(slots)]


def add_results(slots: Slots, first: int, chunks: Tensor) -> None:
    """One more result for each slot from `first` on."""
    for slot, chunk in zip(slots[first:], chunks.unbind(), strict=False):
        slot.append(chunk)


def one_per_slot(chunks: Tensor) -> Slots:
    """Each chunk as the only result of its slot."""
    return [[chunk] for chunk in chunks.unbind()]


def merge_halves(outs: Slots, lses: Slots, out: Tensor, lse: Tensor) -> None:
    """Merge the partial results of both halves of a shard into `out` [2, n, b, h, d] and `lse` [2, b, h, n]."""
    totals, total_lses = out.unbind(), lse.unbind()
    seen = [half for half in (LOWER, UPPER) if outs[half]]
    if seen:
        merge_partials(_pick(seen, outs), _pick(seen, lses), _pick(seen, totals), _pick(seen, total_lses))
    for half in {LOWER, UPPER} - set(seen):  # all padding
        totals[half].zero_()
        total_lses[half].fill_(-torch.inf)


def sum_halves(*kinds: tuple[Slots, Tensor]) -> None:
    """Sum the partial gradients of both halves of a shard, each kind into its total [2, n, b, heads, d].

    On a GPU all kinds of one shape are one launch.
    """
    launches: dict[torch.Size, tuple[list[list[Tensor]], list[Tensor]]] = {}
    for slots, totals in kinds:
        for parts, total in zip(slots, totals.unbind(), strict=True):
            if not parts:  # a chunk that no tile used
                total.zero_()
                continue
            together = launches.setdefault(total.shape, ([], []))
            together[0].append(parts)
            together[1].append(total)
    for found, totals_of_shape in launches.values():
        sum_partials(found, totals_of_shape)


def _pick[T](places: list[int], items: Sequence[T]) -> list[T]:
    return [items[i] for i in places]
