"""Tables of short segments: a block is so many rows of the buffer and spans as many segments as lie there.

A block of one segment, as FlashAttention has it, is mostly empty where a segment has a few rows: a pack of a thousand
documents on four ranks leaves eight rows of a chunk to most of them. Here each row knows which keys it sees, a run of
them whatever the band is, and each key which rows see it:

    rows      0 0 0 1 1 2 2 2 2 | 2 3 3 ...      segments, and the ends of blocks
    keys seen by the first block: from the first of segment 0 to the last of segment 2

A program visits all of these in steps, and masks in each row what belongs to others. So no row is loaded for nothing,
and rows of no segment, which may hold anything, count as zeros and are not stored. The backward pass takes no room for
sums in fp32, of which FlashAttention-4 takes a block per segment and head.

What belongs to others has probability 0, and 0 times NaN is NaN: a NaN or Inf in a value of one segment reaches the
outputs of others whose rows share its block, and one in Q, K, V or dO their gradients. To leave it out would take a
second mask per step.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_attn2d.attention.kernels.base import BackwardRows, Gradients, Outputs
from megatron_attn2d.attention.kernels.triton.blocks import LN2, LOG2E
from megatron_attn2d.attention.kernels.triton.launch import Table, run, tuned, with_strides
from megatron_attn2d.attention.segments import HEAD, Segments, aligned

# As in `launch`: rows and keys of a block, warps and pipeline stages by the widest head dim.
FORWARD: Table = {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 32, 8, 1)}
BACKWARD_ROWS: Table = {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 1)}
BACKWARD_KEYS: Table = {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 64, 8, 1)}
_BLOCK = 256


@triton.jit
def _seen_from(i, starts, lengths, others, other_lengths, count, steps, before, after, seen, size, BLOCK: tl.constexpr):
    """For BLOCK positions from `i` on the run of others that each sees, [first, stop), as seen[0] and seen[1]."""
    at = i + tl.arange(0, BLOCK)
    segment = tl.zeros((BLOCK,), tl.int32)
    for step in range(steps):  # the last segment that does not start behind it
        later = segment + (1 << (steps - 1 - step))
        known = later < count  # positions behind the last must not lead beyond the table
        segment = tl.where(known & (tl.load(starts + later, known, other=0) <= at), later, segment)
    place, length = at - tl.load(starts + segment), tl.load(lengths + segment)
    other, other_length = tl.load(others + segment), tl.load(other_lengths + segment)
    inside = (place >= 0) & (place < length)
    shifted = place + other_length - length
    first = tl.maximum(shifted - before, 0)
    stop = tl.minimum(shifted + after + 1, other_length)
    tl.store(seen + at, tl.where(inside, other + first, -1), at < size)
    tl.store(seen + size + at, tl.where(inside, other + stop, -1), at < size)


@triton.jit(do_not_specialize=["steps"])  # another number in every step
def _find_seen(heads, numbers, seen, steps, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """One block of rows and one of keys of one table; see `segments.Bundle` for what heads hold."""
    head = heads + tl.program_id(1) * HEAD
    q_starts, q_lengths = numbers + tl.load(head), numbers + tl.load(head + 1)
    k_starts, k_lengths = numbers + tl.load(head + 2), numbers + tl.load(head + 3)
    count, left, right = tl.load(head + 4), tl.load(head + 5), tl.load(head + 6)
    rows, keys, seen_keys = tl.load(head + 7), tl.load(head + 8), seen + tl.load(head + 9)
    seen_rows = seen_keys + 2 * tl.cdiv(rows, 4) * 4
    i = tl.program_id(0) * BLOCK
    if i < rows:
        _seen_from(i, q_starts, q_lengths, k_starts, k_lengths, count, steps, left, right, seen_keys, rows, BLOCK)
    if i < keys:
        _seen_from(i, k_starts, k_lengths, q_starts, q_lengths, count, steps, right, left, seen_rows, keys, BLOCK)


@triton.jit
def _seen(seen, first, size, ROWS: tl.constexpr):
    """What ROWS positions from `first` on see, [begin, end) each; begin is -1 where they are of no segment."""
    at = first + tl.arange(0, ROWS)
    return tl.load(seen + at, at < size, other=-1), tl.load(seen + size + at, at < size, other=-1)


@triton.jit
def _span(begin, end):
    """What some of these positions see: [low, high)."""
    return tl.min(tl.where(end > begin, begin, 2147483647)), tl.max(tl.where(end > begin, end, 0))


@triton.jit
def _head(x, head):
    """One head of a tensor: where its rows begin, and how far they are from each other."""
    pointer, stride = x
    return pointer + head.to(tl.int64) * stride[2], stride[0]


@triton.jit
def _load(x, first, taken, d: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of one head from `first` on, of which some are taken and the others 0."""
    pointer, stride = x
    at = tl.cast(first, tl.int64) * stride + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    return tl.load(pointer + at, taken[:, None] & (tl.arange(0, COLUMNS) < d)[None, :], other=0.0)


@triton.jit
def _store(x, first, taken, d: tl.constexpr, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores those that are taken, in the dtype of what is pointed to."""
    pointer, stride = x
    at = tl.cast(first, tl.int64) * stride + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    values = values.to(pointer.dtype.element_ty)
    tl.store(pointer + at, values, taken[:, None] & (tl.arange(0, COLUMNS) < d)[None, :])


@triton.jit
def _forward(
    q, k, v, out, lse, lse_stride, scale2, group, seen_keys, seen_rows, sizes, d: tl.constexpr, dv: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * M, tl.program_id(1)
    begin, end = _seen(seen_keys, first, sizes[0], M)
    low, high = _span(begin, end)
    mine = begin >= 0
    q_block = _load(_head(q, head), first, mine, d, M, D)
    k_head = _head(k, head // group)
    v_head = _head(v, head // group)
    acc = tl.zeros((M, DV), tl.float32)
    total = tl.zeros((M,), tl.float32)
    highest = tl.full((M,), -float("inf"), tl.float32)
    for at in range(low, high, N):
        row_begin, _ = _seen(seen_rows, at, sizes[1], N)
        taken = row_begin >= 0
        keys = at + tl.arange(0, N)
        k_block = _load(k_head, at, taken, d, N, D)
        scores = tl.dot(q_block, tl.trans(k_block), input_precision=PRECISION)
        scores = tl.where((keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None]), scores, -float("inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        reference = tl.where(above == -float("inf"), 0.0, above)
        p = tl.exp2(scores * scale2 - (reference * scale2)[:, None])
        decay = tl.exp2((highest - reference) * scale2)
        total = total * decay + tl.sum(p, 1)
        v_block = _load(v_head, at, taken, dv, N, DV)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * decay[:, None], input_precision=PRECISION)
        highest = above
    acc /= tl.where(total == 0, 1.0, total)[:, None]
    _store(_head(out, head), first, mine, dv, acc, M, DV)
    rows = head.to(tl.int64) * lse_stride + first + tl.arange(0, M)
    tl.store(lse + rows, (highest * scale2 + tl.log2(total)) * LN2, mine)


@triton.jit
def _backward_rows(
    dout, q, k, v, out, lse, lse_stride, delta, dq, scale, scale2, group, seen_keys, seen_rows, sizes,
    d: tl.constexpr, dv: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ; and delta [heads, rows] for `_backward_keys`."""
    first, head = tl.program_id(0) * M, tl.program_id(1)
    begin, end = _seen(seen_keys, first, sizes[0], M)
    low, high = _span(begin, end)
    mine = begin >= 0
    q_block = _load(_head(q, head), first, mine, d, M, D)
    dout_block = _load(_head(dout, head), first, mine, dv, M, DV)
    out_block = _load(_head(out, head), first, mine, dv, M, DV)
    delta_rows = tl.sum(dout_block.to(tl.float32) * out_block.to(tl.float32), 1)
    rows = first + tl.arange(0, M)
    tl.store(delta + head.to(tl.int64) * sizes[0] + rows, delta_rows, mine)
    lse2 = tl.load(lse + head.to(tl.int64) * lse_stride + rows, mine, other=0.0) * LOG2E
    k_head = _head(k, head // group)
    v_head = _head(v, head // group)
    acc = tl.zeros((M, D), tl.float32)
    for at in range(low, high, N):
        row_begin, _ = _seen(seen_rows, at, sizes[1], N)
        taken = row_begin >= 0
        keys = at + tl.arange(0, N)
        k_block = _load(k_head, at, taken, d, N, D)
        v_block = _load(v_head, at, taken, dv, N, DV)
        p = tl.exp2(tl.dot(q_block, tl.trans(k_block), input_precision=PRECISION) * scale2 - lse2[:, None])
        p = tl.where((keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None]), p, 0.0)
        dp = tl.dot(dout_block, tl.trans(v_block), input_precision=PRECISION)
        ds = p * (dp - delta_rows[:, None])
        acc = tl.dot(ds.to(k_block.dtype), k_block, acc, input_precision=PRECISION)
    _store(_head(dq, head), first, mine, d, acc * scale, M, D)


@triton.jit
def _backward_keys(
    dout, q, k, v, lse, lse_stride, delta, dk, dv_, scale, scale2, group, seen_keys, seen_rows, sizes,
    d: tl.constexpr, dv: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV; scores are transposed."""
    first, key_head = tl.program_id(0) * N, tl.program_id(1)
    begin, end = _seen(seen_rows, first, sizes[1], N)
    low, high = _span(begin, end)
    mine = begin >= 0
    k_block = _load(_head(k, key_head), first, mine, d, N, D)
    v_block = _load(_head(v, key_head), first, mine, dv, N, DV)
    dk_acc = tl.zeros((N, D), tl.float32)
    dv_acc = tl.zeros((N, DV), tl.float32)
    for i in range(group):
        head = key_head * group + i
        q_head = _head(q, head)
        dout_head = _head(dout, head)
        for at in range(low, high, M):
            key_begin, _ = _seen(seen_keys, at, sizes[0], M)
            taken = key_begin >= 0
            rows = at + tl.arange(0, M)
            q_block = _load(q_head, at, taken, d, M, D)
            dout_block = _load(dout_head, at, taken, dv, M, DV)
            lse2 = tl.load(lse + head.to(tl.int64) * lse_stride + rows, taken, other=0.0) * LOG2E
            delta_rows = tl.load(delta + head.to(tl.int64) * sizes[0] + rows, taken, other=0.0)
            p = tl.exp2(tl.dot(k_block, tl.trans(q_block), input_precision=PRECISION) * scale2 - lse2[None, :])
            p = tl.where((rows[None, :] >= begin[:, None]) & (rows[None, :] < end[:, None]), p, 0.0)
            dp = tl.dot(v_block, tl.trans(dout_block), input_precision=PRECISION)
            dv_acc = tl.dot(p.to(dout_block.dtype), dout_block, dv_acc, input_precision=PRECISION)
            ds = p * (dp - delta_rows[None, :])
            dk_acc = tl.dot(ds.to(q_block.dtype), q_block, dk_acc, input_precision=PRECISION)
    _store(_head(dk, key_head), first, mine, d, dk_acc * scale, N, D)
    _store(_head(dv_, key_head), first, mine, dv, dv_acc, N, DV)


def attend(q: Tensor, k: Tensor, v: Tensor, table: Segments, scale: float, into: Outputs) -> None:
    """See `Kernel.forward_segments`; scale is above 0."""
    out, lse = into
    q, k, v, out = (x.unsqueeze(1) for x in (q, k, v, out))
    blocks, how = tuned(q, v, FORWARD)
    sizes = q.size(0), k.size(0)
    arguments = (
        *map(with_strides, (q, k, v, out)),
        *(lse, lse.stride(0), scale * LOG2E.value, q.size(2) // k.size(2)),
        *(*_seen_of(table), sizes, q.size(3), v.size(3)),
    )
    run(_forward, (-(-sizes[0] // blocks[0]), q.size(2)), arguments, blocks, how, q, False)


def differentiate(rows: BackwardRows, k: Tensor, v: Tensor, table: Segments, scale: float, into: Gradients) -> None:
    """See `Kernel.backward_segments`; delta is derived from `out`."""
    (q, dout, lse, _, out), (dq, dk, dv) = rows, into
    assert out is not None
    dout, q, k, v, out, dq, dk, dv = (x.unsqueeze(1) for x in (dout, q, k, v, out, dq, dk, dv))
    (sq, _, heads, d), (sk, _, key_heads, v_dim) = q.shape, v.shape
    delta = lse.new_empty((heads, sq))
    inputs = [*map(with_strides, (dout, q, k, v))]
    same = (
        *(scale, scale * LOG2E.value, heads // key_heads),
        *(*_seen_of(table), (sq, sk), d, v_dim),
    )
    blocks, how = tuned(q, v, BACKWARD_ROWS)
    arguments = (*inputs, with_strides(out), lse, lse.stride(0), delta, with_strides(dq), *same)
    run(_backward_rows, (-(-sq // blocks[0]), heads), arguments, blocks, how, q, False)
    blocks, how = tuned(q, v, BACKWARD_KEYS)
    arguments = (*inputs, lse, lse.stride(0), delta, with_strides(dk), with_strides(dv), *same)
    run(_backward_keys, (-(-sk // blocks[1]), key_heads), arguments, blocks, how, q, False)


def _seen_of(table: Segments) -> tuple[Tensor, Tensor]:
    """For each row the keys [first, stop) that it sees, [2, rows] int32, and for each key the rows, [2, keys].

    -1 where a row or a key is of no segment. One launch finds them for all tables of the bundle.
    """
    bundle = table.bundle
    assert bundle is not None, "only tables of the host are split by length"

    def find(sizes: list[tuple[int, int, int]]) -> list[tuple[Tensor, Tensor]]:
        pieces = [
            size for _, *rows in sizes for n in rows for size in (2 * n, 2 * (aligned(n) - n))
        ]  # of what lies in a row; every second one aligns the next
        seen = bundle.numbers.new_empty(sum(pieces))
        most = max(max(rows) for _, *rows in sizes)
        steps = max(count for count, *_ in sizes).bit_length()
        _find_seen[(-(-most // _BLOCK), len(sizes))](bundle.heads, bundle.numbers, seen, steps, HEAD=HEAD, BLOCK=_BLOCK)
        found = [piece.view(2, -1) for piece in seen.split(pieces)[::2]]
        return list(zip(found[::2], found[1::2], strict=True))

    return bundle.made("seen", find)[table.number]
