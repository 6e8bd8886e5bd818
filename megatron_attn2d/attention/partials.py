"""Partial results: what one tile found for the chunks of its slots, and how those of all tiles become a chunk's result.

Several calls of a tile may have results of one chunk. Those that stay on the rank are merged or summed with all others
of the chunk at once, and so rounded once; those that travel are reduced to one partial result per slot first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_attn2d.attention.layout import LOWER, UPPER
from megatron_attn2d.attention.merge import merge_partials, sum_partials

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
        """One sum per slot, of the gradients of queries, of those of keys and values, or of both."""
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


def merge_halves(outs: Slots, lses: Slots, out: Tensor, lse: Tensor) -> None:
    """Merge what all tiles found for both halves of a shard into `out` [2, n, b, h, d] and `lse` [2, b, h, n]."""
    totals, total_lses = out.unbind(), lse.unbind()
    seen = [half for half in (LOWER, UPPER) if outs[half]]
    if seen:
        merge_partials(_pick(seen, outs), _pick(seen, lses), _pick(seen, totals), _pick(seen, total_lses))
    for half in {LOWER, UPPER} - set(seen):  # all padding
        totals[half].zero_()
        total_lses[half].fill_(-torch.inf)


def sum_halves(*kinds: tuple[Slots, Tensor]) -> None:
    """Sum what all tiles found for both halves of a shard into a total of each kind, [2, n, b, heads, d].

    All of one shape are one launch on a GPU.
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
