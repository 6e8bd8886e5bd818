"""Tiled attention in Triton for what the fast kernels lack: any band, dropout by position, any head dims, fp32.

Forward and backward follow FlashAttention-2 (Dao, arXiv 2307.08691, algorithms 1 and 2): a program has a block of query
rows and walks over the keys that they see. The backward pass is two walks, over keys for dQ and over queries for dK and
dV, so nothing is added atomically and two runs agree bit for bit. Blocks that the band hides are not visited; those
that it cuts are masked.

What kernels pass on to each other comes in tuples: `sizes` (sq, sk, d, dv), `band` (left, right) with None for no end,
`drop` as `_drop_arguments` makes it or None. A tensor [n, b, heads, d] comes with its strides (n, b, heads). Blocks
have M rows, N keys, D columns of queries and keys and DV of values.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_attn2d.attention.dropout import BITS, KeepMask
from megatron_attn2d.attention.layout import Band
from megatron_attn2d.attention.merge import accumulation_dtype

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_SHIFT = tl.constexpr(64 - BITS)


@triton.jit
def _at(x, batch, head, rows, columns):
    pointer, stride = x
    base = pointer + batch.to(tl.int64) * stride[1] + head.to(tl.int64) * stride[2]
    return base + rows.to(tl.int64)[:, None] * stride[0] + columns[None, :]


@triton.jit
def _load(x, batch, head, rows, n, columns, d):
    """Rows of one head, 0 beyond the end."""
    return tl.load(_at(x, batch, head, rows, columns), (rows < n)[:, None] & (columns < d)[None, :], other=0.0)


@triton.jit
def _store(x, batch, head, rows, n, columns, d, values):
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
def _row_states(drop, batch, head, rows, sq):
    """The hash of seed, sequence, head and position of each row, from which those of its keys start."""
    state = _mixed(tl.load(drop[0]).to(tl.uint64), tl.load(drop[1] + batch))
    state = _mixed(state, tl.load(drop[2] + head))
    return _mixed(state, tl.load(drop[3] + batch * drop[4] + rows, rows < sq, other=0))


@triton.jit
def _key_positions(drop, batch, keys, sk):
    return tl.load(drop[5] + batch * drop[6] + keys, keys < sk, other=0)


@triton.jit
def _factors(drop, states, positions):
    """0 for what is dropped, 1 / (1 - p) for what is kept; states and positions broadcast."""
    return tl.where((_mixed(states, positions) >> _SHIFT).to(tl.int64) >= drop[7], drop[8], 0.0)


@triton.jit
def _hidden(rows, keys, sizes, band):
    """Whether a score lies beyond the end or outside of the band, whose diagonal ends at the bottom right."""
    hidden = (keys >= sizes[1]) | (rows >= sizes[0])
    ahead = keys - rows - (sizes[1] - sizes[0])
    if band[0] is not None:
        hidden = hidden | (ahead < -band[0])
    if band[1] is not None:
        hidden = hidden | (ahead > band[1])
    return hidden


@triton.jit
def _blocks_seen(first, count, size, other, step, shift, before, after):
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


@triton.jit
def _attend(
    start, stop, acc, total, highest, q, rows, states, k, v, batch, key_head, scale2, sizes, band, drop,
    MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Key blocks [start, stop) for one block of rows."""
    columns, v_columns = tl.arange(0, D), tl.arange(0, DV)
    for block in range(start, stop):
        keys = block * N + tl.arange(0, N)
        k_block = _load(k, batch, key_head, keys, sizes[1], columns, sizes[2])
        scores = tl.dot(q, tl.trans(k_block), input_precision=PRECISION) * scale2
        if MASKED:
            scores = tl.where(_hidden(rows[:, None], keys[None, :], sizes, band), -float("inf"), scores)
        above = tl.maximum(highest, tl.max(scores, 1))
        reference = tl.where(above == -float("inf"), 0.0, above)
        p = tl.exp2(scores - reference[:, None])
        decay = tl.exp2(highest - reference)
        total = total * decay + tl.sum(p, 1)
        if drop is not None:
            p *= _factors(drop, states[:, None], _key_positions(drop, batch, keys, sizes[1])[None, :])
        v_block = _load(v, batch, key_head, keys, sizes[1], v_columns, sizes[3])
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * decay[:, None], input_precision=PRECISION)
        highest = above
    return acc, total, highest


@triton.jit
def _forward(
    q,
    k,
    v,
    out,
    lse,
    scale2,
    heads,
    group,
    sizes,
    band,
    drop,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Under a causal mask the last rows see most: they go first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    rows = first + tl.arange(0, M)
    q_block = _load(q, batch, head, rows, sizes[0], tl.arange(0, D), sizes[2])
    states = rows
    if drop is not None:
        states = _row_states(drop, batch, head, rows, sizes[0])
    acc = tl.zeros((M, DV), tl.float32)
    total = tl.zeros((M,), tl.float32)
    highest = tl.full((M,), -float("inf"), tl.float32)
    low, whole, cut, high = _blocks_seen(first, M, sizes[0], sizes[1], N, sizes[1] - sizes[0], band[0], band[1])
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
    _store(out, batch, head, rows, sizes[0], tl.arange(0, DV), sizes[3], acc)
    at = tl.program_id(1).to(tl.int64) * sizes[0] + rows
    tl.store(lse + at, (highest + tl.log2(total)) * _LN2, rows < sizes[0])


@triton.jit
def _differentiate_rows(
    start, stop, dq, q, dout, rows, states, lse2, delta, k, v, batch, key_head, scale2, sizes, band, drop,
    MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ / scale of one block of rows from key blocks [start, stop)."""
    columns, v_columns = tl.arange(0, D), tl.arange(0, DV)
    for block in range(start, stop):
        keys = block * N + tl.arange(0, N)
        k_block = _load(k, batch, key_head, keys, sizes[1], columns, sizes[2])
        v_block = _load(v, batch, key_head, keys, sizes[1], v_columns, sizes[3])
        p = tl.exp2(tl.dot(q, tl.trans(k_block), input_precision=PRECISION) * scale2 - lse2[:, None])
        if MASKED:
            p = tl.where(_hidden(rows[:, None], keys[None, :], sizes, band), 0.0, p)
        dp = tl.dot(dout, tl.trans(v_block), input_precision=PRECISION)
        if drop is not None:
            dp *= _factors(drop, states[:, None], _key_positions(drop, batch, keys, sizes[1])[None, :])
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
    q_block = _load(q, batch, head, rows, sizes[0], tl.arange(0, D), sizes[2])
    dout_block = _load(dout, batch, head, rows, sizes[0], tl.arange(0, DV), sizes[3])
    at = tl.program_id(1).to(tl.int64) * sizes[0] + rows
    lse2 = tl.load(lse + at, rows < sizes[0], other=0.0) * _LOG2E
    delta_rows = tl.load(delta + at, rows < sizes[0], other=0.0)
    states = rows
    if drop is not None:
        states = _row_states(drop, batch, head, rows, sizes[0])
    acc = tl.zeros((M, D), tl.float32)
    low, whole, cut, high = _blocks_seen(first, M, sizes[0], sizes[1], N, sizes[1] - sizes[0], band[0], band[1])
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
    _store(dq, batch, head, rows, sizes[0], tl.arange(0, D), sizes[2], acc * scale)


@triton.jit
def _differentiate_keys(
    start, stop, dk, dv, k, v, keys, positions, dout, q, lse, delta, batch, head, heads, scale2, sizes, band, drop,
    MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK / scale and dV of one block of keys from row blocks [start, stop) of one head; scores are transposed."""
    columns, v_columns = tl.arange(0, D), tl.arange(0, DV)
    for block in range(start, stop):
        rows = block * M + tl.arange(0, M)
        q_block = _load(q, batch, head, rows, sizes[0], columns, sizes[2])
        dout_block = _load(dout, batch, head, rows, sizes[0], v_columns, sizes[3])
        at = (batch * heads + head).to(tl.int64) * sizes[0] + rows
        lse2 = tl.load(lse + at, rows < sizes[0], other=0.0) * _LOG2E
        delta_rows = tl.load(delta + at, rows < sizes[0], other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q_block), input_precision=PRECISION) * scale2 - lse2[None, :])
        if MASKED:
            p = tl.where(_hidden(rows[None, :], keys[:, None], sizes, band), 0.0, p)
        dp = tl.dot(v, tl.trans(dout_block), input_precision=PRECISION)
        kept = p
        if drop is not None:
            factors = _factors(drop, _row_states(drop, batch, head, rows, sizes[0])[None, :], positions[:, None])
            kept = p * factors
            dp *= factors
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
    k_block = _load(k, batch, key_head, keys, sizes[1], tl.arange(0, D), sizes[2])
    v_block = _load(v, batch, key_head, keys, sizes[1], tl.arange(0, DV), sizes[3])
    positions = keys
    if drop is not None:
        positions = _key_positions(drop, batch, keys, sizes[1])
    dk_acc = tl.zeros((N, D), tl.float32)
    dv_acc = tl.zeros((N, DV), tl.float32)
    low, whole, cut, high = _blocks_seen(first, N, sizes[1], sizes[0], M, sizes[0] - sizes[1], band[1], band[0])
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
    _store(dk, batch, key_head, keys, sizes[1], tl.arange(0, D), sizes[2], dk_acc * scale)
    _store(dv, batch, key_head, keys, sizes[1], tl.arange(0, DV), sizes[3], dv_acc)


def forward(
    q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float, dropout: KeepMask | None
) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`."""
    (sq, batch, heads, _), dv = q.shape, v.size(3)
    out = q.new_empty((sq, batch, heads, dv))
    lse = torch.empty((batch, heads, sq), dtype=accumulation_dtype(q.dtype), device=q.device)
    blocks, launch = _tuned(q, v, _forward_table(q))
    _forward[(triton.cdiv(sq, blocks[0]), batch * heads)](
        *map(_with_strides, (q, k, v, out)),
        lse,
        scale * _LOG2E.value,
        heads,
        heads // k.size(2),
        (sq, k.size(0), q.size(3), dv),
        tuple(band),
        _drop_arguments(dropout),
        *blocks,
        _precision(q),
        **launch,
    )
    return out, lse


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
    inputs = (*map(_with_strides, (dout, q, k, v)), lse.contiguous(), delta.contiguous())
    same = (
        scale,
        scale * _LOG2E.value,
        heads,
        heads // key_heads,
        (sq, sk, d, dv),
        tuple(band),
        _drop_arguments(dropout),
    )
    blocks, launch = _tuned(q, v, _BACKWARD_ROWS)
    _backward_rows[(triton.cdiv(sq, blocks[0]), batch * heads)](
        *inputs, _with_strides(dq), *same, *blocks, _precision(q), **launch
    )
    blocks, launch = _tuned(q, v, _BACKWARD_KEYS)
    _backward_keys[(triton.cdiv(sk, blocks[1]), batch * key_heads)](
        *inputs, _with_strides(dk), _with_strides(dv_), *same, *blocks, _precision(q), **launch
    )
    return dq, dk, dv_


# Rows and keys of a block, warps and pipeline stages by the widest head dim, for 16-bit inputs; the fastest measured on
# H100. Those of forward's blocks that need more shared memory than an A100 has give way to smaller ones there.
_FORWARD = {64: (128, 64, 4, 3), 128: (128, 128, 8, 3), 256: (128, 64, 8, 2)}
_FORWARD_AMPERE = {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 4, 1)}
_BACKWARD_ROWS = {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 1)}
_BACKWARD_KEYS = {64: (64, 64, 4, 3), 128: (64, 128, 8, 3), 256: (64, 64, 8, 1)}
_AMPERE_SHARED_BYTES = 163 * 1024


def _tuned(q: Tensor, v: Tensor, table: dict[int, tuple[int, int, int, int]]) -> tuple[tuple[int, ...], dict[str, Any]]:
    columns = [max(16, triton.next_power_of_2(x.size(3))) for x in (q, v)]
    rows, keys, warps, stages = table[max(64, *columns)]
    if q.dtype == torch.float32:  # twice the bytes, and no tensor cores
        rows, keys, stages = max(16, rows // 4), max(16, keys // 2), 1
    return (rows, keys, *columns), {"num_warps": warps, "num_stages": stages}


def _forward_table(q: Tensor) -> dict[int, tuple[int, int, int, int]]:
    if not q.is_cuda:  # the interpreter
        return _FORWARD
    shared = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    return _FORWARD if shared > _AMPERE_SHARED_BYTES else _FORWARD_AMPERE


def _precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"  # 16-bit inputs ignore it


def _with_strides(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x, x.stride()[:3]


def _drop_arguments(dropout: KeepMask | None) -> tuple[Any, ...] | None:
    """Seed, sequences, heads, positions of rows and of keys with the strides of their batch, bound and factor."""
    if dropout is None:
        return None
    seed = torch.as_tensor(dropout.dropout.seed, device=dropout.rows.device).view(1)
    rows, keys = (x if x.stride(1) == 1 else x.contiguous() for x in (dropout.rows, dropout.keys))
    p = dropout.dropout.p
    return (
        seed,
        dropout.sequences,
        dropout.heads,
        rows,
        rows.stride(0),
        keys,
        keys.stride(0),
        round(p * (1 << BITS)),
        1 / (1 - p),
    )
