"""Which heads are computed when, so that messages fly meanwhile: what is chosen where nobody says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the planner, which runs without torch, takes SMALLEST_HALF from here
    from torch import Tensor

    from megatron_attn2d.attention.grid import Grid

# Over sockets, groups of half a MiB a message cost more than overlap saved; where it turns is not measured.
SMALLEST_MESSAGE = 4 * 2**20
MOST_GROUPS = 4
SMALLEST_GROUP = 8e11
"""FLOP forward of a head group. It is started in 5 ms, both passes, on four H200 (docs/planner.md): as long as that."""


def automatic_head_groups(q: Tensor, k: Tensor, grid: Grid) -> int:
    """The number of head groups for shards q [s/cp, b, h, d] and k [s/cp, b, g, d] on a grid.

    A rank attends its own chunks while the first group arrives. On two places of the grid that is half of its work and
    hides the messages over NVLink; on more it is less, and groups pay as long as their messages stay large and kernels
    take longer than the CPU takes to start them. A planner that knows the links says better (`planner.cost`).
    """
    places = grid.rows * grid.cols
    if places <= 2:
        return 1
    tokens, batch, h, d = q.shape
    flops = 2 * tokens**2 * places * batch * h * d  # of a causal forward pass
    heads = k.size(2)
    chunk = k.numel() * k.element_size() // 2  # one of the two chunks, all heads
    able = (n for n in range(1, MOST_GROUPS + 1) if heads % n == 0)
    return max((n for n in able if chunk >= n * SMALLEST_MESSAGE and flops >= n * SMALLEST_GROUP), default=1)


@dataclass(frozen=True)
class Heads:
    """A run of query heads and the key heads that they share; they are the last dim but one of every tensor."""

    queries: slice
    keys: slice

    @property
    def first(self) -> int:
        """The first query head."""
        return self.queries.start or 0

    def of(self, x: Tensor) -> Tensor:
        """These of tensors with query heads, [..., h, d] or [..., h, n], views."""
        return x if self == ALL_HEADS else x[..., self.queries, :]

    def of_keys(self, x: Tensor) -> Tensor:
        """These of tensors with key heads, [..., g, d], views."""
        return x if self == ALL_HEADS else x[..., self.keys, :]

    @property
    def of_each(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """`of` or `of_keys`: of queries, keys and values."""
        return self.of, self.of_keys, self.of_keys


ALL_HEADS = Heads(slice(None), slice(None))

SMALLEST_HALF = 2e11
"""FLOP forward, what an H100 does in the third of a millisecond that one more kernel call costs the CPU."""


def own_heads(q: Tensor, k: Tensor, squares: float, apart: bool) -> list[Heads]:
    """In which runs of heads a rank attends its own chunks: the first before its tile, the others after it.

    Args:
        q, k: [2, n, b, heads, d].
        squares: work of that attention, in squares of chunk x chunk.
        apart: there is something to hide after the tile.
    """
    _, n, b, h, d = q.shape
    g = k.size(3)
    if not apart or g == 1 or not squares or 2 * squares * n**2 * b * h * d < SMALLEST_HALF:
        return [ALL_HEADS]
    middle = g // 2
    first = middle * (h // g)
    return [Heads(slice(0, first), slice(0, middle)), Heads(slice(first, h), slice(middle, g))]
