"""In how many groups of heads to overlap messages and kernels, where nobody says."""

from __future__ import annotations

from torch import Tensor

from megatron_attn2d.attention.grid import Grid

# Over sockets, groups of half a MiB a message cost more than overlap saved; where it turns is not measured.
SMALLEST_MESSAGE = 4 * 2**20
MOST_GROUPS = 4


def automatic_head_groups(k: Tensor, grid: Grid) -> int:
    """The number of head groups for shards k [s/cp, b, g, d] on a grid.

    A rank attends its own diagonal while the first group arrives. On two places of the grid that is a quarter of its
    work and hides the messages over NVLink; on more it is less, and groups pay as long as their messages stay large. A
    planner that knows the links says better (`planner.cost`).
    """
    if grid.rows * grid.cols <= 2:
        return 1
    heads = k.size(2)
    chunk = k.numel() * k.element_size() // 2  # one of the two chunks, all heads
    able = [n for n in range(1, MOST_GROUPS + 1) if heads % n == 0 and chunk // n >= SMALLEST_MESSAGE]
    return max(able, default=1)
