"""Partial results by slot of a tile's plan: each slot holds one chunk, of which several calls may have found something.

What the own rank keeps is merged or summed with everything else of its chunk at once, and so rounded once; what
travels is reduced to one partial result a slot first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_attn2d.attention.merge import accumulation_dtype, merge_partials, sum_partials

type Slots = list[list[Tensor]]
"""By slot, the partial results of its chunk, [n, b, heads, d] or [b, h, n], each over all of its rows."""


@dataclass(frozen=True)
class Partials:
    """Partial outputs of a tile, by query slot: `outs` [n, b, h, d] and `lses` [b, h, n]."""

    outs: Slots
    lses: Slots

    def merged(self) -> Partials:
        """One of each a slot."""
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


def summed(slots: Slots) -> Slots:
    """One sum a slot."""
    sums = []
    for slot in slots:
        total = slot[0]
        if len(slot) > 1:
            total = torch.empty_like(total)
            sum_partials([slot], [total])
        sums.append([total])
    return sums


def only(slots: Slots) -> list[Tensor]:
    """Of each slot the only partial result that `merged` or `summed` leave."""
    return [slot[0] for slot in slots]


def joined(parts: list[Slots], dim: int) -> Slots:
    """Results of packed sequences, one a slot each, one sequence after the other along `dim`."""
    if len(parts) <= 1:
        return parts[0] if parts else []
    return [[torch.cat(slot, dim)] for slot in zip(*map(only, parts), strict=True)]


class Pieces:
    """What the calls of one sequence found: usually a call covers whole slots.

    Args:
        slots: their number.
        n: tokens of a chunk.
    """

    def __init__(self, slots: int, n: int) -> None:
        self._n = n
        self._found: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in range(slots)]

    def add(self, start: int, rows: Tensor, lse: Tensor | None = None) -> None:
        """Rows [s, b, h, d] from token `start` of the slots on, and their log-sum-exp [b, h, s] for outputs.

        They cover whole slots, or lie within one.
        """
        slot, within = divmod(start, self._n)
        if within or rows.size(0) < self._n:
            self._found[slot].append((within, rows, rows if lse is None else lse))
            return
        by_slot = rows.unflatten(0, (-1, self._n)).unbind()
        lses = by_slot if lse is None else lse.unflatten(2, (-1, self._n)).unbind(2)
        for i, piece in enumerate(zip(by_slot, lses, strict=True)):
            self._found[slot + i].append((0, *piece))

    def outputs(self, q: Tensor, v: Tensor) -> Partials:
        """Outputs and log-sum-exps. A row that no call had has output 0 and log-sum-exp -inf.

        q and v, [slots, n, b, heads, d], lend their shapes and dtype.
        """
        outs, lses = [], []
        for found in self._found:
            if self._whole(found):
                outs.append([out for _, out, _ in found])
                lses.append([lse for _, _, lse in found])
                continue
            out, lse = nothing(self._n, q, v)
            if found:
                self._merge(found, out, lse)
            outs.append([out])
            lses.append([lse])
        return Partials(outs, lses)

    def gradients(self, like: Tensor) -> Slots:
        """Gradients in the shape and dtype of chunks `like` [slots, n, b, heads, d]; 0 for a row that no call had."""
        slots = []
        for found in self._found:
            if self._whole(found):
                slots.append([rows for _, rows, _ in found])
                continue
            total = like.new_zeros((self._n, *like.shape[2:]), dtype=accumulation_dtype(like.dtype))
            for at, rows, _ in found:
                total[at : at + rows.size(0)] += rows
            slots.append([total.to(like.dtype)])
        return slots

    def _whole(self, found: list[tuple[int, Tensor, Tensor]]) -> bool:
        return bool(found) and all(rows.size(0) == self._n for _, rows, _ in found)

    def _merge(self, found: list[tuple[int, Tensor, Tensor]], out: Tensor, lse: Tensor) -> None:
        outs, lses = [], []
        for at, rows, rows_lse in found:
            outs.append(torch.zeros_like(out))
            lses.append(torch.full_like(lse, -torch.inf))
            outs[-1][at : at + rows.size(0)] = rows
            lses[-1][..., at : at + rows.size(0)] = rows_lse
        merge_partials([outs], [lses], [out], [lse])


class Sums:
    """Gradients of keys that several calls share, added up in place: kept apart they would take a multiple of memory.

    Args:
        slots, n: as in `Pieces`.
        few: there are so few calls that the first one's dtype serves for the sum.
    """

    def __init__(self, slots: int, n: int, few: bool) -> None:
        self._slots, self._n, self._few = slots, n, few
        self._total: Tensor | None = None

    def add(self, start: int, rows: Tensor) -> None:
        """Rows [s, b, h, d] from token `start` of the slots on. A few are added to the first that covers all slots."""
        if self._total is None:
            if self._few and rows.size(0) == self._slots * self._n:
                self._total = rows
                return
            shape = (self._slots * self._n, *rows.shape[1:])
            self._total = rows.new_zeros(shape, dtype=accumulation_dtype(rows.dtype))
        self._total[start : start + rows.size(0)] += rows

    def gradients(self, like: Tensor) -> Slots:
        """See `Pieces.gradients`."""
        total = (
            like.new_zeros((self._slots * self._n, *like.shape[2:]))
            if self._total is None
            else self._total.to(like.dtype)
        )
        return [[slot] for slot in total.unflatten(0, (self._slots, self._n)).unbind()]


def nothing(n: int, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [n, b, h, dv] and log-sum-exp [b, h, n] of rows without a key, for chunks [slots, n, b, heads, d]."""
    batch, heads = q.shape[2:4]
    lse = torch.full((batch, heads, n), -torch.inf, dtype=accumulation_dtype(q.dtype), device=q.device)
    return q.new_zeros((n, batch, heads, v.size(4))), lse
