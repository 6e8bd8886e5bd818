"""Output and log-sum-exp."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_attn2d.attention.dropout import KeepMask
from megatron_attn2d.attention.layout import Band
from megatron_attn2d.attention.merge import accumulation_dtype
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
    drop_arguments,
    forward_table,
    run,
    tuned,
    with_strides,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    start, stop, acc, total, highest, q, rows, states, k, v, batch, key_head, scale2, sizes, band, drop,
    MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Key blocks [start, stop) for one block of rows."""
    columns, v_columns = tl.arange(0, D), tl.arange(0, DV)
    for block in range(start, stop):
        keys = block * N + tl.arange(0, N)
        k_block = load(k, batch, key_head, keys, sizes[1], columns, sizes[2])
        scores = tl.dot(q, tl.trans(k_block), input_precision=PRECISION) * scale2
        if MASKED:
            scores = tl.where(hidden(rows[:, None], keys[None, :], sizes, band), -float("inf"), scores)
        above = tl.maximum(highest, tl.max(scores, 1))
        reference = tl.where(above == -float("inf"), 0.0, above)
        p = tl.exp2(scores - reference[:, None])
        decay = tl.exp2(highest - reference)
        total = total * decay + tl.sum(p, 1)
        if drop is not None:
            p *= factors(drop, states[:, None], key_positions(drop, batch, keys, sizes[1])[None, :])
        v_block = load(v, batch, key_head, keys, sizes[1], v_columns, sizes[3])
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * decay[:, None], input_precision=PRECISION)
        highest = above
    return acc, total, highest


@triton.jit
def _forward(
    q, k, v, out, lse, scale2, heads, group, sizes, band, drop,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Under a causal mask the last rows see most: they go first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    rows = first + tl.arange(0, M)
    q_block = load(q, batch, head, rows, sizes[0], tl.arange(0, D), sizes[2])
    states = rows
    if drop is not None:
        states = row_states(drop, batch, head, rows, sizes[0])
    acc = tl.zeros((M, DV), tl.float32)
    total = tl.zeros((M,), tl.float32)
    highest = tl.full((M,), -float("inf"), tl.float32)
    low, whole, cut, high = blocks_seen(first, M, sizes[0], sizes[1], N, sizes[1] - sizes[0], band[0], band[1])
    for part in tl.static_range(3):
        start, stop = low, whole
        if part == 1:
            start, stop = whole, cut
        if part == 2:
            start, stop = cut, high
        acc, total, highest = _attend(
            start, stop, acc, total, highest, q_block, rows, states, k, v, batch, head // group, scale2, sizes, band,
            drop, part != 1, M, N, D, DV, PRECISION,
        )  # fmt: skip
    acc /= tl.where(total == 0, 1.0, total)[:, None]
    store(out, batch, head, rows, sizes[0], tl.arange(0, DV), sizes[3], acc)
    at = tl.program_id(1).to(tl.int64) * sizes[0] + rows
    tl.store(lse + at, (highest + tl.log2(total)) * LN2, rows < sizes[0])


def forward(
    q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float, dropout: KeepMask | None
) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`."""
    (sq, batch, heads, _), dv = q.shape, v.size(3)
    out = q.new_empty((sq, batch, heads, dv))
    lse = torch.empty((batch, heads, sq), dtype=accumulation_dtype(q.dtype), device=q.device)
    arguments = (
        *map(with_strides, (q, k, v, out)),
        lse,
        scale * LOG2E.value,
        heads,
        heads // k.size(2),
        (sq, k.size(0), q.size(3), dv),
        tuple(band),
        drop_arguments(dropout),
    )
    blocks, how = tuned(q, v, forward_table(q))
    run(_forward, (triton.cdiv(sq, blocks[0]), batch * heads), arguments, blocks, how, q)
    return out, lse
