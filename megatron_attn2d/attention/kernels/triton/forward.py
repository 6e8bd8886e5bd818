"""Output and log-sum-exp."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_attn2d.attention.kernels.base import Outputs, Softmax
from megatron_attn2d.attention.kernels.triton.blocks import (
    LN2,
    LOG2E,
    blocks_seen,
    head_of,
    hidden,
    load,
    load_row,
    part_of,
    place_of,
    store,
)
from megatron_attn2d.attention.kernels.triton.keep import drop_arguments, kept
from megatron_attn2d.attention.kernels.triton.launch import (
    blocks_of_rows,
    forward_table,
    run,
    tuned,
    with_strides,
)
from megatron_attn2d.attention.layout import Band
from megatron_attn2d.attention.segments import Segments


@triton.jit
def _attend(
    start, stop, acc, total, highest, q, rows, words, k, v, scale2, sq, sk, band, drop, keys_at,
    MASKED: tl.constexpr, d: tl.constexpr, dv: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Key blocks [start, stop) for one block of rows."""
    for block in range(start, stop):
        first = block * N
        k_block = load(k[0], k[1], first, sk, d, not MASKED, N, D)
        scores = tl.dot(q, tl.trans(k_block), input_precision=PRECISION)
        if MASKED:
            keys = first + tl.arange(0, N)
            scores = tl.where(hidden(rows[:, None], keys[None, :], sq, sk, band), -float("inf"), scores)
        above = tl.maximum(highest, tl.max(scores, 1))
        reference = above
        if MASKED:
            reference = tl.where(above == -float("inf"), 0.0, above)
        p = tl.exp2(scores * scale2 - (reference * scale2)[:, None])
        decay = tl.exp2((highest - reference) * scale2)
        total = total * decay + tl.sum(p, 1)
        if drop is not None:
            key_words = load_row(drop[2] + keys_at, first, sk, not MASKED, N)
            keep = kept(words[0][:, None], words[1][:, None], key_words[None, :], drop[5])
            p *= tl.where(keep, drop[6], 0.0)
        v_block = load(v[0], v[1], first, sk, dv, not MASKED, N, DV)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * decay[:, None], input_precision=PRECISION)
        highest = above
    return acc, total, highest


@triton.jit
def _forward(
    q, k, v, out, lse, lse_stride, scale2, heads, group, sizes, band, drop, table, d: tl.constexpr, dv: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Under a causal mask the last rows see most: they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    block, q_start, sq, k_start, sk = place_of(block, sizes, table)
    first = block * M
    if first >= sq:  # after the last segment
        return
    rows = first + tl.arange(0, M)
    q_block = load(head_of(q, batch, head, q_start), q[1][0], first, sq, d, False, M, D)
    k_head = head_of(k, batch, head // group, k_start), k[1][0]
    v_head = head_of(v, batch, head // group, k_start), v[1][0]
    words, keys_at = (rows, rows), k_start
    if drop is not None:
        at = tl.program_id(1).to(tl.int64) * drop[3] + q_start
        words = load_row(drop[0] + at, first, sq, False, M), load_row(drop[1] + at, first, sq, False, M)
        keys_at = batch.to(tl.int64) * drop[4] + k_start
    acc = tl.zeros((M, DV), tl.float32)
    total = tl.zeros((M,), tl.float32)
    highest = tl.full((M,), -float("inf"), tl.float32)
    low, whole, cut, high = blocks_seen(first, M, sq, sk, N, sk - sq, band[0], band[1])
    for part in tl.static_range(3):
        if part > 0 or band[0] is not None:  # without an end on the left the first part is empty
            start, stop = part_of(part, low, whole, cut, high)
            acc, total, highest = _attend(
                start, stop, acc, total, highest, q_block, rows, words, k_head, v_head, scale2, sq, sk, band, drop,
                keys_at, part != 1, d, dv, M, N, D, DV, PRECISION,
            )  # fmt: skip
    acc /= tl.where(total == 0, 1.0, total)[:, None]
    store(head_of(out, batch, head, q_start), out[1][0], first, sq, dv, acc, M, DV)
    at = tl.program_id(1).to(tl.int64) * lse_stride + q_start + rows
    tl.store(lse + at, (highest * scale2 + tl.log2(total)) * LN2, rows < sq)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Band,
    softmax: Softmax,
    into: Outputs,
    table: Segments | None = None,
) -> None:
    """See `Kernel.forward` and, with a table and a batch of one, `Kernel.forward_segments`; lse is [b * h, sq]."""
    (scale, dropout), (out, lse) = softmax, into
    (sq, batch, heads, d), dv = q.shape, v.size(3)
    # Kernels scale in the exponent alone, where the largest score must be the largest scaled one too.
    if scale < 0:
        q, scale = q.neg(), -scale
    blocks, how = tuned(q, v, forward_table(q))
    programs, ends = blocks_of_rows(table, sq, blocks[0])
    arguments = (
        *map(with_strides, (q, k, v, out)),
        lse,
        lse.stride(0),
        max(scale, 1e-30) * LOG2E.value,
        heads,
        heads // k.size(2),
        (sq, k.size(0)),
        tuple(band),
        drop_arguments(dropout),
        ends,
        d,
        dv,
    )
    run(_forward, (programs, batch * heads), arguments, blocks, how, q, dropout is not None)
