"""One tile of the score matrix on one device: run its plan's kernel calls forward and backward.

One dense sequence takes a kernel call per rectangle of its plan. Packed sequences, padding and windows take one per
table of segments (`tables`), however many sequences there are.

Legend: n tokens of a chunk, b batch, h query heads, g key heads, d head dim, Q and K slots of the plan. Chunks are
[slots, n, b, heads, d]. Log-sum-exps and deltas are kept by chunk, [slots, b, h, n], so that the part of a chunk is
contiguous. Where calls take tables, all rows come as one slot, by sequence (`Tile.in_order`).

`travel` says whether chunks travel on the axis in question. Where they do not, they are the halves of the rank's shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.kernels.base import BackwardRows, Kernel, Softmax
from megatron_attn2d.attention.layout import CAUSAL, FULL, LOWER, UPPER, Band, Chunk, TilePlan
from megatron_attn2d.attention.merge import merge_partials, sum_partials
from megatron_attn2d.attention.packing import Packing
from megatron_attn2d.attention.partials import (
    KeyGradients,
    PartialGradients,
    Partials,
    Slots,
    add_results,
    no_results,
    one_per_slot,
)
from megatron_attn2d.attention.segmented import FEW_CALLS, Positions, attend_tables, differentiate_tables
from megatron_attn2d.attention.tables import KeyGroup, TileTables, diagonal_tables, tile_tables


@dataclass(frozen=True)
class Tile:
    """What a rank attends, and the order of its rows.

    Attributes:
        plan: the tile's chunks.
        packing: the sequences that the chunks are cut from.
        band: who sees whom within each sequence.
        rank: the caller, whose own chunks attend the diagonal besides.
    """

    plan: TilePlan
    packing: Packing
    band: Band
    rank: int

    @property
    def tables(self) -> TileTables | None:
        """The tile's calls; None where the plan's rectangles of one sequence serve."""
        return self._all_tables[0]

    @property
    def diagonal_tables(self) -> TileTables | None:
        """The calls of the diagonal; None where squares of one sequence serve."""
        return self._all_tables[1]

    @cached_property
    def _all_tables(self) -> tuple[TileTables | None, TileTables | None]:
        """Both are made before the first is used, so that one copy brings them to the device."""
        plan, packing, band = self.plan, self.packing, self.band
        if packing.plain:
            return None if band in (FULL, CAUSAL) else tile_tables(plan, packing, band, share_keys=True), None
        return tile_tables(plan, packing, band, share_keys=True), diagonal_tables(plan, packing, self.rank, band)

    def order_rows(self) -> None:
        """Make at once the orders of rows that chunks are brought to and from where they travel."""
        plan = self.plan
        travelling = [
            chunks for chunks, travel in ((plan.queries, plan.queries_travel), (plan.keys, plan.keys_travel)) if travel
        ]
        if travelling and not self.packing.one:
            self.packing.order_rows(2, *map(len, travelling))

    @property
    def diagonal_squares(self) -> float:
        """Work of the diagonal, in squares of chunk x chunk."""
        return self.plan.diagonal_squares * self.packing.diagonal_share(self.band)

    def chunks(self, rows: Tensor, slots: int, travel: bool, first: int | None = None) -> Tensor:
        """The `first` of `slots` chunks, all by default, from rows in order: [slots * n, ...] -> [first, n, ...]."""
        if travel:
            return self.packing.by_slot(rows, slots, first)
        return rows.unflatten(0, (slots, -1))

    def rows(self, chunks: Tensor, travel: bool) -> Tensor:
        """The way back of all chunks: [slots, n, ...] -> [slots * n, ...]."""
        return self.packing.by_sequence(chunks) if travel else chunks.flatten(0, 1)

    def statistics_of_rows(self, rows: Tensor, slots: int, travel: bool) -> Tensor:
        """Numbers per row by chunk: [..., slots * n] -> [slots, ..., n], contiguous where they travel."""
        if travel:
            return self.packing.statistics_by_slot(rows, slots).contiguous()
        return rows.unflatten(-1, (slots, -1)).movedim(-2, 0)

    def statistics_of_chunks(self, chunks: Tensor, travel: bool) -> Tensor:
        """The way back."""
        return self.packing.statistics_by_sequence(chunks) if travel else _in_a_row(chunks)

    def statistics_to_send(self, halves: Tensor, travel: bool) -> Tensor:
        """Numbers per row as they travel, by chunk, from halves of the shard: both are [2, ..., n]."""
        if not travel or self.packing.one:
            return halves
        return self.statistics_of_rows(_in_a_row(halves), 2, travel)

    def own_statistics(self, chunks: Tensor, travel: bool) -> Tensor:
        """The way back."""
        if not travel or self.packing.one:
            return chunks
        return self.packing.statistics_by_sequence(chunks).unflatten(-1, (2, -1)).movedim(-2, 0)

    def in_order(self, buffers: list[Tensor], travel: bool) -> list[Tensor]:
        """Gathered chunks as `attend` and `differentiate` take them; the list is emptied, as memory is short."""
        return [self._in_order(buffers.pop(0), travel) for _ in range(len(buffers))]

    def statistics_in_order(self, statistics: Tensor) -> Tensor:
        """The same of numbers per row of queries, [Q, ..., n]."""
        if self.tables is None:
            return statistics
        return self.statistics_of_chunks(statistics, self.plan.queries_travel).unsqueeze(0)

    def halves_in_order(self, rows: BackwardRows) -> BackwardRows:
        """The same of rows that do not travel: halves of the shard."""
        return rows if self.tables is None else rows.each(_as_one, lambda x: _in_a_row(x).unsqueeze(0))

    def _in_order(self, chunks: Tensor, travel: bool) -> Tensor:
        return chunks if self.tables is None else self.rows(chunks, travel).unsqueeze(0)


@dataclass(frozen=True)
class AttentionOp:
    """The attention of rows to keys, the same for every tile of a call.

    Attributes:
        kernel: what computes it.
        scale: factor on the scores.
        dropout: dropout of probabilities, if any.
    """

    kernel: Kernel
    scale: float
    dropout: Dropout | None = None

    def starting(self, head: int) -> AttentionOp:
        """That of the heads from `head` on."""
        return self if self.dropout is None else replace(self, dropout=self.dropout.starting(head))


def attend(tile: Tile, op: AttentionOp, q: Tensor, k: Tensor, v: Tensor) -> Partials:
    """Attend the tile: q [Q, n, b, h, d], k and v [K, n, b, g, d], in order. A slot that travels has one result."""
    plan = tile.plan
    if tile.tables is None:
        found = _attend_rectangles(tile, op, q, k, v)
        return found.reduced() if plan.queries_travel else found
    positions = _positions(tile, op, plan.queries, plan.keys)
    return _partials(tile, *attend_tables(tile.tables, op, positions, q[0], k[0], v[0]), len(plan.queries))


def attend_diagonal(tile: Tile, op: AttentionOp, q: Tensor, k: Tensor, v: Tensor) -> Partials:
    """Attend the diagonal, the own chunks to themselves: halves [2, n, b, heads, d] of the shards.

    Results come by chunk, as those of a tile on the same axis.
    """
    pair = _pair(tile)
    if tile.diagonal_tables is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return _partials(tile, *attend_tables(tile.diagonal_tables, op, _positions(tile, op, pair, pair), q, k, v), 2)
    if not tile.plan.diagonal:
        return Partials([[], []], [[], []])
    if tile.plan.diagonal_joined:
        softmax = _softmax(tile, op, pair, pair, q, k)
        out, lse = op.kernel.forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), CAUSAL, softmax)
        return Partials(one_per_slot(out.unflatten(0, (2, -1))), one_per_slot(lse.unflatten(2, (2, -1)).movedim(2, 0)))
    softmax = _softmax_of_squares(tile, op, q)
    q, k, v = (_side_by_side(x) for x in (q, k, v))
    out, lse = op.kernel.forward(q, k, v, _square(tile), softmax)
    return Partials(_halves(out, 1), _halves(lse, 0))


def differentiate(tile: Tile, op: AttentionOp, rows: BackwardRows, keys: list[Tensor]) -> PartialGradients:
    """Gradients of `attend`. A slot that travels has one gradient.

    Args:
        tile, op: as in `attend`.
        rows: as `attend` takes q.
        keys: k and v; the list is emptied as soon as no call needs them any more.
    """
    plan = tile.plan
    if tile.tables is None:
        found = _differentiate_rectangles(tile, op, rows, *keys)
        keys.clear()
        return found.reduced(plan.queries_travel, plan.keys_travel)
    keys[:] = [x[0] for x in keys]
    # Calls that share queries or keys take another buffer for the gradients of these: for the fewer.
    share_keys = plan.queries_travel or sum(x.numel() for x in keys) <= rows.q.numel()
    tables = tile_tables(plan, tile.packing, tile.band, share_keys)
    found = _differentiate_tables(tile, tables, (plan.queries, plan.keys), op, rows.each(_only, _only), keys)
    return found.reduced(plan.queries_travel, plan.keys_travel)


def differentiate_diagonal(tile: Tile, op: AttentionOp, rows: BackwardRows, k: Tensor, v: Tensor) -> PartialGradients:
    """Gradients of `attend_diagonal`, by chunk likewise."""
    plan, pair = tile.plan, _pair(tile)
    if tile.diagonal_tables is not None:
        keys = [x.flatten(0, 1) for x in (k, v)]
        return _differentiate_tables(tile, tile.diagonal_tables, (pair, pair), op, _as_rows(rows), keys)
    if not plan.diagonal:
        return PartialGradients([[], []], [[], []], [[], []])
    if plan.diagonal_joined:
        softmax = _softmax(tile, op, pair, pair, rows.q, k)
        gradients = op.kernel.backward(_as_rows(rows), k.flatten(0, 1), v.flatten(0, 1), CAUSAL, softmax)
        return PartialGradients(*(one_per_slot(x.unflatten(0, (2, -1))) for x in gradients))
    softmax = _softmax_of_squares(tile, op, rows.q)
    side_by_side = rows.each(_side_by_side, lambda x: x.flatten(0, 1))
    gradients = op.kernel.backward(side_by_side, _side_by_side(k), _side_by_side(v), _square(tile), softmax)
    return PartialGradients(*(_halves(x, 1) for x in gradients))


# Calls of one dense sequence.
def _attend_rectangles(tile: Tile, op: AttentionOp, q: Tensor, k: Tensor, v: Tensor) -> Partials:
    plan, n = tile.plan, q.size(1)
    outs, lses = no_results(len(plan.queries)), no_results(len(plan.queries))
    for start, stop, first, last in plan.rectangles:
        softmax = _softmax(tile, op, plan.queries[start:stop], plan.keys[first:last], q, k)
        pieces = _cut(q, start, stop), _cut(k, first, last), _cut(v, first, last)
        out, lse = op.kernel.forward(*pieces, FULL, softmax)
        add_results(outs, start, out.unflatten(0, (-1, n)))
        add_results(lses, start, lse.unflatten(2, (-1, n)).movedim(2, 0))
    return Partials(outs, lses)


def _differentiate_rectangles(
    tile: Tile, op: AttentionOp, rows: BackwardRows, k: Tensor, v: Tensor
) -> PartialGradients:
    plan, n, key_n = tile.plan, rows.q.size(1), k.size(1)
    dq = no_results(len(plan.queries))
    apart, few = not (plan.queries_travel and plan.keys_travel), len(plan.rectangles) <= FEW_CALLS
    dk, dv = (KeyGradients(x.shape, x, apart, few) for x in (k, v))
    for start, stop, first, last in plan.rectangles:
        softmax = _softmax(tile, op, plan.queries[start:stop], plan.keys[first:last], rows.q, k)
        some = rows.each(partial(_cut, first=start, last=stop), partial(_cut_statistics, first=start, last=stop))
        gradients = op.kernel.backward(some, _cut(k, first, last), _cut(v, first, last), FULL, softmax)
        del some
        add_results(dq, start, gradients[0].unflatten(0, (-1, n)))
        dk.add(first, gradients[1].unflatten(0, (-1, key_n)))
        dv.add(first, gradients[2].unflatten(0, (-1, key_n)))
    return PartialGradients(dq, dk.slots(), dv.slots())


# Calls of tables.
def _partials(tile: Tile, outs: list[Tensor], lses: list[Tensor], slots: int) -> Partials:
    """Results of a table's layers by slot, merged where they travel."""
    travel = tile.plan.queries_travel
    if travel and len(outs) > 1:
        out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
        merge_partials([outs], [lses], [out], [lse])
        outs[:], lses[:] = [out], [lse]
    by_slot: tuple[Slots, Slots] = (no_results(slots), no_results(slots))
    while outs:
        add_results(by_slot[0], 0, tile.chunks(outs.pop(0), slots, travel))
        add_results(by_slot[1], 0, tile.statistics_of_rows(lses.pop(0), slots, travel))
    return Partials(*by_slot)


def _differentiate_tables(
    tile: Tile,
    tables: TileTables,
    chunks: tuple[Sequence[Chunk], Sequence[Chunk]],
    op: AttentionOp,
    rows: BackwardRows,
    k_and_v: list[Tensor],
) -> PartialGradients:
    """Gradients of tables between these chunks of queries and of keys: q [rows, b, h, d], k and v [keys, b, g, d]."""
    plan, packing = tile.plan, tile.packing
    queries, keys = chunks
    groups = len(tables.groups)
    apart = 0 < groups <= (1 if plan.keys_travel else FEW_CALLS)
    dk, dv = (
        KeyGradients(torch.Size((len(keys), packing.tokens, *x.shape[1:])), x, apart, few=groups <= FEW_CALLS)
        for x in k_and_v
    )

    def add(group: KeyGroup, gradients: list[Tensor]) -> None:
        for total in (dk, dv):
            total.add(0, tile.chunks(gradients.pop(0), len(keys), plan.keys_travel, group.slots))

    dqs = differentiate_tables(tables, op, _positions(tile, op, *chunks), rows, k_and_v, add)
    if plan.queries_travel and len(dqs) > 1:
        total = torch.empty_like(dqs[0])
        sum_partials([dqs], [total])
        dqs = [total]
    dq = no_results(len(queries))
    while dqs:
        add_results(dq, 0, tile.chunks(dqs.pop(0), len(queries), plan.queries_travel))
    return PartialGradients(dq, dk.slots(), dv.slots())


def _positions(tile: Tile, op: AttentionOp, rows: Sequence[Chunk], keys: Sequence[Chunk]) -> Positions:
    if op.dropout is None or not (rows and keys):
        return None
    ranks = tile.packing.ranks
    first, second = (tile.packing.positions([c.position(ranks) for c in chunks]) for chunks in (rows, keys))
    return first, second


def _softmax(
    tile: Tile, op: AttentionOp, rows: Sequence[Chunk], keys: Sequence[Chunk], q: Tensor, k: Tensor
) -> Softmax:
    """The softmax of a call on these chunks of one sequence; q and k [slots, n, b, heads, d] give their sizes."""
    if op.dropout is None:
        return Softmax(op.scale)
    batch, heads = q.shape[2:4]
    first, second = (
        Packing.of_one(x.size(1), tile.packing.ranks, q.device)
        .positions([c.position(tile.packing.ranks) for c in chunks])
        .expand(batch, -1)
        for x, chunks in ((q, rows), (k, keys))
    )
    return Softmax(op.scale, op.dropout.at(torch.arange(batch, device=q.device), heads, first, second))


def _softmax_of_squares(tile: Tile, op: AttentionOp, q: Tensor) -> Softmax:
    """The softmax of the own chunks side by side."""
    positions = _positions(tile, op, _pair(tile), _pair(tile))
    if positions is None or op.dropout is None:
        return Softmax(op.scale)
    batch, heads = q.shape[2:4]
    rows = positions[0].view(2, -1).repeat_interleave(batch, 0)
    return Softmax(op.scale, op.dropout.at(torch.arange(batch, device=q.device).repeat(2), heads, rows, rows))


def _pair(tile: Tile) -> tuple[Chunk, Chunk]:
    return Chunk(tile.rank, LOWER), Chunk(tile.rank, UPPER)


def _square(tile: Tile) -> Band:
    """The band of a chunk attending itself."""
    left, right = tile.band
    return Band(None if left is None or left >= tile.packing.longest - 1 else left, right)


def _cut(x: Tensor, first: int, last: int) -> Tensor:
    """A run of slots in a row: [slots, n, ...] -> [(last - first) * n, ...]."""
    # Most calls want all slots, and each operation costs a few microseconds.
    return (x if last - first == x.size(0) else x[first:last]).flatten(0, 1)


def _cut_statistics(x: Tensor, first: int, last: int) -> Tensor:
    """The same of [slots, ..., n]: [..., (last - first) * n]."""
    return _in_a_row(x if last - first == x.size(0) else x[first:last])


def _only(x: Tensor) -> Tensor:
    """The only slot."""
    return x[0]


def _as_rows(rows: BackwardRows) -> BackwardRows:
    """All slots in a row: [slots, n, ...] -> [slots * n, ...]."""
    return rows.each(lambda x: x.flatten(0, 1), _in_a_row)


def _as_one(chunks: Tensor) -> Tensor:
    """[slots, n, b, h, d] -> [1, slots * n, b, h, d]."""
    return chunks.flatten(0, 1).unsqueeze(0)


def _in_a_row(statistics: Tensor) -> Tensor:
    """[slots, ..., n] -> [..., slots * n]; a view where a head's rows lie together."""
    return statistics.movedim(0, -2).flatten(-2)


def _side_by_side(halves: Tensor) -> Tensor:
    """[2, n, b, h, d] -> [n, 2b, h, d]: both diagonal squares as one batch; a view for b = 1."""
    return halves.transpose(0, 1).flatten(1, 2)


def _halves(batch: Tensor, dim: int) -> Slots:
    """Undo `_side_by_side`: the lower and the upper half of a batch dim."""
    return one_per_slot(batch.unflatten(dim, (2, -1)).movedim(dim, 0))
