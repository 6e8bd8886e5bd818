"""What every kernel does with a block: find its segment, load and store it, mask it, and find the blocks to visit."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_SEARCHED = tl.constexpr(1024)
_BEYOND = tl.constexpr(2**31 - 1)


@triton.jit
def segment_of(block, table):
    """The segment of a block and the block's number in it; for blocks after the last, the number of segments."""
    segment, before = 0, 0
    for first in range(0, table[1], _SEARCHED):
        i = first + tl.arange(0, _SEARCHED)
        ends = tl.load(table[0] + i, i < table[1], other=_BEYOND)
        passed = ends <= block
        segment += tl.sum(passed.to(tl.int32))
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0)))
    return segment, block - before


@triton.jit
def place_of(block, sizes, table):
    """A block's number in its segment, and start and length of the segment's rows and of its keys.

    Without a table all rows are one segment. Blocks after the last are in an empty one.
    """
    q_start, sq, k_start, sk = 0, sizes[0], 0, sizes[1]
    if table is not None:
        segment, block = segment_of(block, table)
        there = segment < table[1]
        q_start, sq = tl.load(table[2] + segment, there, other=0), tl.load(table[3] + segment, there, other=0)
        k_start, sk = tl.load(table[4] + segment, there, other=0), tl.load(table[5] + segment, there, other=0)
    return block, q_start, sq, k_start, sk


@triton.jit
def part_of(part: tl.constexpr, low, whole, cut, high):
    """Where each of the three runs of blocks of `blocks_seen` starts and stops; all see the second one."""
    start, stop = low, whole
    if part == 1:
        start, stop = whole, cut
    if part == 2:
        start, stop = cut, high
    return start, stop


@triton.jit
def head_of(x, batch, head, start):
    """Where the rows of one head begin, from row `start` on, and how far they are from each other."""
    pointer, stride = x
    at = batch.to(tl.int64) * stride[1] + head.to(tl.int64) * stride[2] + tl.cast(start, tl.int64) * stride[0]
    return pointer + at


@triton.jit
def _at(pointer, stride, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    base = pointer + tl.cast(first, tl.int64) * stride
    return base + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load(pointer, stride, first, n, d: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from `first` on and the d columns of one head; 0 beyond the n rows, which whole blocks don't reach."""
    at = _at(pointer, stride, first, ROWS, COLUMNS)
    inside = (first + tl.arange(0, ROWS) < n)[:, None] & (tl.arange(0, COLUMNS) < d)[None, :]
    if WHOLE:
        inside = (tl.arange(0, COLUMNS) < d)[None, :]
    if WHOLE and d == COLUMNS:
        values = tl.load(at)
    else:
        values = tl.load(at, inside, other=0.0)
    return values


@triton.jit
def store(pointer, stride, first, n, d: tl.constexpr, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What `load` loads, in the dtype of what is pointed to."""
    inside = (first + tl.arange(0, ROWS) < n)[:, None] & (tl.arange(0, COLUMNS) < d)[None, :]
    tl.store(_at(pointer, stride, first, ROWS, COLUMNS), values.to(pointer.dtype.element_ty), inside)


@triton.jit
def load_row(pointer, first, n, WHOLE: tl.constexpr, ROWS: tl.constexpr):
    """One number per row, from `first` on; 0 beyond the n rows."""
    i = first + tl.arange(0, ROWS)
    if WHOLE:
        values = tl.load(pointer + i)
    else:
        values = tl.load(pointer + i, i < n, other=0)
    return values


@triton.jit
def hidden(rows, keys, sq, sk, band):
    """Whether a score lies beyond the last key or outside of the band, whose diagonal ends at the bottom right.

    Rows beyond the last need no mask: nothing of them is stored, and in the sums over rows they are zeros.
    """
    hidden = (keys >= sk) | (rows < 0)  # the shape of both
    ahead = keys - rows - (sk - sq)
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
    whole = tl.minimum(tl.maximum(whole, low), high)
    return low, whole, tl.minimum(tl.maximum(cut, whole), high), high
