"""ATTENTION2D: exact attention over a sequence that is spread on an R x C grid of ranks (Elango, arXiv 2503.15758).

    forward                                          backward
    1 gather Q in the row, K and V in the column     1 gather Q, dO, LSE, delta in the row, K and V in the column
    2 attend the tile                                2 differentiate the tile
    3 return partial O, LSE in the row               3 return partial dQ in the row, dK and dV in the column
    4 merge by log-sum-exp                           4 sum

With x query heads per key head, a rank receives 2(C-1) + 2(R-1)/x shards of Q's size forward and 3(C-1) + 4(R-1)/x
backward, where a ring moves 2(P-1)/x and 4(P-1)/x. delta = rowsum(dO * O), a number per row, is gathered instead of O.

Kernels run while messages travel. A rank attends its own chunks to themselves, the diagonal of the score matrix, while
others' chunks arrive. Where partial results return to their owners, it keeps back the diagonal of half of its heads for
that time, if that is work enough for kernel calls of its own:

    messages   gather  >-----------------\\                 return  >-----------------\\
    kernels      diagonal of some heads   tile              diagonal of other heads   merge or sum

Heads are independent, so all of this may also run in groups of heads (`interleave`). The gathered buffers shrink by the
number of groups.

The peak of memory is made of buffers, so they live no longer than they must: gathered ones until the tile's kernels are
queued, results for others until they are sent. Gradients are allocated when those are gone. On GPUs the allocator hands
their memory out in the order of the stream, so nothing waits for it.

Legend: s tokens of the whole sequence, cp ranks, n = s / (2 cp) tokens of a chunk, b batch, h query heads, g key heads,
d head dim, dv the values' head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

import torch
from torch import Tensor

from megatron_attn2d.attention.call import Call, Results, prepare, run
from megatron_attn2d.attention.comm import MERGED, SUMMED, TileAxis, axes
from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.grid import Grid
from megatron_attn2d.attention.kernels.base import BackwardRows
from megatron_attn2d.attention.layout import LOWER
from megatron_attn2d.attention.merge import accumulation_dtype, row_statistics
from megatron_attn2d.attention.overlap import Heads, diagonal_heads
from megatron_attn2d.attention.packing import Totals
from megatron_attn2d.attention.partials import PartialGradients, Partials, merge_halves, sum_halves
from megatron_attn2d.attention.single_rank import SingleRank
from megatron_attn2d.attention.tile import (
    AttentionOp,
    Tile,
    attend,
    attend_diagonal,
    differentiate,
    differentiate_diagonal,
)
from megatron_attn2d.attention.ulysses import collect_heads, spread_heads
from megatron_attn2d.attention.warn import renamed_arguments


@torch.compiler.disable  # the messages cut it into pieces anyway; and buffers are merged in place
@renamed_arguments(head_groups="overlap_groups")
def attention2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    sink: Tensor | None = None,
    dropout: Dropout | None = None,
    cu_seqlens: Totals | None = None,
    cu_seqlens_padded: Totals | None = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    overlap_groups: int = 1,
    results: Results | None = None,
    label: str = "attention2d",
) -> Tensor:
    """Attention of the whole sequence, from and to shards in the zigzag layout.

    Args:
        q: [s/cp, b, h, d], bf16, fp16, fp32 or fp64, as the kernel allows: this rank's lower chunk, then its upper
            chunk (see `layout`).
        k: [s/cp, b, g, d], h a multiple of g; without mask and window s may be another than that of q.
        v: [s/cp, b, g, dv].
        grid: the ranks' grid; each rank passes its own view.
        causal: causal mask over the whole sequence, or none.
        window: how many tokens before it and after it a token sees, -1 or None for all; under `causal` it sees none
            after it.
        sink: [h], a score per head of this rank, of one more key with value 0 that every row sees.
        dropout: dropout of probabilities (`attention.dropout.Dropout`); its mask is the same in every layout of ranks.
        cu_seqlens: running totals [0, s1, s1 + s2, ...] of the lengths of packed sequences. q, k and v are then
            [t/cp, heads, d], by sequence: both chunks of the first, both of the second, ... (see `packing`). A tensor
            on a GPU is not read: its numbers are not checked, and chunks that hold nothing but padding travel too. Pass
            a new tensor for each batch, or change it by operations of torch. If a broadcast or the replay of a CUDA
            graph writes into a tensor that an earlier call was given, it goes unnoticed.
        cu_seqlens_padded: the same with padding, where sequences are padded to multiples of 2 * cp.
        max_seqlen: tokens of the longest sequence with its padding, or more; asked for where totals are on a GPU.
        softmax_scale: factor on the scores, a number; 1/sqrt(d) by default.
        backend: attention kernel, see `choose_kernel`.
        overlap_groups: in how many groups of heads communication and kernels overlap; must divide g. Where the grid
            spreads heads, a rank takes the largest divisor of it that divides the heads it is left with. Each group
            starts kernels and messages of its own. Over NVLink that costs more than it hides; over slow links the
            planner says what is best (`planner`).
        results: for activation recomputation: keeps the output and the log-sum-exp of a first call for a second call
            with the same arguments, which then computes neither.
        label: names the call, a layer say, in errors.

    Returns:
        [s/cp, b, h, dv], like q; [t/cp, h, dv] if packed, 0 where padding is.

    Raises:
        ValueError: shapes, dtypes or devices don't fit each other, or the backend can't serve them. In the first call
            on a grid it is raised on every rank if the ranks' arguments differ.
        ExchangeError: on CPU ranks, when a peer hangs beyond its group's timeout or is gone.
        RuntimeError: in the backward pass, when second derivatives are asked for.
    """
    if not isinstance(grid, Grid):
        raise ValueError(f"grid is a {type(grid).__name__}, no Grid: Grid.from_group(group, rows=R, cols=C) makes one")
    call, q, k, v = prepare(
        q,
        k,
        v,
        (grid.ulysses_group, grid.kv_group, grid.q_group),
        grid.rows * grid.cols,
        grid.ulysses_size,
        grid.calls,
        causal=causal,
        window=window,
        sink=sink,
        dropout=dropout,
        cu_seqlens=cu_seqlens,
        cu_seqlens_padded=cu_seqlens_padded,
        max_seqlen=max_seqlen,
        softmax_scale=softmax_scale,
        backend=backend,
        overlap_groups=overlap_groups,
        label=label,
    )
    if grid.ulysses_size > 1:
        q, k, v = spread_heads(q, k, v, grid, label, call.packing)
        first = grid.ulysses_rank * q.size(2)
        sink = None if sink is None else sink[first : first + q.size(2)]
        call = call.starting(first)
    if grid.rows * grid.cols == 1:
        out = run(SingleRank(call), q, k, v, sink, results)
    else:
        # A rank has fewer groups where the Ulysses axis leaves it fewer heads.
        out = run(GridSchedule.of(call, grid, gcd(overlap_groups, k.size(2))), q, k, v, sink, results)
    if grid.ulysses_size > 1:
        out = collect_heads(out, grid, label, call.packing)
    return out if call.packing is None else out.squeeze(1)


def _forward_group(
    schedule: GridSchedule, op: AttentionOp, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Iterator[None]:
    """The forward pass of a group of heads, from halves [2, n, b, heads, ...] into `out` and `lse` [2, b, h, n]."""
    # 1 gather Q in the row, K and V in the column
    gathered_q, gathered_kv = schedule.row.gather(q), schedule.column.gather(k, v)
    yield  # the group before computes meanwhile
    now, *later = schedule.diagonal_heads(q, k, returns=schedule.row.travels)
    diagonal = [_attend_diagonal(schedule, op, now, q, k, v)]
    # 2 attend the tile
    partial = attend(schedule.tile, op, *gathered_q.wait(), *gathered_kv.wait())
    # 3 return partial O, LSE in the row
    returned = schedule.row.return_partials([partial.outs, partial.lses], [out[LOWER], lse[LOWER]], MERGED)
    del partial
    diagonal += [_attend_diagonal(schedule, op, heads, q, k, v) for heads in later]
    yield  # the group after computes meanwhile
    # 4 merge by log-sum-exp
    returned.wait()
    for heads, own in diagonal:
        outs, lses = returned.with_diagonal(own.outs, own.lses, of=heads.of)
        merge_halves(outs, lses, heads.of(out), heads.of(lse))


def _backward_group(
    schedule: GridSchedule,
    gradients: _Gradients,
    i: int,
    op: AttentionOp,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    out: Tensor,
    statistics: Tensor,
) -> Iterator[None]:
    """The backward pass of group `i` of heads; `statistics` [2, 1 or 2, b, h, n] are log-sum-exps and maybe deltas."""
    # 1 gather Q, dO, LSE, delta in the row, K and V in the column
    known = () if schedule.row.travels else (out,)  # other ranks need no more of the output than delta
    gathered_q = schedule.row.gather(q, dout, *known, statistics=statistics)
    gathered_kv = schedule.column.gather(k, v)
    yield
    now, *later = schedule.diagonal_heads(q, k, returns=True)
    diagonal = [_differentiate_diagonal(schedule, op, now, q, k, v, dout, out, statistics)]
    # 2 differentiate the tile
    rows = BackwardRows.of(op.kernel, *gathered_q.wait())
    partial = differentiate(schedule.tile, op, rows, gathered_kv.wait())
    del rows
    # 3 return partial dQ in the row, dK and dV in the column
    returned_q = schedule.row.return_partials([partial.dq], [q[LOWER]], SUMMED)
    returned_kv = schedule.column.return_partials([partial.dk, partial.dv], [k[LOWER], v[LOWER]], SUMMED)
    del partial
    diagonal += [_differentiate_diagonal(schedule, op, heads, q, k, v, dout, out, statistics) for heads in later]
    yield
    # 4 sum
    returned_q.wait()
    returned_kv.wait()
    dq, dk, dv = gradients.of_group(i)
    for heads, own in diagonal:
        (dqs,) = returned_q.with_diagonal(own.dq, of=heads.of)
        dks, dvs = returned_kv.with_diagonal(own.dk, own.dv, of=heads.of_keys)
        sum_halves((dqs, heads.of(dq)), (dks, heads.of_keys(dk)), (dvs, heads.of_keys(dv)))


def interleave(groups: Iterable[Iterator[None]]) -> None:
    """Run groups of heads so that while one group computes, the messages of the next and the previous group travel.

    A group takes three steps: gather, compute, merge. The steps of groups 0, 1 and 2 run in this order:

        gather 0, gather 1, compute 0, gather 2, compute 1, merge 0, compute 2, merge 1, merge 2
    """
    gathered = computed = None
    for group in (*groups, None, None):
        for each in (group, gathered, computed):
            if each is not None:
                next(each, None)
        gathered, computed = group, gathered


@dataclass(frozen=True)
class GridSchedule:
    """The schedule of a grid of several ranks.

    Attributes:
        call: what is asked for.
        tile: the caller's tile.
        row, column: its axes.
        overlap_groups: into how many groups of heads the call is cut; it divides the number of key heads.
    """

    call: Call
    tile: Tile
    row: TileAxis
    column: TileAxis
    overlap_groups: int

    @classmethod
    def of(cls, call: Call, grid: Grid, overlap_groups: int) -> GridSchedule:
        """The schedule of the calling process."""
        plan, row, column = axes(grid, call.sequences.mask(call.band), call.label)
        tile = Tile(plan, call.sequences, call.band, grid.rank)
        tile.order_rows()
        return cls(call, tile, TileAxis(row, tile), TileAxis(column, tile), overlap_groups)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Schedule.forward`; the log-sum-exp comes by half of the rows, [2, b, h, n]."""
        out, lse = q.new_empty((*q.shape[:3], v.size(3))), self._row_statistic(q)
        groups = self._groups(*map(_halves, (q, k, v, out)), lse)
        interleave(_forward_group(self, *group) for group in groups)
        return self.tile.rows(_halves(out), self.row.travels), self.tile.own_statistics(lse, self.row.travels)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, want_delta: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `Schedule.backward`."""
        dout = dout.contiguous()
        statistics = lse.unsqueeze(1)
        if want_delta or self.row.travels or not self.call.op.kernel.needs_out:
            statistics = row_statistics(_halves(dout), _halves(out), lse)
        gradients = _Gradients(self, q, k, v)
        groups = self._groups(*map(_halves, (q, k, v, dout, out)), statistics)
        interleave(_backward_group(self, gradients, i, *group) for i, group in enumerate(groups))
        dq, dk, dv = gradients.in_sequence()
        return dq, dk, dv, statistics[:, 1] if want_delta else None

    def diagonal_heads(self, q: Tensor, k: Tensor, returns: bool) -> list[Heads]:
        """Which heads of q and k [2, n, b, heads, d] attend the diagonal before the tile, and which after it."""
        return diagonal_heads(q, k, self.tile.diagonal_squares, apart=returns and self.overlap_groups == 1)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The overlap groups of [..., heads, head dim] or [..., heads, n], as views."""
        return (x,) if self.overlap_groups == 1 else x.chunk(self.overlap_groups, -2)

    def _groups(self, q: Tensor, *others: Tensor) -> Iterator[tuple[Any, ...]]:
        """Per overlap group, its `AttentionOp` and its part of each tensor."""
        heads = q.size(3) // self.overlap_groups
        for i, parts in enumerate(zip(*map(self.split, (q, *others)), strict=True)):
            yield self.call.op.starting(i * heads), *parts

    def _row_statistic(self, q: Tensor) -> Tensor:
        """Room for a number per row, [2, b, h, n]. In memory chunks are outermost if rows travel, else heads are."""
        n, (b, h) = q.size(0) // 2, q.shape[1:3]
        dtype = accumulation_dtype(q.dtype)
        if self.row.travels:
            return q.new_empty((2, b, h, n), dtype=dtype)
        return q.new_empty((b, h, 2, n), dtype=dtype).permute(2, 0, 1, 3)


class _Gradients:
    """Gradients of q, k and v, allocated when the first group is summed: what it gathered is gone by then."""

    def __init__(self, schedule: GridSchedule, *inputs: Tensor) -> None:
        self._schedule, self._inputs = schedule, inputs

    def of_group(self, i: int) -> list[Tensor]:
        """The part of overlap group `i`, [2, n, b, heads, head dim]."""
        return [self._schedule.split(_halves(x))[i] for x in self._whole]

    def in_sequence(self) -> list[Tensor]:
        """All three, shaped like q, k and v, and contiguous whether these are or not."""
        row, column = self._schedule.row.travels, self._schedule.column.travels
        for i, travels in enumerate((row, column, column)):  # one after the other, as memory is short
            self._whole[i] = self._schedule.tile.rows(_halves(self._whole[i]), travels)
        return self._whole

    @cached_property
    def _whole(self) -> list[Tensor]:
        return [x.new_empty(x.shape) for x in self._inputs]


def _attend_diagonal(
    schedule: GridSchedule, op: AttentionOp, heads: Heads, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Heads, Partials]:
    """Attend the diagonal of some heads: the own chunks to themselves."""
    own = heads.of(q), heads.of_keys(k), heads.of_keys(v)
    return heads, attend_diagonal(schedule.tile, op.starting(heads.first), *own)


def _differentiate_diagonal(
    schedule: GridSchedule,
    op: AttentionOp,
    heads: Heads,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    out: Tensor,
    statistics: Tensor,
) -> tuple[Heads, PartialGradients]:
    rows = BackwardRows.of(op.kernel, *map(heads.of, (statistics, q, dout, out)))
    return heads, differentiate_diagonal(
        schedule.tile, op.starting(heads.first), rows, heads.of_keys(k), heads.of_keys(v)
    )


def _halves(shard: Tensor) -> Tensor:
    """[s/cp, ...] -> [2, n, ...], a view: its two chunks unless sequences are packed."""
    # A call makes 16 of them, and unflatten takes three times as long.
    return shard.view(2, shard.size(0) // 2, *shard.shape[1:])
