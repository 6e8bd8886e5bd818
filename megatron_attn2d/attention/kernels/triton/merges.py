"""The functions of `merge` as one Triton kernel each: every input is read once, every result written once.

Each program takes BLOCK_N rows of one head of one sequence of the batch. Several chunks share a launch (the third axis
of its grid), as short sequences spend most of their time on launches. Partial results come as stacks, each with strides
of its own, so that nothing is copied beforehand; the last dim is contiguous. Stacks of different chunks that have the
same strides share one *position*. So the number of a launch's arguments, and of a kernel's variants, does not grow with
the number of ranks.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_N = 32


@triton.jit
def _tile(pointer, strides, batch, head, rows, columns):
    """Addresses [BLOCK_N, BLOCK_D] of rows of x [n, b, h, d]; strides (n, b, h)."""
    base = pointer + batch.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]
    return base + rows.to(tl.int64)[:, None] * strides[0] + columns[None, :]


@triton.jit
def _rows(pointer, strides, batch, head, rows):
    """Addresses [BLOCK_N] of rows of x [b, h, n]; strides (b, h)."""
    return pointer + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + rows


@triton.jit
def _merge_chunk(
    outs,
    out_strides,
    lses,
    lse_strides,
    counts,
    out,
    out_stride,
    lse,
    lse_stride,
    heads,
    n,
    d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    rows, columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = (rows < n)[:, None] & (columns < d)[None, :]

    highest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    for i in tl.static_range(len(lses)):
        lse_rows = _rows(lses[i], lse_strides[i], batch, head, rows)
        for _ in range(counts[i]):
            highest = tl.maximum(highest, tl.load(lse_rows, rows < n, other=-float("inf")))
            lse_rows += lse_strides[i][2]
    reference = tl.where(highest == -float("inf"), 0.0, highest)
    total = tl.zeros((BLOCK_N,), tl.float32)
    merged = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in tl.static_range(len(lses)):
        lse_rows = _rows(lses[i], lse_strides[i], batch, head, rows)
        out_tile = _tile(outs[i], out_strides[i], batch, head, rows, columns)
        for _ in range(counts[i]):
            part = tl.load(lse_rows, rows < n, other=-float("inf"))
            weight = tl.exp(part - reference)
            total += weight
            partial = tl.load(out_tile, inside, other=0.0)
            # only rows that saw no key are left out: NaN times a weight that underflowed is still NaN
            merged += tl.where(part[:, None] == -float("inf"), 0.0, partial.to(tl.float32) * weight[:, None])
            lse_rows += lse_strides[i][2]
            out_tile += out_strides[i][3]
    merged /= tl.where(total == 0, 1.0, total)[:, None]
    tl.store(_tile(out, out_stride, batch, head, rows, columns), merged.to(out.dtype.element_ty), inside)
    tl.store(_rows(lse, lse_stride, batch, head, rows), reference + tl.log(total), rows < n)


@triton.jit
def _merge(
    outs,
    out_strides,
    lses,
    lse_strides,
    counts,
    out,
    out_stride,
    lse,
    lse_stride,
    heads,
    n,
    d,
    CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    for c in tl.static_range(CHUNKS):
        if tl.program_id(2) == c:
            _merge_chunk(
                outs[c],
                out_strides,
                lses[c],
                lse_strides,
                counts[c],
                out[c],
                out_stride,
                lse[c],
                lse_stride,
                heads,
                n,
                d,
                BLOCK_N,
                BLOCK_D,
            )


@triton.jit
def _sum_chunk(partials, strides, counts, total, stride, heads, n, d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    rows, columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = (rows < n)[:, None] & (columns < d)[None, :]
    accumulator = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in tl.static_range(len(partials)):
        tile = _tile(partials[i], strides[i], batch, head, rows, columns)
        for _ in range(counts[i]):
            accumulator += tl.load(tile, inside, other=0.0).to(tl.float32)
            tile += strides[i][3]
    tl.store(_tile(total, stride, batch, head, rows, columns), accumulator.to(total.dtype.element_ty), inside)


@triton.jit
def _sum(
    partials,
    strides,
    counts,
    totals,
    stride,
    heads,
    n,
    d,
    CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    for c in tl.static_range(CHUNKS):
        if tl.program_id(2) == c:
            _sum_chunk(partials[c], strides, counts[c], totals[c], stride, heads, n, d, BLOCK_N, BLOCK_D)


@triton.jit
def _statistics(
    dout, dout_stride, out, out_stride, lse, result, batches, heads, n, d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    half, inner = tl.program_id(1) // (batches * heads), tl.program_id(1) % (batches * heads)
    batch, head = inner // heads, inner % heads
    rows, columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = (rows < n)[:, None] & (columns < d)[None, :]
    # Both halves are one tensor [2n, b, h, d] with row stride n.
    left = tl.load(_tile(dout, dout_stride, batch, head, half * n + rows, columns), inside, other=0.0).to(tl.float32)
    right = tl.load(_tile(out, out_stride, batch, head, half * n + rows, columns), inside, other=0.0).to(tl.float32)
    size = batches * heads * n
    at = inner.to(tl.int64) * n + rows
    base = result + half.to(tl.int64) * 2 * size
    tl.store(base + at, tl.load(lse + half.to(tl.int64) * size + at, rows < n), rows < n)
    tl.store(base + size + at, tl.sum(left * right, 1), rows < n)


@triton.jit
def _surrogate_out(
    dout,
    dout_stride,
    delta,
    delta_stride,
    out,
    out_stride,
    batches,
    heads,
    n,
    d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot, inner = tl.program_id(1) // (batches * heads), tl.program_id(1) % (batches * heads)
    batch, head = inner // heads, inner % heads
    rows, columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = (rows < n)[:, None] & (columns < d)[None, :]
    gradient = tl.load(_tile(dout, dout_stride, batch, head, slot * n + rows, columns), inside, other=0.0).to(
        tl.float32
    )
    norm = tl.sum(gradient * gradient, 1)
    wanted = tl.load(delta + slot.to(tl.int64) * delta_stride + inner.to(tl.int64) * n + rows, rows < n, other=0.0)
    ratio = tl.where(norm == 0, 0.0, wanted / norm)
    result = gradient * ratio[:, None]
    tl.store(_tile(out, out_stride, batch, head, slot * n + rows, columns), result.to(out.dtype.element_ty), inside)


def merge_partials(
    outs: Sequence[Sequence[Tensor]], lses: Sequence[Sequence[Tensor]], out: Sequence[Tensor], lse: Sequence[Tensor]
) -> None:
    """See `merge.merge_partials`."""
    for some in _batches(len(out)):
        _merge_some(outs[some], lses[some], out[some], lse[some])


def _merge_some(
    outs: Sequence[Sequence[Tensor]], lses: Sequence[Sequence[Tensor]], out: Sequence[Tensor], lse: Sequence[Tensor]
) -> None:
    n, b, h, d = out[0].shape
    out_stride, lse_stride = _stride_of(out), _stride_of(lse)
    lses = [[x if x.stride(-1) == 1 else x.contiguous() for x in chunk] for chunk in lses]
    stacks = _Stacks.of([list(zip(*chunk, strict=True)) for chunk in zip(outs, lses, strict=True)], dims=(4, 3))
    (all_outs, all_lses), (out_strides, lse_strides) = stacks.tensors, stacks.strides
    _merge[(*_programs(n, b * h), len(out))](
        all_outs,
        out_strides,
        all_lses,
        lse_strides,
        stacks.counts,
        tuple(out),
        out_stride,
        tuple(lse),
        lse_stride,
        h,
        n,
        d,
        CHUNKS=len(out),
        **_blocks(d),
    )


def sum_partials(partials: Sequence[Sequence[Tensor]], totals: Sequence[Tensor]) -> None:
    """See `merge.sum_partials`."""
    for some in _batches(len(totals)):
        _sum_some(partials[some], totals[some])


def _sum_some(partials: Sequence[Sequence[Tensor]], totals: Sequence[Tensor]) -> None:
    n, b, h, d = totals[0].shape
    stride = _stride_of(totals)
    stacks = _Stacks.of([[(x,) for x in chunk] for chunk in partials], dims=(4,))
    _sum[(*_programs(n, b * h), len(totals))](
        *stacks.tensors,
        *stacks.strides,
        stacks.counts,
        tuple(totals),
        stride,
        h,
        n,
        d,
        CHUNKS=len(totals),
        **_blocks(d),
    )


def row_statistics(dout: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """See `merge.row_statistics`."""
    _, n, b, h, d = out.shape
    lse = lse.contiguous()
    result = lse.new_empty((2, 2, b, h, n))
    _statistics[_programs(n, 2 * b * h)](
        dout, _row_stride(dout), out, _row_stride(out), lse, result, b, h, n, d, **_blocks(d)
    )
    return result


def surrogate_out(dout: Tensor, delta: Tensor) -> Tensor:
    """See `merge.surrogate_out`."""
    slots, n, b, h, d = dout.shape
    assert delta.stride()[1:] == (h * n, n, 1), "delta is contiguous but for its slots"
    out = torch.empty_like(dout)
    _surrogate_out[_programs(n, slots * b * h)](
        dout, _row_stride(dout), delta, delta.stride(0), out, _row_stride(out), b, h, n, d, **_blocks(d)
    )
    return out


def _row_stride(chunks: Tensor) -> tuple[int, ...]:
    """Strides of n, b and h of chunks [slots, n, b, h, d] whose rows follow each other."""
    chunk, *strides, last = chunks.stride()
    assert last == 1, "the last dim is contiguous"
    assert chunks.size(0) == 1 or chunk == chunks.size(1) * strides[0], "chunks follow each other"
    return tuple(strides)


def _stride_of(chunks: Sequence[Tensor]) -> tuple[int, ...]:
    """The strides, but for the last, that all these tensors have."""
    *strides, last = chunks[0].stride()
    assert last == 1, "the last dim is contiguous"
    assert all(x.stride() == (*strides, 1) for x in chunks[1:]), "one stride serves all chunks"
    return tuple(strides)


class _Stacks(NamedTuple):
    """Partial results of several chunks by position.

    Attributes:
        tensors: of each kind, [chunk][position].
        strides: of each kind, [position], in the order of the dims but for the last; that of the stack comes last.
        counts: [chunk][position], how many partial results stand there.
    """

    tensors: tuple[tuple[tuple[Tensor, ...], ...], ...]
    strides: tuple[tuple[tuple[int, ...], ...], ...]
    counts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, chunks: Sequence[Sequence[tuple[Tensor, ...]]], dims: tuple[int, ...]) -> _Stacks:
        """From the partial results of each chunk, a tensor of so many dims of each kind or a stack of such.

        Its time counts, as a call makes it twice or three times: what strides alone decide is worked out once.
        """
        layouts = tuple(
            tuple((partial[0].size(0), *[x.stride() for x in partial]) for partial in chunk) for chunk in chunks
        )
        places, strides, counts = _placed(layouts, dims)
        tensors = (
            tuple(tuple(chunks[i][j][kind] for i, j in of_chunk) for of_chunk in places) for kind in range(len(dims))
        )
        return cls(tuple(tensors), strides, counts)


type _Layout = tuple[Any, ...]
"""Of a partial result its first dim and the strides of each kind."""
type _Places = tuple[tuple[tuple[int, int], ...], ...]
"""[chunk][position] the partial result that stands there: of which chunk, and which of them."""


@lru_cache(maxsize=256)
def _placed(
    chunks: tuple[tuple[_Layout, ...], ...], dims: tuple[int, ...]
) -> tuple[_Places, tuple[tuple[tuple[int, ...], ...], ...], tuple[tuple[int, ...], ...]]:
    """Places, strides and counts of `_Stacks`."""
    at: dict[object, int] = {}  # position of a chunk's first partial result of these strides, of its second, ...
    samples: list[tuple[int, int]] = []
    by_position: list[dict[int, tuple[int, int]]] = []
    for i, chunk in enumerate(chunks):
        found: dict[int, tuple[int, int]] = {}
        for j, (_, *layout) in enumerate(chunk):
            assert all(stride[-1] == 1 for stride in layout), "the last dim is contiguous"
            key: tuple[object, ...] = (*layout, 0)
            while (position := at.setdefault(key, len(samples))) in found:
                key = (*layout, position + 1)
            if position == len(samples):
                samples.append((i, j))
            found[position] = i, j
        by_position.append(found)
    stacked = [len(chunks[i][j][1]) > dims[0] for i, j in samples]

    def count(found: dict[int, tuple[int, int]], position: int) -> int:
        if position not in found:
            return 0
        i, j = found[position]
        return chunks[i][j][0] if stacked[position] else 1

    strides = tuple(
        tuple(
            (*chunks[i][j][1 + kind][-dim:-1], chunks[i][j][1 + kind][0] if deep else 0)
            for (i, j), deep in zip(samples, stacked, strict=True)
        )
        for kind, dim in enumerate(dims)
    )
    # Where a chunk has nothing another's partial result stands, and counts for none.
    places = tuple(tuple(found.get(n, sample) for n, sample in enumerate(samples)) for found in by_position)
    return places, strides, tuple(tuple(count(found, n) for n in range(len(samples))) for found in by_position)


_MOST_CHUNKS = 6
"""In a launch: two chunks of dQ, dK and dV each."""


def _batches(chunks: int) -> Iterator[slice]:
    return (slice(i, i + _MOST_CHUNKS) for i in range(0, chunks, _MOST_CHUNKS))


def _programs(n: int, heads: int) -> tuple[int, int]:
    return -(-n // _BLOCK_N), heads  # Triton's `cdiv` takes ten microseconds, as may each of its functions


def _blocks(d: int) -> dict[str, int]:
    return {"BLOCK_N": _BLOCK_N, "BLOCK_D": 1 << (d - 1).bit_length()}
