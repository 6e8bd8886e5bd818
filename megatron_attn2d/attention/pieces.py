"""Partial results by slot of a tile's plan: each slot holds one chunk, and several calls may have results of it.

What the own rank keeps is merged or summed with everything else of its chunk at once, and so rounded once; what
travels is reduced to one partial result per slot first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_attn2d.attention.merge import merge_partials, sum_partials

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
    """One sum per slot."""
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
