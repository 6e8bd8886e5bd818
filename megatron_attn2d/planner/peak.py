"""How much memory one layer's attention takes in the backward pass at its peak, in shards of Q.

Its inputs are left out, O among them. A tile has X query and Y key slots per rank: C and R, one less where only the
other travels and own chunks stay apart. With kv = 1 / (query heads per key head), a kernel that adds dQ up in fp32, and
dQ, dK, dV of the own chunks found before:

    while the tile's kernels run    Q, dO, a stand-in for O and dQ of X, K, V, dK, dV of Y; no copies of what is local
    while results return            dQ of X and dK, dV of Y, and what C - 1 and R - 1 others return
    at the sums                     what was returned, and the gradients

Head groups share all of it, but two or three of them are under way at once. `tests/attention/test_peak_memory.py`
counts what ranks allocate: within 15%.
"""

from __future__ import annotations


def ring_shards(kv: float) -> float:
    """Fp32 sums of dQ and O, a partial dQ and dQ; K, V twice in flight, dK, dV too, and a partial of those.

    Transformer Engine's p2p took 16.0 for kv = 1 and 7.6 for 1/8 (docs/multi_gpu.md); this says 16 and 7.25.
    """
    return 6 + 10 * kv


def grid_shards(rows: int, cols: int, kv: float, head_groups: int = 1) -> float:
    """attention2d on rows x cols."""
    own = gradients = 1 + 2 * kv
    one_way = 1 in (rows, cols)
    x, y = max(1, cols - (rows == 1)), max(1, rows - (cols == 1))
    moves_queries, moves_keys = cols > 1, rows > 1
    gathered = 2 * x * moves_queries + 2 * kv * y * moves_keys
    partial = x + 2 * kv * y
    landing = (cols - 1) + 2 * kv * (rows - 1)
    widest = x if one_way else x / 2  # the rows of one call, summed in fp32
    tile = gathered + x * moves_queries + partial + 2 * widest + own
    returning = partial + landing + own
    sums = landing + own + gradients + (1 if one_way else partial)
    if head_groups == 1:
        return max(tile, returning, sums)
    if head_groups == 2:  # beside the first the second is gathered, beside the second the first returns
        return max((tile + max(gathered, returning)) / 2, sums)
    return (tile + gathered + returning) / head_groups + gradients
