"""One query per sequence and head against a long cache, on a GPU: the cache is read once, at the speed of its memory.

The keys of a sequence are cut into parts, so that all of the GPU reads although there are few sequences. A program
attends the query heads of one key head to one part; a second kernel merges the parts by their log-sum-exp.
How many keys there are is read on the GPU: a CUDA graph that was captured once serves a cache that grows.

Legend: B sequences, h query heads, g key heads, d head dim, dv the values' head dim.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)
_MOST_PARTS = 256
_BLOCKS_PER_PROCESSOR = 4
"""Programs for each multiprocessor of the GPU, so that their loads overlap."""


@triton.jit
def _attend_part(
    q, k, v, ends, key_positions, positions, parts, k_strides, v_strides, position_stride, scale2, window, heads,
    PARTS: tl.constexpr, SHARED: tl.constexpr, WINDOWED: tl.constexpr, d: tl.constexpr, dv: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    end = tl.load(ends + batch).to(tl.int32)
    length = tl.cdiv(tl.cdiv(end, PARTS), N) * N
    first = part * length
    last = tl.minimum(first + length, end)
    rows, columns, value_columns = tl.arange(0, M), tl.arange(0, D), tl.arange(0, DV)
    row = tl.program_id(1) * SHARED + rows
    real = rows < SHARED
    queries = tl.load(q + row[:, None] * d + columns, real[:, None] & (columns < d), 0.0)
    acc = tl.zeros((M, DV), tl.float32)
    total = tl.zeros((M,), tl.float32)
    highest = tl.full((M,), -float("inf"), tl.float32)
    k += batch * k_strides[0] + head * k_strides[2]
    v += batch * v_strides[0] + head * v_strides[2]
    nearest = 0
    if WINDOWED:
        nearest = tl.load(positions + batch) - window
    for start in range(first, last, N):
        keys = start + tl.arange(0, N)
        seen = keys < last
        if WINDOWED:
            seen &= tl.load(key_positions + batch * position_stride + keys, seen, -1) >= nearest
        at = keys.to(tl.int64)[:, None]
        k_block = tl.load(k + at * k_strides[1] + columns, seen[:, None] & (columns < d), 0.0)
        scores = tl.dot(queries, tl.trans(k_block), input_precision=PRECISION) * scale2
        scores = tl.where(seen[None, :], scores, -float("inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        reference = tl.where(above == -float("inf"), 0.0, above)
        p = tl.exp2(scores - reference[:, None])
        decay = tl.exp2(highest - reference)
        total = total * decay + tl.sum(p, 1)
        v_block = tl.load(v + at * v_strides[1] + value_columns, seen[:, None] & (value_columns < dv), 0.0)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * decay[:, None], input_precision=PRECISION)
        highest = above
    acc /= tl.where(total == 0, 1.0, total)[:, None]
    lse = (highest + tl.log2(total)) / _LOG2E
    place = (part.to(tl.int64) * tl.num_programs(1) * SHARED + row) * (dv + 1)
    tl.store(parts + place[:, None] + value_columns, acc, real[:, None] & (value_columns < dv))
    tl.store(parts + place + dv, tl.where(total == 0, -float("inf"), lse), real)


@triton.jit
def _merge(parts, out, number, dv: tl.constexpr, COUNT: tl.constexpr, DV: tl.constexpr):
    row = tl.program_id(0)
    index = tl.arange(0, COUNT)
    place = (index.to(tl.int64) * tl.num_programs(0) + row) * (dv + 1)
    lse = tl.load(parts + place + dv, index < number, -float("inf"))
    highest = tl.max(lse, 0)
    reference = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp(lse - reference)
    total = tl.sum(weights, 0)
    columns = tl.program_id(1) * DV + tl.arange(0, DV)
    values = tl.load(parts + place[:, None] + columns, (index < number)[:, None] & (columns < dv), 0.0)
    values = tl.where(weights[:, None] == 0, 0.0, values * weights[:, None])
    merged = tl.sum(values, 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + row * (dv + 1) + columns, merged, columns < dv)
    if tl.program_id(1) == 0:
        tl.store(out + row * (dv + 1) + dv, reference + tl.log(total))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    scale: float,
    window: int | None = None,
    key_positions: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Attends q [B, h, d] to the first `ends` [B] of k [B, n, g, d] and v [B, n, g, dv]; the last dims are contiguous.

    Args:
        q: queries.
        k: keys.
        v: values.
        ends: how many keys each sequence has, int64, on the GPU.
        scale: factor on the scores, more than 0.
        window: see keys at most so far before the query only; with both positions.
        key_positions: of the keys, [B, n].
        positions: of the queries, [B].

    Returns:
        [B, h, dv + 1] fp32: the output and, behind it, the log-sum-exp; zeros and -inf where no key is seen.
    """
    (batch, heads, d), (key_heads, dv) = q.shape, v.shape[2:]
    q, shared = q.contiguous(), heads // key_heads
    parts = _parts(batch * key_heads, q.device)
    found = q.new_empty(parts, batch, heads, dv + 1, dtype=torch.float32)
    wide = triton.next_power_of_2(max(d, dv))
    if wide <= 128:
        keys, stages = 64, 3
    else:  # a block of 32 latent vectors in fp32 takes 258 KiB of shared memory, of which a Hopper GPU has 227
        keys, stages = (32 if wide * q.element_size() <= 2048 else 16), 2
    _attend_part[(parts, batch * key_heads)](
        q, k, v, ends, key_positions, positions, found, k.stride()[:3], v.stride()[:3],
        0 if key_positions is None else key_positions.stride(0), scale * 1.4426950408889634, window, key_heads,
        parts, shared, window is not None, d, dv,
        max(16, triton.next_power_of_2(shared)), keys,
        max(16, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(dv)),
        "ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=stages,
    )  # fmt: skip
    return merge(found)


def merge(parts: Tensor) -> Tensor:
    """Merges [n, B, h, dv + 1], results over different keys as `attend` returns them, to one, [B, h, dv + 1]."""
    number, batch, heads, width = parts.shape
    if number == 1:
        return parts[0]
    out = parts.new_empty(batch, heads, width)
    count = triton.next_power_of_2(number)
    tile = min(64, max(16, 4096 // count))  # what a program holds in registers
    _merge[(batch * heads, triton.cdiv(width - 1, tile))](parts.contiguous(), out, number, width - 1, count, tile)
    return out


@cache
def _parts(programs: int, device: torch.device) -> int:
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    wanted = triton.next_power_of_2(triton.cdiv(_BLOCKS_PER_PROCESSOR * processors, programs))
    return min(_MOST_PARTS, wanted)
