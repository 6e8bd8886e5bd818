"""Gradients of queries, keys and values from the log-sum-exp over all keys and delta."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_attn2d.attention.dropout import KeepMask
from megatron_attn2d.attention.layout import Band
from megatron_attn2d.attention.triton_attention.blocks import (
    blocks_seen,
    factors,
    hidden,
    key_positions,
    load,
    row_states,
    store,
)
from megatron_attn2d.attention.triton_attention.launch import (
    BACKWARD_KEYS,
    BACKWARD_ROWS,
    drop_arguments,
    run,
    tuned,
    with_strides,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _differentiate_rows(
    start, stop, dq, q, dout, rows, states, lse2, delta, k, v, batch, key_head, scale2, sizes, band, drop,
    MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ / scale of one block of rows from key blocks [start, stop)."""
    columns, v_columns = tl.arange(0, D), tl.arange(0, DV)
    for block in range(start, stop):
        keys = block * N + tl.arange(0, N)
        k_block = load(k, batch, key_head, keys, sizes[1], columns, sizes[2])
        v_block = load(v, batch, key_head, keys, sizes[1], v_columns, sizes[3])
        p = tl.exp2(tl.dot(q, tl.trans(k_block), input_precision=PRECISION) * scale2 - lse2[:, None])
        if MASKED:
            p = tl.where(hidden(rows[:, None], keys[None, :], sizes, band), 0.0, p)
        dp = tl.dot(dout, tl.trans(v_block), input_precision=PRECISION)
        if drop is not None:
            dp *= factors(drop, states[:, None], key_positions(drop, batch, keys, sizes[1])[None, :])
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k_block.dtype), k_block, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _backward_rows(
    dout, q, k, v, lse, delta, dq, scale, scale2, heads, group, sizes, band, drop,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    rows = first + tl.arange(0, M)
    q_block = load(q, batch, head, rows, sizes[0], tl.arange(0, D), sizes[2])
    dout_block = load(dout, batch, head, rows, sizes[0], tl.arange(0, DV), sizes[3])
    at = tl.program_id(1).to(tl.int64) * sizes[0] + rows
    lse2 = tl.load(lse + at, rows < sizes[0], other=0.0) * LOG2E
    delta_rows = tl.load(delta + at, rows < sizes[0], other=0.0)
    states = rows
    if drop is not None:
        states = row_states(drop, batch, head, rows, sizes[0])
    acc = tl.zeros((M, D), tl.float32)
    low, whole, cut, high = blocks_seen(first, M, sizes[0], sizes[1], N, sizes[1] - sizes[0], band[0], band[1])
    for part in tl.static_range(3):
        start, stop = low, whole
        if part == 1:
            start, stop = whole, cut
        if part == 2:
            start, stop = cut, high
        acc = _differentiate_rows(
            start, stop, acc, q_block, dout_block, rows, states, lse2, delta_rows, k, v, batch, head // group, scale2,
            sizes, band, drop, part != 1, M, N, D, DV, PRECISION,
        )  # fmt: skip
    store(dq, batch, head, rows, sizes[0], tl.arange(0, D), sizes[2], acc * scale)


@triton.jit
def _differentiate_keys(
    start, stop, dk, dv, k, v, keys, positions, dout, q, lse, delta, batch, head, heads, scale2, sizes, band, drop,
    MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK / scale and dV of one block of keys from row blocks [start, stop) of one head; scores are transposed."""
    columns, v_columns = tl.arange(0, D), tl.arange(0, DV)
    for block in range(start, stop):
        rows = block * M + tl.arange(0, M)
        q_block = load(q, batch, head, rows, sizes[0], columns, sizes[2])
        dout_block = load(dout, batch, head, rows, sizes[0], v_columns, sizes[3])
        at = (batch * heads + head).to(tl.int64) * sizes[0] + rows
        lse2 = tl.load(lse + at, rows < sizes[0], other=0.0) * LOG2E
        delta_rows = tl.load(delta + at, rows < sizes[0], other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q_block), input_precision=PRECISION) * scale2 - lse2[None, :])
        if MASKED:
            p = tl.where(hidden(rows[None, :], keys[:, None], sizes, band), 0.0, p)
        dp = tl.dot(v, tl.trans(dout_block), input_precision=PRECISION)
        kept = p
        if drop is not None:
            states = row_states(drop, batch, head, rows, sizes[0])
            factor = factors(drop, states[None, :], positions[:, None])
            kept = p * factor
            dp *= factor
        dv = tl.dot(kept.to(dout_block.dtype), dout_block, dv, input_precision=PRECISION)
        ds = p * (dp - delta_rows[None, :])
        dk = tl.dot(ds.to(q_block.dtype), q_block, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _backward_keys(
    dout, q, k, v, lse, delta, dk, dv, scale, scale2, heads, group, sizes, band, drop,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * N
    batch, key_head = tl.program_id(1) // (heads // group), tl.program_id(1) % (heads // group)
    keys = first + tl.arange(0, N)
    k_block = load(k, batch, key_head, keys, sizes[1], tl.arange(0, D), sizes[2])
    v_block = load(v, batch, key_head, keys, sizes[1], tl.arange(0, DV), sizes[3])
    positions = keys
    if drop is not None:
        positions = key_positions(drop, batch, keys, sizes[1])
    dk_acc = tl.zeros((N, D), tl.float32)
    dv_acc = tl.zeros((N, DV), tl.float32)
    low, whole, cut, high = blocks_seen(first, N, sizes[1], sizes[0], M, sizes[0] - sizes[1], band[1], band[0])
    for i in range(group):
        head = key_head * group + i
        for part in tl.static_range(3):
            start, stop = low, whole
            if part == 1:
                start, stop = whole, cut
            if part == 2:
                start, stop = cut, high
            dk_acc, dv_acc = _differentiate_keys(
                start, stop, dk_acc, dv_acc, k_block, v_block, keys, positions, dout, q, lse, delta, batch, head, heads,
                scale2, sizes, band, drop, part != 1, M, N, D, DV, PRECISION,
            )  # fmt: skip
    store(dk, batch, key_head, keys, sizes[1], tl.arange(0, D), sizes[2], dk_acc * scale)
    store(dv, batch, key_head, keys, sizes[1], tl.arange(0, DV), sizes[3], dv_acc)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    band: Band,
    scale: float,
    dropout: KeepMask | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernel.backward`."""
    (sq, batch, heads, d), (sk, _, key_heads, dv) = q.shape, v.shape
    dq, dk, dv_ = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    inputs = (*map(with_strides, (dout, q, k, v)), lse.contiguous(), delta.contiguous())
    same = (
        scale,
        scale * LOG2E.value,
        heads,
        heads // key_heads,
        (sq, sk, d, dv),
        tuple(band),
        drop_arguments(dropout),
    )
    blocks, how = tuned(q, v, BACKWARD_ROWS)
    programs = triton.cdiv(sq, blocks[0]), batch * heads
    run(_backward_rows, programs, (*inputs, with_strides(dq), *same), blocks, how, q)
    blocks, how = tuned(q, v, BACKWARD_KEYS)
    programs = triton.cdiv(sk, blocks[1]), batch * key_heads
    run(_backward_keys, programs, (*inputs, with_strides(dk), with_strides(dv_), *same), blocks, how, q)
    return dq, dk, dv_
