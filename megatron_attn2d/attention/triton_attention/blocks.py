"""What all of the kernels do with a block: load and store it, mask it, drop from it, and find the blocks to visit."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from megatron_attn2d.attention.dropout import BITS

SHIFT = tl.constexpr(64 - BITS)


@triton.jit
def _at(x, batch, head, rows, columns):
    pointer, stride = x
    base = pointer + batch.to(tl.int64) * stride[1] + head.to(tl.int64) * stride[2]
    return base + rows.to(tl.int64)[:, None] * stride[0] + columns[None, :]


@triton.jit
def load(x, batch, head, rows, n, columns, d):
    """Rows of one head, 0 beyond the end."""
    return tl.load(_at(x, batch, head, rows, columns), (rows < n)[:, None] & (columns < d)[None, :], other=0.0)


@triton.jit
def store(x, batch, head, rows, n, columns, d, values):
    """What `load` loads, in the dtype of x."""
    inside = (rows < n)[:, None] & (columns < d)[None, :]
    tl.store(_at(x, batch, head, rows, columns), values.to(x[0].dtype.element_ty), inside)


@triton.jit
def _mixed(state, number):
    """`dropout._mixed`, on unsigned numbers."""
    x = state + (number.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def row_states(drop, batch, head, rows, sq):
    """The hash of seed, sequence, head and position of each row, from which those of its keys start."""
    state = _mixed(tl.load(drop[0]).to(tl.uint64), tl.load(drop[1] + batch))
    state = _mixed(state, tl.load(drop[2] + head))
    return _mixed(state, tl.load(drop[3] + batch * drop[4] + rows, rows < sq, other=0))


@triton.jit
def key_positions(drop, batch, keys, sk):
    """Where keys stand in the whole sequence."""
    return tl.load(drop[5] + batch * drop[6] + keys, keys < sk, other=0)


@triton.jit
def factors(drop, states, positions):
    """0 for what is dropped, 1 / (1 - p) for what is kept; states and positions broadcast."""
    return tl.where((_mixed(states, positions) >> SHIFT).to(tl.int64) >= drop[7], drop[8], 0.0)


@triton.jit
def hidden(rows, keys, sizes, band):
    """Whether a score lies beyond the end or outside of the band, whose diagonal ends at the bottom right."""
    hidden = (keys >= sizes[1]) | (rows >= sizes[0])
    ahead = keys - rows - (sizes[1] - sizes[0])
    if band[0] is not None:
        hidden = hidden | (ahead < -band[0])
    if band[1] is not None:
        hidden = hidden | (ahead > band[1])
    return hidden


@triton.jit
def blocks_seen(first, count, size, other, step, shift, before, after):
    """Blocks [low, high) of `step` of `other` positions that [first, first + count) see, [whole, cut) seen by all.

    Of `size` positions, i sees [i + shift - before, i + shift + after]; None means no end.
    """
    last = tl.minimum(first + count, size) - 1 + shift
    low, whole, high, cut = 0, 0, tl.cdiv(other, step), other // step
    if before is not None:
        low = tl.maximum(first + shift - before, 0) // step
        whole = tl.cdiv(tl.maximum(last - before, 0), step)
    if after is not None:
        high = tl.minimum(high, tl.cdiv(tl.maximum(last + after + 1, 0), step))
        cut = tl.minimum(cut, tl.maximum(first + shift + after + 1, 0) // step)
    if first + count > size:  # positions beyond the end: all blocks are masked
        cut = 0
    whole = tl.minimum(tl.maximum(whole, low), high)
    return low, whole, tl.minimum(tl.maximum(cut, whole), high), high
