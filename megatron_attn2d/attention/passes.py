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

from megatron_attn2d.attention.axis import Axis, Combine, Returned
from megatron_attn2d.attention.layout import LOWER, UPPER
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
from megatron_attn2d.attention.tile import Queries, Scores, Tile, attend, attend_own, differentiate, differentiate_own

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
        head_groups: into how many groups of heads the call is cut; divides the key heads.
    """

    tile: Tile
    row: Axis
    column: Axis
    scores: Scores
    head_groups: int

    @property
    def queries_travel(self) -> bool:
        """Whether others' queries come here and ours go to others."""
        return self.row.group is not None

    @property
    def keys_travel(self) -> bool:
        """The same of keys and values."""
        return self.column.group is not None

    def scores_of(self, i: int, heads: int) -> Scores:
        """Those of head group i of `heads` heads."""
        return self.scores.starting(i * heads)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The head groups of chunks [2, n, b, heads, d] or the like, views."""
        return (x,) if self.head_groups == 1 else x.chunk(self.head_groups, -2)

    def of_queries(self, halves: list[Tensor]) -> list[Tensor]:
        """Queries or the like, from halves of the shard as it is, as they travel: the two chunks [2, n, b, h, d]."""
        return self._of(halves, self.queries_travel)

    def of_keys(self, halves: list[Tensor]) -> list[Tensor]:
        """The same of keys and values."""
        return self._of(halves, self.keys_travel)

    def _of(self, halves: list[Tensor], travel: bool) -> list[Tensor]:
        if not travel or self.tile.packing.one:
            return halves
        return [self.tile.chunks(x.flatten(0, 1), 2, travel) for x in halves]

    def own_heads(self, q: Tensor, k: Tensor, returns: bool) -> list[Heads]:
        """Which heads of q and k [2, n, b, heads, d] attend their own chunks before the tile, and which after it."""
        return own_heads(q, k, self.tile.own_squares, apart=returns and self.head_groups == 1)


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The output [s/cp, b, h, dv] and its log-sum-exp, of the two halves of its rows, [2, b, h, n]."""
    tile = plan.tile
    queries, keys, values = (plan.split(_halves(x)) for x in (q, k, v))
    out = q.new_empty((*q.shape[:3], v.size(3)))
    lse = _statistic(q, by_chunk=plan.queries_travel)
    outs, lses = plan.split(_halves(out)), plan.split(lse)

    def gather(i: int) -> _Gathered:
        rows, columns = plan.of_queries([queries[i]]), plan.of_keys([keys[i], values[i]])
        return _Gathered(plan.row.gather(rows, tag=0), plan.column.gather(columns, tag=0))

    def attend_tile(scores: Scores, gathered: _Gathered) -> Partials:
        rows, columns = gathered.wait()
        in_order = *tile.in_order(rows, plan.queries_travel), *tile.in_order(columns, plan.keys_travel)
        found = attend(tile, scores, *in_order)
        return found.merged() if plan.queries_travel else found

    def compute(i: int, gathered: _Gathered) -> tuple[_Own[Partials], _Near, Returned]:
        scores = plan.scores_of(i, queries[i].size(3))

        def own(heads: Heads) -> tuple[Heads, Partials]:
            mine = heads.of(queries[i]), heads.of_keys(keys[i]), heads.of_keys(values[i])
            return heads, attend_own(tile, scores.starting(heads.first), *mine)

        now, *later = plan.own_heads(queries[i], keys[i], returns=plan.queries_travel)
        found = [own(now)]
        partials = attend_tile(scores, gathered)
        like = [outs[i][LOWER], lses[i][LOWER]]
        returned = _give_back(plan.row, [partials.outs, partials.lses], like, _MERGED)
        near = [_near(plan.row, slots) for slots in (partials.outs, partials.lses)]
        del partials
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
    return tile.rows(_halves(out), plan.queries_travel), tile.own_statistics(lse, plan.queries_travel)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sink: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sink, like them."""
    tile, travel = plan.tile, (plan.queries_travel, plan.keys_travel, plan.keys_travel)
    dout = dout.contiguous()
    rows = lse.unsqueeze(1)  # [2, 1 or 2, b, h, n]: log-sum-exp, and delta if somebody needs it
    if sink is not None or plan.queries_travel or not plan.scores.kernel.needs_out:
        rows = row_statistics(_halves(dout), _halves(out), lse)
    queries, keys, values, douts, outs = (plan.split(_halves(x)) for x in (q, k, v, dout, out))
    statistics = plan.split(rows)
    gradients: list[Tensor] = []

    def gather(i: int) -> _Gathered:
        of_rows = [*plan.of_queries([queries[i], douts[i]]), tile.statistics_to_send(statistics[i], travel[0])]
        of_columns = plan.of_keys([keys[i], values[i]])
        return _Gathered(plan.row.gather(of_rows, tag=0), plan.column.gather(of_columns, tag=0))

    def differentiate_tile(i: int, scores: Scores, gathered: _Gathered) -> PartialGradients:
        (*of_queries, numbers), columns = gathered.wait()
        if not plan.queries_travel:
            of_queries += plan.row.gather([outs[i]], tag=0)[0]
        q_all, dout_all, *out_all = tile.in_order(of_queries, plan.queries_travel)
        needed = _queries(plan, q_all, dout_all, tile.statistics_in_order(numbers), *out_all)
        del q_all, dout_all, out_all
        found = differentiate(tile, scores, needed, tile.in_order(columns, plan.keys_travel))
        dq, dk, dv = (
            summed(slots) if travels else slots
            for slots, travels in zip((found.dq, found.dk, found.dv), travel, strict=True)
        )
        return PartialGradients(dq, dk, dv)

    def compute(i: int, gathered: _Gathered) -> tuple[_Own[PartialGradients], _Near, Returned, Returned]:
        scores = plan.scores_of(i, queries[i].size(3))

        def own(heads: Heads) -> tuple[Heads, PartialGradients]:
            mine = _queries(plan, *map(heads.of, (queries[i], douts[i], statistics[i], outs[i])))
            k_own, v_own = heads.of_keys(keys[i]), heads.of_keys(values[i])
            return heads, differentiate_own(tile, scores.starting(heads.first), mine, k_own, v_own)

        now, *later = plan.own_heads(queries[i], keys[i], returns=True)
        found = [own(now)]
        partials = differentiate_tile(i, scores, gathered)
        returned = (
            _give_back(plan.row, [partials.dq], [queries[i][LOWER]], _SUMMED),
            _give_back(plan.column, [partials.dk, partials.dv], [keys[i][LOWER], values[i][LOWER]], _SUMMED),
        )
        near = [_near(plan.row, partials.dq), _near(plan.column, partials.dk), _near(plan.column, partials.dv)]
        del partials
        return found + [own(heads) for heads in later], near, *returned

    def finish(i: int, results: tuple[_Own[PartialGradients], _Near, Returned, Returned]) -> None:
        own, (near_dq, near_dk, near_dv), ((far_dq,), row_pending), ((far_dk, far_dv), column_pending) = results
        row_pending.wait()
        column_pending.wait()
        if not gradients:  # contiguous, whatever q, k, v are
            gradients.extend(x.new_empty(x.shape) for x in (q, k, v))
        totals = [plan.split(_halves(x))[i] for x in gradients]
        for heads, mine in own:
            dq, dk, dv = (of(total).unbind() for of, total in zip(heads.of_each, totals, strict=True))
            _sum(
                (_partials(near_dq, mine.dq, far_dq, heads.of), dq),
                (_partials(near_dk, mine.dk, far_dk, heads.of_keys), dk),
                (_partials(near_dv, mine.dv, far_dv, heads.of_keys), dv),
            )

    _pipeline(plan.head_groups, gather, compute, finish)
    for i, travels in enumerate(travel):
        gradients[i] = tile.rows(_halves(gradients[i]), travels)
    dq, dk, dv = gradients
    return dq, dk, dv, None if sink is None else sink_gradient(lse, rows[:, 1], sink)


def _queries(plan: Plan, q: Tensor, dout: Tensor, statistics: Tensor, out: Tensor | None = None) -> Queries:
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


def _merged(kinds: list[list[Tensor]]) -> list[Tensor]:
    """Partial outputs [chunks, n, b, h, d] and log-sum-exps [chunks, b, h, n], or stacks of such, as one of each."""
    outs, lses = kinds
    out, lse = outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)
    for i in range(out.size(2)):  # a launch for all chunks of a sequence: they take the place of the batch
        merge_partials(
            [[_of_sequence(x, i) for x in outs]],
            [[x.select(-3, i) for x in lses]],
            [_of_sequence(out, i)],
            [lse.select(-3, i)],
        )
    return [out, lse]


def _summed(kinds: list[list[Tensor]]) -> list[Tensor]:
    """Partial gradients [chunks, n, b, heads, d], or stacks of such, as one of each kind."""
    totals = [partials[0].new_empty(partials[0].shape) for partials in kinds]
    for partials, total in zip(kinds, totals, strict=True):
        for i in range(total.size(2)):
            sum_partials([[_of_sequence(x, i) for x in partials]], [_of_sequence(total, i)])
    return totals


def _of_sequence(chunks: Tensor, i: int) -> Tensor:
    """[..., chunks, n, b, heads, d] -> [..., n, chunks, heads, d] of sequence i of the batch, a view."""
    return chunks.select(-3, i).transpose(-4, -3)


_MERGED, _SUMMED = Combine(_merged, (0.0, -torch.inf)), Combine(_summed, (0.0, 0.0))  # of dq, or of dk and dv


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


def _give_back(axis: Axis, kinds: list[Slots], like: list[Tensor], combine: Combine) -> Returned:
    """Return results of each kind to where their chunks came from, if they came from others."""
    if axis.group is None:
        return [[[], []] for _ in kinds], Pending()
    return axis.give_back([only(slots) for slots in kinds], like, combine, tag=1)


def _near(axis: Axis, slots: Slots) -> Slots:
    """By half, what the own tile found for the caller's own chunks."""
    if axis.group is None:
        return slots
    places = [axis.own_slot(half) for half in (LOWER, UPPER)]
    return [[] if slot is None else slots[slot] for slot in places]


def _partials(near: Slots, own: Slots, far: list[list[Tensor]], heads: Callable[[Tensor], Tensor]) -> Slots:
    """By half, some heads of all partial results of the own chunk: of the own tile and of others' tiles.

    `own`, of those heads already, are those that the own chunks have of themselves.
    """
    return [[*map(heads, near[half]), *own[half], *map(heads, far[half])] for half in (LOWER, UPPER)]


def _statistic(q: Tensor, by_chunk: bool) -> Tensor:
    """Room for a number per row, [2, b, h, n]: those of a chunk lie together if they travel, else those of a head."""
    n, (b, h) = q.size(0) // 2, q.shape[1:3]
    dtype = accumulation_dtype(q.dtype)
    if by_chunk:
        return q.new_empty((2, b, h, n), dtype=dtype)
    return q.new_empty((b, h, 2, n), dtype=dtype).permute(2, 0, 1, 3)


def _halves(shard: Tensor) -> Tensor:
    """[s/cp, ...] -> [2, n, ...], a view: its two chunks unless sequences are packed."""
    # A call makes 16 of them, and unflatten takes three times as long.
    return shard.view(2, shard.size(0) // 2, *shard.shape[1:])
