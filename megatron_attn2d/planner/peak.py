"""Counts the memory of one layer's attention in the backward pass at its peak, in shards of Q.

Inputs are left out, O among them. A rank's tile has X query slots and Y key slots: C and R, or one less where only the
other ones travel, as a rank's own chunks then stay apart. Let kv = 1 / (query heads per key head), let the kernel sum
dQ in fp32, and let dQ, dK and dV of the own chunks be computed before. Then a rank holds, besides the inputs:

    while the tile's kernels run    Q, dO, a surrogate O and dQ of X slots; K, V, dK, dV of Y slots; no local copies
    while results return            dQ of X slots, dK and dV of Y slots, and the results of C - 1 and R - 1 peers
    while results are summed        the returned results, and the gradients

Head groups share all of this, but two or three groups are under way at once. `tests/attention/test_peak_memory.py`
counts what ranks allocate: within 15%.
"""

from __future__ import annotations


def ring_shards(kv: float) -> float:
    """Peak of a ring, in shards of Q, `kv` being key heads per query head.

    It holds fp32 sums of dQ and O, a partial dQ and dQ; two pairs of K and V in flight, two of dK and dV, and a partial
    dK and dV. Transformer Engine's p2p took 16.0 for kv = 1 and 7.6 for 1/8 (docs/multi_gpu.md); the formula gives 16
    and 7.25.
    """
    return 6 + 10 * kv


def grid_shards(rows: int, cols: int, kv: float, head_groups: int = 1) -> float:
    """Peak of attention2d on rows x cols, in shards of Q, `kv` being key heads per query head."""
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
    if head_groups == 2:  # while one group computes, the other is gathered or returns
        return max((tile + max(gathered, returning)) / 2, sums)
    return (tile + gathered + returning) / head_groups + gradients
