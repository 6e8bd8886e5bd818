"""Which heads attend the diagonal before the tile, and which after it, so that messages travel meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the planner, which runs without torch, takes SMALLEST_HALF from here
    from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """A run of query heads and the key heads that they share. Heads are the last dim but one of every tensor."""

    queries: slice
    keys: slice

    @property
    def first(self) -> int:
        """The first query head."""
        return self.queries.start or 0

    def of(self, x: Tensor) -> Tensor:
        """These heads of a tensor with query heads, [..., h, d] or [..., h, n], as a view."""
        return x if self == ALL_HEADS else x[..., self.queries, :]

    def of_keys(self, x: Tensor) -> Tensor:
        """These heads of a tensor with key heads, [..., g, d], as a view."""
        return x if self == ALL_HEADS else x[..., self.keys, :]


ALL_HEADS = Heads(slice(None), slice(None))

SMALLEST_HALF = 2e11
"""FLOP of the forward pass: as many as an H100 computes in the 0.3 ms that one more kernel call costs the CPU."""


def diagonal_heads(q: Tensor, k: Tensor, squares: float, apart: bool) -> list[Heads]:
    """In which runs of heads a rank attends the diagonal: the first run before its tile, the others after it.

    Args:
        q, k: [2, n, b, heads, d].
        squares: work of the diagonal, in squares of chunk x chunk.
        apart: there are messages to hide after the tile.
    """
    _, n, b, h, d = q.shape
    g = k.size(3)
    if not apart or g == 1 or not squares or 2 * squares * n**2 * b * h * d < SMALLEST_HALF:
        return [ALL_HEADS]
    middle = g // 2
    first = middle * (h // g)
    return [Heads(slice(0, first), slice(0, middle)), Heads(slice(first, h), slice(middle, g))]
