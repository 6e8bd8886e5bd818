"""Forward and backward pass on a grid: messages and kernels in the order in which they hide each other.

    gather  >--------------\\                  return  >--------------\\
    kernels   own, some heads   tile             own, other heads   merge, sum

A rank attends its own chunks, which need nobody else's, while others' arrive. Where partial results return to their
owners it keeps back half of its heads for that time, if they are work enough for kernel calls of their own.

Buffers live no longer than they must, as the peak of memory is made of them: gathered ones until the tile's kernels are
queued, results for others until they are sent, and gradients are made when those are gone. On GPUs the allocator hands
their memory out in the order of the stream, so nothing waits for it.

Heads are independent, so all of this may run in groups of them: while one group's tile is computed, the next one is
gathered and the previous one returned. The gathered buffers shrink by the number of groups.

Legend as in `attention2d`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_attn2d.attention.exchange import Axis, Returned
from megatron_attn2d.attention.layout import LOWER, UPPER, TilePlan
from megatron_attn2d.attention.merge import (
    accumulation_dtype,
    merge_partials,
    row_statistics,
    sink_gradient,
    stand_in,
    sum_partials,
)
from megatron_attn2d.attention.messages import Pending
from megatron_attn2d.attention.overlap import Heads, own_heads
from megatron_attn2d.attention.pieces import PartialGradients, Partials, Slots, only, summed
from megatron_attn2d.attention.tile import Queries, Scores, attend, attend_own, differentiate, differentiate_own

type _Own[Results] = list[tuple[Heads, Results]]
"""What a rank's own chunks have of themselves, by heads."""

type _Near = list[Slots]
"""Of each kind of result what the own tile found for the own chunks, by half; the rest is sent and gone."""


@dataclass(frozen=True)
class Plan:
    """All that stays the same over the head groups of a call.

    Attributes:
        tile: the caller's tile.
        row, column: its axes.
        scores: how scores become probabilities.
        own: the caller's rank in the layout.
        head_groups: into how many groups of heads the call is cut; divides the key heads.
    """

    tile: TilePlan
    row: Axis
    column: Axis
    scores: Scores
    own: int
    head_groups: int

    def scores_of(self, i: int, heads: int) -> Scores:
        """Those of head group i of `heads` heads."""
        return self.scores.starting(i * heads)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The head groups of chunks [2, n, b, heads, d] or the like, views."""
        return (x,) if self.head_groups == 1 else x.chunk(self.head_groups, -2)

    def own_heads(self, q: Tensor, k: Tensor, returns: bool) -> list[Heads]:
        """Which heads of q and k [2, n, b, heads, d] attend their own chunks before the tile, and which after it."""
        return own_heads(q, k, self.tile.own_squares, apart=returns and self.head_groups == 1)


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The output [s/cp, b, h, dv] and its log-sum-exp [2, b, h, n]."""
    queries, keys, values = (plan.split(_chunks(x)) for x in (q, k, v))
    out = q.new_empty((*q.shape[:3], v.size(3)))
    lse = _statistic(q, by_chunk=plan.row.group is not None)
    outs, lses = plan.split(_chunks(out)), plan.split(lse)

    def gather(i: int) -> _Gathered:
        return _Gathered(plan.row.gather([queries[i]], tag=0), plan.column.gather([keys[i], values[i]], tag=0))

    def attend_tile(scores: Scores, gathered: _Gathered) -> Partials:
        (q_all,), (k_all, v_all) = gathered.wait()
        tile = attend(plan.tile, scores, q_all, k_all, v_all)
        return tile if plan.row.group is None else tile.merged()

    def compute(i: int, gathered: _Gathered) -> tuple[_Own[Partials], _Near, Returned]:
        scores = plan.scores_of(i, queries[i].size(3))

        def own(heads: Heads) -> tuple[Heads, Partials]:
            mine = heads.of(queries[i]), heads.of_keys(keys[i]), heads.of_keys(values[i])
            return heads, attend_own(plan.tile, scores.starting(heads.first), *mine, plan.own)

        now, *later = plan.own_heads(queries[i], keys[i], returns=plan.row.group is not None)
        found = [own(now)]
        tile = attend_tile(scores, gathered)
        like = [outs[i][LOWER], lses[i][LOWER]]
        returned = plan.row.give_back([only(tile.outs), only(tile.lses)], like, _merged, tag=1)
        near = [_near(plan.row, slots) for slots in (tile.outs, tile.lses)]
        del tile
        return found + [own(heads) for heads in later], near, returned

    def finish(i: int, results: tuple[_Own[Partials], _Near, Returned]) -> None:
        own, (near_outs, near_lses), ((far_outs, far_lses), pending) = results
        pending.wait()
        for heads, mine in own:
            _merge(
                _partials(near_outs, mine.outs, far_outs, heads.of),
                _partials(near_lses, mine.lses, far_lses, heads.of),
                heads.of(outs[i]).unbind(),
                heads.of(lses[i]).unbind(),
            )

    _pipeline(plan.head_groups, gather, compute, finish)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sink: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sink, like them."""
    dout = dout.contiguous()
    queries, keys, values, douts, outs = (plan.split(_chunks(x)) for x in (q, k, v, dout, out))
    rows = lse.unsqueeze(1)  # [2, 1 or 2, b, h, n]: log-sum-exp, and delta if somebody needs it
    if sink is not None or plan.row.group is not None or not plan.scores.kernel.needs_out:
        rows = row_statistics(_chunks(dout), _chunks(out), lse)
    statistics = plan.split(rows)
    gradients: list[Tensor] = []

    def gather(i: int) -> _Gathered:
        shards = [queries[i], douts[i], statistics[i]]
        return _Gathered(plan.row.gather(shards, tag=0), plan.column.gather([keys[i], values[i]], tag=0))

    def differentiate_tile(i: int, scores: Scores, gathered: _Gathered) -> PartialGradients:
        (q_all, dout_all, statistics_all), (k_all, v_all) = gathered.wait()
        out_all = None if plan.row.group is not None else plan.row.gather([outs[i]], tag=0)[0][0]
        needed = _queries(plan, q_all, dout_all, statistics_all, out_all)
        tile = differentiate(plan.tile, scores, needed, k_all, v_all)
        dq, dk, dv = tile.dq, tile.dk, tile.dv
        if plan.row.group is not None:
            dq = summed(dq)
        if plan.column.group is not None:
            dk, dv = summed(dk), summed(dv)
        return PartialGradients(dq, dk, dv)

    def compute(i: int, gathered: _Gathered) -> tuple[_Own[PartialGradients], _Near, Returned, Returned]:
        scores = plan.scores_of(i, queries[i].size(3))

        def own(heads: Heads) -> tuple[Heads, PartialGradients]:
            q_own, dout_own, rows_own, out_own = map(heads.of, (queries[i], douts[i], statistics[i], outs[i]))
            mine = _queries(plan, q_own, dout_own, rows_own, out_own)
            k_own, v_own = heads.of_keys(keys[i]), heads.of_keys(values[i])
            return heads, differentiate_own(plan.tile, scores.starting(heads.first), mine, k_own, v_own, plan.own)

        now, *later = plan.own_heads(queries[i], keys[i], returns=True)
        found = [own(now)]
        tile = differentiate_tile(i, scores, gathered)
        returned = (
            plan.row.give_back([only(tile.dq)], [queries[i][LOWER]], _summed, tag=1),
            plan.column.give_back([only(tile.dk), only(tile.dv)], [keys[i][LOWER], values[i][LOWER]], _summed, tag=1),
        )
        near = [_near(plan.row, tile.dq), _near(plan.column, tile.dk), _near(plan.column, tile.dv)]
        del tile
        return found + [own(heads) for heads in later], near, *returned

    def finish(i: int, results: tuple[_Own[PartialGradients], _Near, Returned, Returned]) -> None:
        own, (near_dq, near_dk, near_dv), ((far_dq,), row_pending), ((far_dk, far_dv), column_pending) = results
        row_pending.wait()
        column_pending.wait()
        if not gradients:  # contiguous, whatever q, k, v are
            gradients.extend(x.new_empty(x.shape) for x in (q, k, v))
        totals = [plan.split(_chunks(x))[i] for x in gradients]
        for heads, mine in own:
            dq, dk, dv = (of(total).unbind() for of, total in zip(heads.of_each, totals, strict=True))
            _sum(
                (_partials(near_dq, mine.dq, far_dq, heads.of), dq),
                (_partials(near_dk, mine.dk, far_dk, heads.of_keys), dk),
                (_partials(near_dv, mine.dv, far_dv, heads.of_keys), dv),
            )

    _pipeline(plan.head_groups, gather, compute, finish)
    dq, dk, dv = gradients
    return dq, dk, dv, None if sink is None else sink_gradient(lse, rows[:, 1], sink)


def _queries(plan: Plan, q: Tensor, dout: Tensor, statistics: Tensor, out: Tensor | None) -> Queries:
    """Queries with what the kernel asks for: delta or an output, a stand-in where the true one is not at hand."""
    lse, *delta = statistics.unbind(1)
    if not plan.scores.kernel.needs_out:
        return Queries(q, dout, lse, delta[0], None)
    return Queries(q, dout, lse, None, stand_in(dout, delta[0]) if out is None else out)


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
        """The buffers, once; the caller alone holds them then, so that their memory is free when it drops them."""
        (row, of_row), (column, of_column) = self._row, self._column
        of_row.wait()
        of_column.wait()
        self._row, self._column = ([], of_row), ([], of_column)
        return row, column


def _merged(kinds: list[list[list[Tensor]]]) -> list[list[Tensor]]:
    """Partial outputs and log-sum-exps of chunks from several ranks of a node, as one of each."""
    outs, lses = kinds
    merged = [_room(outs), _room(lses)]
    merge_partials(outs, lses, *merged)
    return merged


def _summed(kinds: list[list[list[Tensor]]]) -> list[list[Tensor]]:
    """Partial gradients of chunks from several ranks of a node, as one of each kind."""
    totals = [_room(kind) for kind in kinds]
    for kind, total in zip(kinds, totals, strict=True):
        sum_partials(kind, total)
    return totals


def _room(chunks: list[list[Tensor]]) -> list[Tensor]:
    """A tensor for each chunk, like its partial results."""
    like = chunks[0][0]
    return list(like.new_empty((len(chunks), *like.shape)).unbind())


def _merge(
    outs: Sequence[list[Tensor]], lses: Sequence[list[Tensor]], out: Sequence[Tensor], lse: Sequence[Tensor]
) -> None:
    used = [half for half in (LOWER, UPPER) if outs[half]]
    if used:
        merge_partials(_pick(used, outs), _pick(used, lses), _pick(used, out), _pick(used, lse))
    for half in {LOWER, UPPER} - set(used):  # all padding
        out[half].zero_()
        lse[half].fill_(-torch.inf)


def _sum(*kinds: tuple[Sequence[list[Tensor]], Sequence[Tensor]]) -> None:
    """Sum partial gradients of each kind by half into their totals; a launch for all that have one shape."""
    launches: dict[torch.Size, tuple[list[list[Tensor]], list[Tensor]]] = {}
    for partials, totals in kinds:
        for parts, total in zip(partials, totals, strict=True):
            if not parts:  # a chunk that no tile used
                total.zero_()
                continue
            together = launches.setdefault(total.shape, ([], []))
            together[0].append(parts)
            together[1].append(total)
    for found, totals in launches.values():
        sum_partials(found, totals)


def _pick[T](places: list[int], items: Sequence[T]) -> list[T]:
    return [items[i] for i in places]


def _near(axis: Axis, slots: Slots) -> Slots:
    """By half, what the own tile found for the caller's own chunks."""
    places = [axis.own_slot(half) for half in (LOWER, UPPER)]
    return [[] if slot is None else slots[slot] for slot in places]


def _partials(near: Slots, own: Slots, far: list[list[Tensor]], heads: Callable[[Tensor], Tensor]) -> Slots:
    """By half, some heads of all partial results of the own chunk: of the own tile and of others' tiles.

    `own`, of those heads already, are those that the own chunks have of themselves.
    """
    return [[*map(heads, near[half]), *(own[half] if own else []), *map(heads, far[half])] for half in (LOWER, UPPER)]


def _statistic(q: Tensor, by_chunk: bool) -> Tensor:
    """Room for a number a row, [2, b, h, n]: a chunk's lie together if they travel, else a head's, as kernels want."""
    n, (b, h) = q.size(0) // 2, q.shape[1:3]
    dtype = accumulation_dtype(q.dtype)
    if by_chunk:
        return q.new_empty((2, b, h, n), dtype=dtype)
    return q.new_empty((b, h, 2, n), dtype=dtype).permute(2, 0, 1, 3)


def _chunks(shard: Tensor) -> Tensor:
    """[s/cp, ...] -> [2, n, ...], a view."""
    return shard.unflatten(0, (2, -1))
