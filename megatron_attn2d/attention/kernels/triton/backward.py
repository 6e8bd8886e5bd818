"""Gradients of queries, keys and values from the log-sum-exp over all keys and delta."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_attn2d.attention.kernels.base import BackwardRows, Gradients, Softmax
from megatron_attn2d.attention.kernels.triton.blocks import (
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
    BACKWARD_KEYS,
    BACKWARD_ROWS,
    BACKWARD_ROWS_DROPPED,
    blocks_of_keys,
    blocks_of_rows,
    run,
    tuned,
    with_strides,
)
from megatron_attn2d.attention.layout import Band
from megatron_attn2d.attention.segments import Segments


@triton.jit
def _differentiate_rows(
    start, stop, dq, q, dout, rows, words, lse2, delta, k, v, scale2, sq, sk, band, drop, keys_at,
    MASKED: tl.constexpr, d: tl.constexpr, dv: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ / scale of one block of rows from key blocks [start, stop)."""
    for block in range(start, stop):
        first = block * N
        k_block = load(k[0], k[1], first, sk, d, not MASKED, N, D)
        v_block = load(v[0], v[1], first, sk, dv, not MASKED, N, DV)
        p = tl.exp2(tl.dot(q, tl.trans(k_block), input_precision=PRECISION) * scale2 - lse2[:, None])
        if MASKED:
            keys = first + tl.arange(0, N)
            p = tl.where(hidden(rows[:, None], keys[None, :], sq, sk, band), 0.0, p)
        dp = tl.dot(dout, tl.trans(v_block), input_precision=PRECISION)
        if drop is not None:
            key_words = load_row(drop[2] + keys_at, first, sk, not MASKED, N)
            keep = kept(words[0][:, None], words[1][:, None], key_words[None, :], drop[5])
            dp *= tl.where(keep, drop[6], 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k_block.dtype), k_block, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _backward_rows(
    dout, q, k, v, lse, delta, row_stride, dq, scale, scale2, heads, group, sizes, band, drop, table,
    d: tl.constexpr, dv: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    block, q_start, sq, k_start, sk = place_of(block, sizes, table)
    first = block * M
    if first >= sq:  # after the last segment
        return
    rows = first + tl.arange(0, M)
    q_block = load(head_of(q, batch, head, q_start), q[1][0], first, sq, d, False, M, D)
    dout_block = load(head_of(dout, batch, head, q_start), dout[1][0], first, sq, dv, False, M, DV)
    k_head = head_of(k, batch, head // group, k_start), k[1][0]
    v_head = head_of(v, batch, head // group, k_start), v[1][0]
    at = tl.program_id(1).to(tl.int64) * row_stride[0] + q_start
    lse2 = load_row(lse + at, first, sq, False, M) * LOG2E
    at = tl.program_id(1).to(tl.int64) * row_stride[1] + q_start
    delta_rows = load_row(delta + at, first, sq, False, M)
    words, keys_at = (rows, rows), k_start
    if drop is not None:
        at = tl.program_id(1).to(tl.int64) * drop[3] + q_start
        words = load_row(drop[0] + at, first, sq, False, M), load_row(drop[1] + at, first, sq, False, M)
        keys_at = batch.to(tl.int64) * drop[4] + k_start
    acc = tl.zeros((M, D), tl.float32)
    low, whole, cut, high = blocks_seen(first, M, sq, sk, N, sk - sq, band[0], band[1])
    for part in tl.static_range(3):
        if part > 0 or band[0] is not None:
            start, stop = part_of(part, low, whole, cut, high)
            acc = _differentiate_rows(
                start, stop, acc, q_block, dout_block, rows, words, lse2, delta_rows, k_head, v_head, scale2, sq, sk,
                band, drop, keys_at, part != 1, d, dv, M, N, D, DV, PRECISION,
            )  # fmt: skip
    store(head_of(dq, batch, head, q_start), dq[1][0], first, sq, d, acc * scale, M, D)


@triton.jit
def _differentiate_keys(
    start, stop, dk, dv_acc, k, v, keys, key_words, dout, q, lse, delta, scale2, sq, sk, band, drop, rows_at,
    MASKED: tl.constexpr, d: tl.constexpr, dv: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK / scale and dV of one block of keys from row blocks [start, stop) of one head; scores are transposed."""
    for block in range(start, stop):
        first = block * M
        q_block = load(q[0], q[1], first, sq, d, not MASKED, M, D)
        dout_block = load(dout[0], dout[1], first, sq, dv, not MASKED, M, DV)
        lse2 = load_row(lse, first, sq, not MASKED, M) * LOG2E
        delta_rows = load_row(delta, first, sq, not MASKED, M)
        p = tl.exp2(tl.dot(k, tl.trans(q_block), input_precision=PRECISION) * scale2 - lse2[None, :])
        if MASKED:
            rows = first + tl.arange(0, M)
            p = tl.where(hidden(rows[None, :], keys[:, None], sq, sk, band), 0.0, p)
        dp = tl.dot(v, tl.trans(dout_block), input_precision=PRECISION)
        kept_p = p
        if drop is not None:
            multipliers = load_row(drop[0] + rows_at, first, sq, not MASKED, M)
            offsets = load_row(drop[1] + rows_at, first, sq, not MASKED, M)
            keep = kept(multipliers[None, :], offsets[None, :], key_words[:, None], drop[5])
            factor = tl.where(keep, drop[6], 0.0)
            kept_p = p * factor
            dp *= factor
        dv_acc = tl.dot(kept_p.to(dout_block.dtype), dout_block, dv_acc, input_precision=PRECISION)
        ds = p * (dp - delta_rows[None, :])
        dk = tl.dot(ds.to(q_block.dtype), q_block, dk, input_precision=PRECISION)
    return dk, dv_acc


@triton.jit
def _backward_keys(
    dout, q, k, v, lse, delta, row_stride, dk, dv_, scale, scale2, heads, group, sizes, band, drop, table,
    d: tl.constexpr, dv: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    batch, key_head = tl.program_id(1) // (heads // group), tl.program_id(1) % (heads // group)
    block, q_start, sq, k_start, sk = place_of(block, sizes, table)
    first = block * N
    if first >= sk:  # after the last segment
        return
    keys = first + tl.arange(0, N)
    k_block = load(head_of(k, batch, key_head, k_start), k[1][0], first, sk, d, False, N, D)
    v_block = load(head_of(v, batch, key_head, k_start), v[1][0], first, sk, dv, False, N, DV)
    key_words = keys
    if drop is not None:
        key_words = load_row(drop[2] + batch.to(tl.int64) * drop[4] + k_start, first, sk, False, N)
    dk_acc = tl.zeros((N, D), tl.float32)
    dv_acc = tl.zeros((N, DV), tl.float32)
    low, whole, cut, high = blocks_seen(first, N, sk, sq, M, sq - sk, band[1], band[0])
    for i in range(group):
        head = key_head * group + i
        q_head = head_of(q, batch, head, q_start), q[1][0]
        dout_head = head_of(dout, batch, head, q_start), dout[1][0]
        number = (batch * heads + head).to(tl.int64)
        lse_head = lse + number * row_stride[0] + q_start
        delta_head = delta + number * row_stride[1] + q_start
        rows_at = number
        if drop is not None:
            rows_at = number * drop[3] + q_start
        for part in tl.static_range(3):
            if part > 0 or band[1] is not None:
                start, stop = part_of(part, low, whole, cut, high)
                dk_acc, dv_acc = _differentiate_keys(
                    start, stop, dk_acc, dv_acc, k_block, v_block, keys, key_words, dout_head, q_head, lse_head,
                    delta_head, scale2, sq, sk, band, drop, rows_at, part != 1, d, dv, M, N, D, DV, PRECISION,
                )  # fmt: skip
    store(head_of(dk, batch, key_head, k_start), dk[1][0], first, sk, d, dk_acc * scale, N, D)
    store(head_of(dv_, batch, key_head, k_start), dv_[1][0], first, sk, dv, dv_acc, N, DV)


def differentiate(
    rows: BackwardRows,
    k: Tensor,
    v: Tensor,
    band: Band,
    softmax: Softmax,
    into: Gradients,
    table: Segments | None = None,
) -> None:
    """See `Kernel.backward` and, with a table and a batch of one, `Kernel.backward_segments`.

    lse and delta are [b * h, sq], the last dim contiguous.
    """
    q, dout, lse, delta, _ = rows
    assert delta is not None
    (scale, dropout), (dq, dk, dv) = softmax, into
    (sq, batch, heads, d), (sk, _, key_heads, v_dim) = q.shape, v.shape
    inputs = (*map(with_strides, (dout, q, k, v)), lse, delta, (lse.stride(0), delta.stride(0)))
    same = (
        scale,
        scale * LOG2E.value,
        heads,
        heads // key_heads,
        (sq, sk),
        tuple(band),
        drop_arguments(dropout),
    )
    blocks, how = tuned(q, v, BACKWARD_ROWS if dropout is None else BACKWARD_ROWS_DROPPED)
    programs, ends = blocks_of_rows(table, sq, blocks[0])
    arguments = (*inputs, with_strides(dq), *same, ends, d, v_dim)
    run(_backward_rows, (programs, batch * heads), arguments, blocks, how, q, dropout is not None)
    blocks, how = tuned(q, v, BACKWARD_KEYS)
    programs, ends = blocks_of_keys(table, sk, blocks[1])
    arguments = (*inputs, with_strides(dk), with_strides(dv), *same, ends, d, v_dim)
    run(_backward_keys, (programs, batch * key_heads), arguments, blocks, how, q, dropout is not None)
