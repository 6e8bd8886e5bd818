"""One tile of the score matrix on one device: run its plan's kernel calls forward and backward.

Legend: n tokens of a chunk, b batch, h query heads, g key heads, d head dim, Q and K slots of the plan.
Log-sum-exps and deltas are kept by chunk, [slots, b, h, n], so that a chunk's part is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_attn2d.attention.dropout import Dropout, KeepMask
from megatron_attn2d.attention.kernels import Kernel
from megatron_attn2d.attention.layout import LOWER, UPPER, Band, Call, Chunk, Part, TilePlan
from megatron_attn2d.attention.pieces import PartialGradients, Partials, Pieces, Slots, Sums, joined, summed

_FEW_CALLS = 4
"""At most so many calls a plain mask makes, whose gradients of keys may be added up in 16 bits, as they come."""


@dataclass(frozen=True)
class Queries:
    """Query chunks, and in the backward pass what the gradient of their attention needs.

    Attributes:
        q: queries [slots, n, b, h, d].
        dout: gradient of their output, like q.
        lse: log-sum-exp over all keys, [slots, b, h, n].
        delta: rowsum(dout * out), like lse; None where the kernel derives it from `out`.
        out: the output over all keys or `merge.stand_in`, like q; None where the kernel does not ask for it.
    """

    q: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor | None
    out: Tensor | None

    def slots(self, which: slice) -> Queries:
        """Some of the chunks."""
        delta, out = (None if x is None else x[which] for x in (self.delta, self.out))
        return Queries(self.q[which], self.dout[which], self.lse[which], delta, out)

    def of(self, part: Part) -> Queries:
        """Those of one of several packed sequences."""
        if part.chunk == self.q.size(1):
            return self
        rows = slice(part.offset, part.offset + part.chunk)
        delta = None if self.delta is None else self.delta[..., rows]
        out = None if self.out is None else self.out[:, rows]
        return Queries(self.q[:, rows], self.dout[:, rows], self.lse[..., rows], delta, out)


@dataclass(frozen=True)
class Scores:
    """How scores become probabilities, the same for every tile of a call.

    Attributes:
        kernel: what computes them.
        scale: factor on them.
        ranks: P, by which positions are known.
        dropout: dropout of probabilities, if any.
    """

    kernel: Kernel
    scale: float
    ranks: int
    dropout: Dropout | None = None

    def starting(self, head: int) -> Scores:
        """Those of the heads from `head` on."""
        return self if self.dropout is None else replace(self, dropout=self.dropout.starting(head))


def attend(plan: TilePlan, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> Partials:
    """The tile's calls: q [Q, n, b, h, d], k and v [K, n, b, g, d]."""
    parts: list[Partials] = []
    for part in plan.parts:
        pieces = Pieces(len(plan.queries), part.chunk)
        q_rows, k_rows, v_rows = _rows(_queries_of(part, q)), _rows(_keys_of(part, k)), _rows(_keys_of(part, v))
        for call in part.calls:
            out, lse = scores.kernel.forward(
                _cut(q_rows, call.start, call.stop),
                _cut(k_rows, call.first, call.last),
                _cut(v_rows, call.first, call.last),
                band=call.band,
                scale=scores.scale,
                dropout=_dropped(scores, plan, part, call, q),
            )
            pieces.add(call.start, out, lse)
        parts.append(pieces.outputs(q, v))
    if len(parts) == 1:
        return parts[0]
    parts = [part.merged() for part in parts]
    return Partials(joined([part.outs for part in parts], 0), joined([part.lses for part in parts], 2))


def attend_own(plan: TilePlan, scores: Scores, q: Tensor, k: Tensor, v: Tensor, own: int) -> Partials:
    """The chunks [2, n, b, heads, d] of rank `own` to themselves, by half; nothing where the plan has no diagonal."""
    if plan.own is not None:
        return attend(plan.own, scores, q, k, v)
    outs: list[Slots] = []
    lses: list[Slots] = []
    for part in plan.parts if plan.diagonal else ():
        out, lse = scores.kernel.forward(
            *(_side_by_side(_queries_of(part, x)) for x in (q, k, v)),
            band=_band(part),
            scale=scores.scale,
            dropout=_dropped_diagonal(scores, part, q, own),
        )
        outs.append(_halves(out, 1))
        lses.append(_halves(lse, 0))
    return Partials(joined(outs, 0), joined(lses, 2))


def differentiate(plan: TilePlan, scores: Scores, queries: Queries, k: Tensor, v: Tensor) -> PartialGradients:
    """Gradients of the tile's calls; arguments as in `attend`."""
    found: list[list[Slots]] = [[], [], []]  # dq, dk, dv by sequence
    for part in plan.parts:
        mine, k_rows, v_rows = queries.of(part), _rows(_keys_of(part, k)), _rows(_keys_of(part, v))
        q_rows, dout_rows = _rows(mine.q), _rows(mine.dout)
        out_rows = None if mine.out is None else _rows(mine.out)
        # Under a plain mask the longest prefix comes first: its dk and dv are what others are added to.
        of_keys = Pieces if plan.keys_apart else partial(Sums, few=len(part.calls) <= _FEW_CALLS)
        pieces = (
            Pieces(len(plan.queries), part.chunk),
            of_keys(len(plan.keys), part.key_chunk),
            of_keys(len(plan.keys), part.key_chunk),
        )
        for call in reversed(part.calls):
            gradients = scores.kernel.backward(
                _cut(dout_rows, call.start, call.stop),
                _cut(q_rows, call.start, call.stop),
                _cut(k_rows, call.first, call.last),
                _cut(v_rows, call.first, call.last),
                None if out_rows is None else _cut(out_rows, call.start, call.stop),
                _per_row(mine.lse, call, part.chunk),
                None if mine.delta is None else _per_row(mine.delta, call, part.chunk),
                band=call.band,
                scale=scores.scale,
                dropout=_dropped(scores, plan, part, call, queries.q),
            )
            for piece, start, gradient in zip(pieces, (call.start, call.first, call.first), gradients, strict=True):
                piece.add(start, gradient)
        for one, piece, like in zip(found, pieces, (queries.q, k, v), strict=True):
            one.append(piece.gradients(like))
    if len(plan.parts) > 1:
        found = [[summed(slots) for slots in kind] for kind in found]
    return PartialGradients(*(joined(kind, 0) for kind in found))


def differentiate_own(
    plan: TilePlan, scores: Scores, queries: Queries, k: Tensor, v: Tensor, own: int
) -> PartialGradients:
    """Gradients of `attend_own`, by half."""
    if plan.own is not None:
        return differentiate(plan.own, scores, queries, k, v)
    found: list[list[Slots]] = [[], [], []]
    for part in plan.parts if plan.diagonal else ():
        mine = queries.of(part)
        gradients = scores.kernel.backward(
            _side_by_side(mine.dout),
            _side_by_side(mine.q),
            _side_by_side(_queries_of(part, k)),
            _side_by_side(_queries_of(part, v)),
            None if mine.out is None else _side_by_side(mine.out),
            mine.lse.flatten(0, 1),
            None if mine.delta is None else mine.delta.flatten(0, 1),
            band=_band(part),
            scale=scores.scale,
            dropout=_dropped_diagonal(scores, part, queries.q, own),
        )
        for kind, gradient in zip(found, gradients, strict=True):
            kind.append(_halves(gradient, 1))
    return PartialGradients(*(joined(kind, 0) for kind in found))


def _dropped(scores: Scores, plan: TilePlan, part: Part, call: Call, q: Tensor) -> KeepMask | None:
    if scores.dropout is None:
        return None
    batch, heads = q.shape[2:4]
    rows = _positions(plan.queries, part.offset, part.chunk, scores.ranks, q)[call.start : call.stop]
    keys = _positions(plan.keys, part.key_offset, part.key_chunk, scores.ranks, q)[call.first : call.last]
    sequences = torch.arange(batch, device=q.device)
    return scores.dropout.at(sequences, heads, rows.expand(batch, -1), keys.expand(batch, -1))


def _dropped_diagonal(scores: Scores, part: Part, q: Tensor, own: int) -> KeepMask | None:
    if scores.dropout is None:
        return None
    batch, heads = q.shape[2:4]
    halves = (Chunk(own, LOWER), Chunk(own, UPPER))
    rows = _positions(halves, part.offset, part.chunk, scores.ranks, q).unflatten(0, (2, -1))
    rows = rows.repeat_interleave(batch, 0)
    return scores.dropout.at(torch.arange(batch, device=q.device).repeat(2), heads, rows, rows)


def _positions(chunks: tuple[Chunk, ...], offset: int, n: int, ranks: int, like: Tensor) -> Tensor:
    """Positions of the tokens of chunks, [slots * n]; packed sequences follow each other.

    Made on the device: a copy from the host would wait for it, and can't be captured in a CUDA graph.
    """
    starts = (2 * ranks * offset + chunk.position(ranks) * n for chunk in chunks)
    return torch.cat([torch.arange(start, start + n, device=like.device) for start in starts])


def _band(part: Part) -> Band:
    assert part.diagonal is not None
    return part.diagonal


def _queries_of(part: Part, chunks: Tensor) -> Tensor:
    """One packed sequence's part of query chunks [slots, n, ...]."""
    return chunks if part.chunk == chunks.size(1) else chunks[:, part.offset : part.offset + part.chunk]


def _keys_of(part: Part, chunks: Tensor) -> Tensor:
    return chunks if part.key_chunk == chunks.size(1) else chunks[:, part.key_offset : part.key_offset + part.key_chunk]


def _rows(chunks: Tensor) -> Tensor:
    """[slots, n, b, h, d] -> [slots * n, b, h, d], a view unless sequences are packed."""
    return chunks.flatten(0, 1)


def _cut(x: Tensor, first: int, last: int) -> Tensor:
    """A run of the first dim. Most calls want all of it, and each operation costs a few microseconds."""
    return x if last - first == x.size(0) else x[first:last]


def _per_row(chunks: Tensor, call: Call, n: int) -> Tensor:
    """[slots, b, h, n] -> [b, h, sq] of a call's rows; a view where a head's rows lie together."""
    first, last = call.start // n, -(-call.stop // n)
    rows = _cut(chunks, first, last).permute(1, 2, 0, 3).flatten(2)
    within = call.start - first * n, call.stop - first * n
    return rows if within == (0, rows.size(2)) else rows[..., slice(*within)]


def _side_by_side(halves: Tensor) -> Tensor:
    """[2, n, b, h, d] -> [n, 2b, h, d]: both diagonal squares as one batch; a view for b = 1."""
    return halves.transpose(0, 1).flatten(1, 2)


def _halves(batch: Tensor, dim: int) -> Slots:
    """Undo `_side_by_side`: the lower and the upper half of a batch dim."""
    lower, upper = batch.unflatten(dim, (2, -1)).unbind(dim)
    return [[lower], [upper]]
