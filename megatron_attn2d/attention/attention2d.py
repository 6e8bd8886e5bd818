"""ATTENTION2D: exact attention over a sequence that is spread on an R x C grid of ranks (Elango, arXiv 2503.15758).

    forward                                          backward
    1 gather Q in the row, K and V in the column     1 gather Q, dO, LSE, delta in the row, K and V in the column
    2 attend the tile                                2 differentiate the tile
    3 return partial O, LSE in the row               3 return partial dQ in the row, dK and dV in the column
    4 merge by log-sum-exp                           4 sum

A rank receives 2(C-1) + 2(R-1)/g shards of Q's size forward and 3(C-1) + 4(R-1)/g backward (g query heads a key head),
where a ring moves 2(P-1)/g and 4(P-1)/g. delta = rowsum(dO * O), one number a row, is gathered instead of O.

Heads are independent, so they may be split in groups: while one group's tile is computed, the next one is gathered and
the previous one returned. The gathered buffers shrink by the number of groups.

Legend: s tokens of the whole sequence, cp ranks, n = s / (2 cp) tokens of a chunk, b batch, h query heads, g key heads,
d head dim, dv the values' head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd, sqrt
from typing import Any

import torch
from torch import Tensor

from megatron_attn2d.attention.checks import check_sink, mask_of, packed, request_of
from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.exchange import Axis, Pending, Returned, axes
from megatron_attn2d.attention.grid import Grid
from megatron_attn2d.attention.kernels import choose_kernel
from megatron_attn2d.attention.layout import LOWER, UPPER, TilePlan
from megatron_attn2d.attention.local import local_attention
from megatron_attn2d.attention.merge import (
    accumulation_dtype,
    apply_sink,
    merge_partials,
    row_statistics,
    sink_gradient,
    stand_in,
    sum_partials,
)
from megatron_attn2d.attention.overlap import automatic_head_groups
from megatron_attn2d.attention.pieces import PartialGradients, Partials, Slots, only, summed
from megatron_attn2d.attention.tile import (
    Queries,
    Scores,
    attend,
    attend_diagonal,
    differentiate,
    differentiate_diagonal,
)
from megatron_attn2d.attention.ulysses import check_heads, collect_heads, spread_heads


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
    cu_seqlens: Sequence[int] | None = None,
    cu_seqlens_padded: Sequence[int] | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    head_groups: int | None = None,
    label: str = "attention2d",
) -> Tensor:
    """Attention of the whole sequence, from and to shards in the zigzag layout.

    Args:
        q: [s/cp, b, h, d]: this rank's lower chunk, then its upper chunk (see `layout`).
        k: [s/cp, b, g, d], h a multiple of g; without mask and window s may be another than that of q.
        v: [s/cp, b, g, dv].
        grid: the ranks' grid; each rank passes its own view.
        causal: causal mask over the whole sequence, or none.
        window: how many tokens before and after it a token sees, -1 or None for all.
        sink: [h], for each of this rank's heads the score of one more key, of value 0, that every row sees.
        dropout: of probabilities, the same in every layout of ranks.
        cu_seqlens: running totals [0, s1, s1 + s2, ...] of the lengths of packed sequences. q, k and v are then
            [t/cp, heads, d], by sequence: both chunks of the first, of the second, ... (see `packing`).
        cu_seqlens_padded: the same with padding, where sequences are padded to multiples of 2 * cp.
        softmax_scale: factor on the scores; 1/sqrt(d) by default.
        backend: attention kernel, see `choose_kernel`.
        head_groups: in how many groups of heads communication and kernels overlap; must divide g. By default see
            `automatic_head_groups`.
        label: names the call, a layer say, in errors.

    Returns:
        [s/cp, b, h, dv], like q; [t/cp, h, dv] if packed, 0 where padding is.

    Raises:
        ValueError: for shapes, dtypes or devices that don't fit each other, or a backend that can't serve them.
        ExchangeError: on CPU ranks, when a peer hangs beyond its group's timeout or is gone.
    """
    packing = None
    if cu_seqlens is not None:
        packing = packed(cu_seqlens, cu_seqlens_padded, (q, k, v), grid.size)
        q, k, v = (packing.by_half(x, grid.size) for x in (q, k, v))
    mask = mask_of(q, k, v, causal, window, grid.rows * grid.cols, grid.heads, packing)
    if head_groups is not None and (head_groups < 1 or k.size(2) % head_groups):
        raise ValueError(f"head_groups={head_groups} does not divide the {k.size(2)} key/value heads of this rank")
    check_heads(q.size(2), k.size(2), grid.heads)
    check_sink(sink, q)
    kernel = choose_kernel(backend, request_of(q, v, mask, dropout))
    scale = 1.0 / sqrt(q.size(3)) if softmax_scale is None else softmax_scale
    if grid.heads > 1:
        q, k, v = spread_heads(q, k, v, grid, label)
        if packing is not None:
            q, k, v = (packing.over_heads(x, grid.size, grid.heads) for x in (q, k, v))
        first = grid.head_rank * q.size(2)
        sink = None if sink is None else sink[first : first + q.size(2)]
        dropout = None if dropout is None else dropout.starting(first)
    scores = Scores(kernel, scale, mask.ranks, dropout)
    if mask.ranks == 1 and packing is None:
        out = local_attention(q, k, v, sink, scores, mask.band)
    else:
        asked = automatic_head_groups(k, grid) if head_groups is None else head_groups
        groups = gcd(asked, k.size(2))  # fewer where the head axis leaves a rank fewer heads
        out = _Attention2D.apply(q, k, v, sink, _Plan(*axes(grid, mask, label), scores, grid.rank, groups))
    if grid.heads > 1:
        if packing is not None:
            out = packing.over_ranks(out, grid.size, grid.heads)
        out = collect_heads(out, grid, label)
    return out if packing is None else packing.by_sequence(out, grid.size)


@dataclass(frozen=True)
class _Plan:
    """All that stays the same over the head groups of a call."""

    tile: TilePlan
    row: Axis
    column: Axis
    scores: Scores
    own: int
    head_groups: int

    def scores_of(self, i: int, heads: int) -> Scores:
        """Those of head group i of `heads` heads."""
        if self.scores.dropout is None:
            return self.scores
        return replace(self.scores, dropout=self.scores.dropout.starting(i * heads))

    def split(self, x: Tensor, dim: int = 3) -> tuple[Tensor, ...]:
        """The head groups of chunks [2, n, b, heads, d] or the like, views."""
        return x.chunk(self.head_groups, dim)


class _Attention2D(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, plan: _Plan) -> Tensor:
        out, lse = _forward(q, k, v, plan)
        if sink is not None:
            apply_sink(out, lse, sink)
        ctx.save_for_backward(q, k, v, out, lse, sink)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sink = ctx.saved_tensors
        return (*_backward(grads[0], q, k, v, out, lse, sink, ctx.plan), None)


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """The output [s/cp, b, h, dv] and its log-sum-exp [2, b, h, n]."""
    queries, keys, values = (plan.split(_chunks(x)) for x in (q, k, v))
    out = q.new_empty((*q.shape[:3], v.size(3)))
    lse = q.new_empty((2, q.size(1), q.size(2), q.size(0) // 2), dtype=accumulation_dtype(q.dtype))
    outs, lses = _chunks(out).chunk(plan.head_groups, 3), lse.chunk(plan.head_groups, 2)

    def gather(i: int) -> _Gathered:
        return _Gathered(plan.row.gather([queries[i]], tag=0), plan.column.gather([keys[i], values[i]], tag=0))

    def compute(i: int, gathered: _Gathered) -> tuple[Partials, Partials, Returned]:
        scores = plan.scores_of(i, queries[i].size(3))
        # The diagonal needs nobody else's chunks: they arrive meanwhile.
        diagonal = attend_diagonal(plan.tile, scores, queries[i], keys[i], values[i], plan.own)
        (q_all,), (k_all, v_all) = gathered.wait()
        tile = attend(plan.tile, scores, q_all, k_all, v_all)
        if plan.row.group is not None:
            tile = tile.merged()
        like = [outs[i][LOWER], lses[i][LOWER]]
        return diagonal, tile, plan.row.give_back([only(tile.outs), only(tile.lses)], like, _merged, tag=1)

    def finish(i: int, results: tuple[Partials, Partials, Returned]) -> None:
        diagonal, tile, ((far_outs, far_lses), pending) = results
        pending.wait()
        _merge(
            _partials(plan.row, tile.outs, diagonal.outs, far_outs),
            _partials(plan.row, tile.lses, diagonal.lses, far_lses),
            outs[i].unbind(),
            lses[i].unbind(),
        )

    _pipeline(plan.head_groups, gather, compute, finish)
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sink: Tensor | None, plan: _Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sink, like them."""
    dout = dout.contiguous()
    queries, keys, values, douts, outs = (plan.split(_chunks(x)) for x in (q, k, v, dout, out))
    rows = row_statistics(_chunks(dout), _chunks(out), lse)
    statistics = plan.split(rows)
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    totals = [_chunks(x).chunk(plan.head_groups, 3) for x in gradients]

    def gather(i: int) -> _Gathered:
        shards = [queries[i], douts[i], statistics[i]]
        return _Gathered(plan.row.gather(shards, tag=0), plan.column.gather([keys[i], values[i]], tag=0))

    def compute(i: int, gathered: _Gathered) -> tuple[PartialGradients, PartialGradients, Returned, Returned]:
        lse_own, delta_own = statistics[i].unbind(1)
        own = Queries(queries[i], douts[i], lse_own, delta_own, outs[i])
        scores = plan.scores_of(i, queries[i].size(3))
        diagonal = differentiate_diagonal(plan.tile, scores, own, keys[i], values[i], plan.own)
        (q_all, dout_all, statistics_all), (k_all, v_all) = gathered.wait()
        needed = _queries(plan, q_all, dout_all, statistics_all, outs[i])
        tile = differentiate(plan.tile, scores, needed, k_all, v_all)
        dq, dk, dv = tile.dq, tile.dk, tile.dv
        if plan.row.group is not None:
            dq = summed(dq)
        if plan.column.group is not None:
            dk, dv = summed(dk), summed(dv)
        return (
            diagonal,
            PartialGradients(dq, dk, dv),
            plan.row.give_back([only(dq)], [queries[i][LOWER]], _summed, tag=1),
            plan.column.give_back([only(dk), only(dv)], [keys[i][LOWER], values[i][LOWER]], _summed, tag=1),
        )

    def finish(i: int, results: tuple[PartialGradients, PartialGradients, Returned, Returned]) -> None:
        diagonal, tile, ((far_dq,), row_pending), ((far_dk, far_dv), column_pending) = results
        row_pending.wait()
        column_pending.wait()
        dq, dk, dv = (total[i].unbind() for total in totals)
        _sum(_partials(plan.row, tile.dq, diagonal.dq, far_dq), dq)
        dk_parts = _partials(plan.column, tile.dk, diagonal.dk, far_dk)
        dv_parts = _partials(plan.column, tile.dv, diagonal.dv, far_dv)
        if dk[0].shape == dv[0].shape:  # one launch
            _sum([*dk_parts, *dv_parts], [*dk, *dv])
        else:
            _sum(dk_parts, dk)
            _sum(dv_parts, dv)

    _pipeline(plan.head_groups, gather, compute, finish)
    return (*gradients, None if sink is None else sink_gradient(lse, rows[:, 1], sink))


def _queries(plan: _Plan, q: Tensor, dout: Tensor, statistics: Tensor, own_out: Tensor) -> Queries:
    """The gathered queries; kernels that want an output get the true one where it is at hand, else a stand-in."""
    lse, delta = statistics.unbind(1)
    out: Tensor | None = None
    if plan.scores.kernel.needs_out and plan.row.group is None:
        (out,), _ = plan.row.gather([own_out], tag=0)
    elif plan.scores.kernel.needs_out:
        out = stand_in(dout, delta)
    return Queries(q, dout, lse, delta, out)


def _pipeline[Gathered, Results](
    count: int,
    gather: Callable[[int], Gathered],
    compute: Callable[[int, Gathered], Results],
    finish: Callable[[int, Results], None],
) -> None:
    """Run `count` head groups so that messages of the next and of the previous one fly while one computes.

    `gather` starts messages, `compute` waits for them, runs kernels and starts to return results, `finish` waits for
    those and merges.
    """
    ahead = gather(0)
    results: Results | None = None
    for i in range(count):
        gathered = ahead
        if i + 1 < count:
            ahead = gather(i + 1)
        previous, results = results, compute(i, gathered)
        if previous is not None:
            finish(i - 1, previous)
    assert results is not None
    finish(count - 1, results)


class _Gathered:
    """Messages of both axes in flight and the buffers they fill."""

    def __init__(self, row: tuple[list[Tensor], Pending], column: tuple[list[Tensor], Pending]) -> None:
        self._row, self._column = row, column

    def wait(self) -> tuple[list[Tensor], list[Tensor]]:
        for _, pending in (self._row, self._column):
            pending.wait()
        return self._row[0], self._column[0]


def _merged(kinds: list[list[Tensor]]) -> list[Tensor]:
    """Partial outputs and log-sum-exps of one chunk from several ranks of a node, as one of each."""
    outs, lses = kinds
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    merge_partials([outs], [lses], [out], [lse])
    return [out, lse]


def _summed(kinds: list[list[Tensor]]) -> list[Tensor]:
    """Partial gradients of one chunk from several ranks of a node, as one of each kind."""
    totals = [torch.empty_like(partials[0]) for partials in kinds]
    for partials, total in zip(kinds, totals, strict=True):
        sum_partials([partials], [total])
    return totals


def _merge(
    outs: Sequence[list[Tensor]], lses: Sequence[list[Tensor]], out: Sequence[Tensor], lse: Sequence[Tensor]
) -> None:
    used = [half for half in (LOWER, UPPER) if outs[half]]
    if used:
        merge_partials(_pick(used, outs), _pick(used, lses), _pick(used, out), _pick(used, lse))
    for half in {LOWER, UPPER} - set(used):  # all padding
        out[half].zero_()
        lse[half].fill_(-torch.inf)


def _sum(partials: Sequence[list[Tensor]], totals: Sequence[Tensor]) -> None:
    used = [i for i, parts in enumerate(partials) if parts]
    if used:
        sum_partials(_pick(used, partials), _pick(used, totals))
    for i in set(range(len(totals))) - set(used):  # a chunk that no tile used
        totals[i].zero_()


def _pick[T](places: list[int], items: Sequence[T]) -> list[T]:
    return [items[i] for i in places]


def _partials(axis: Axis, slots: Slots, own: Slots, far: list[list[Tensor]]) -> Slots:
    """By half, all partial results of the own chunk: of its slot in the own tile, of its diagonal, of others' tiles."""
    found = []
    for half in (LOWER, UPPER):
        slot = axis.own_slot(half)
        near = [] if slot is None else slots[slot]
        found.append([*near, *(own[half] if own else []), *far[half]])
    return found


def _chunks(shard: Tensor) -> Tensor:
    """[s/cp, ...] -> [2, n, ...], a view."""
    return shard.unflatten(0, (2, -1))
