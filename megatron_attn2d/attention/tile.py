"""One tile of the score matrix on one device: run its plan's kernel calls forward and backward.

Legend: n tokens of a chunk, b batch, h query heads, g key heads, d head dim, Q and K slots of the plan.
Log-sum-exps and deltas are kept by chunk, [slots, b, h, n], so that a chunk's part is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_attn2d.attention.dropout import Dropout, KeepMask
from megatron_attn2d.attention.kernels import Kernel
from megatron_attn2d.attention.layout import Band, Call, Chunk, Part, TilePlan
from megatron_attn2d.attention.merge import accumulation_dtype, merge_partials


@dataclass(frozen=True)
class Queries:
    """Query chunks, and in the backward pass what the gradient of their attention needs.

    Attributes:
        q: queries [slots, n, b, h, d].
        dout: gradient of their output, like q.
        lse, delta: log-sum-exp over all keys and rowsum(dout * out), [slots, b, h, n].
        out: the output over all keys or `merge.stand_in`, like q; None where the kernel does not ask for it.
    """

    q: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor
    out: Tensor | None

    def slots(self, which: slice) -> Queries:
        """Some of the chunks."""
        out = None if self.out is None else self.out[which]
        return Queries(self.q[which], self.dout[which], self.lse[which], self.delta[which], out)

    def of(self, part: Part) -> Queries:
        """Those of one of several packed sequences."""
        if part.chunk == self.q.size(1):
            return self
        rows = slice(part.offset, part.offset + part.chunk)
        out = None if self.out is None else self.out[:, rows]
        return Queries(self.q[:, rows], self.dout[:, rows], self.lse[..., rows], self.delta[..., rows], out)


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


@dataclass(frozen=True)
class Partials:
    """Partial outputs of one tile, by query slot: `outs` [n, b, h, d] and `lses` [b, h, n]."""

    outs: list[Tensor]
    lses: list[Tensor]


@dataclass(frozen=True)
class PartialGradients:
    """Partial gradients of one tile: dq by query slot, dk and dv by key slot, [n, b, heads, d]."""

    dq: list[Tensor]
    dk: list[Tensor]
    dv: list[Tensor]


def attend(plan: TilePlan, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> Partials:
    """The tile's calls: q [Q, n, b, h, d], k and v [K, n, b, g, d]."""
    parts: list[Partials] = []
    for part in plan.parts:
        pieces = _Pieces(len(plan.queries), part.chunk)
        q_rows, k_rows, v_rows = _rows(_queries_of(part, q)), _rows(_keys_of(part, k)), _rows(_keys_of(part, v))
        for call in part.calls:
            out, lse = scores.kernel.forward(
                q_rows[call.start : call.stop],
                k_rows[call.first : call.last],
                v_rows[call.first : call.last],
                band=call.band,
                scale=scores.scale,
                dropout=_dropped(scores, plan, part, call, q),
            )
            pieces.add(call, out, lse)
        parts.append(pieces.merged(q, v))
    if len(parts) == 1:
        return parts[0]
    return Partials(_joined([part.outs for part in parts], 0), _joined([part.lses for part in parts], 2))


def attend_diagonal(plan: TilePlan, scores: Scores, q: Tensor, k: Tensor, v: Tensor, own: int) -> Partials:
    """The chunks [2, n, b, heads, d] of rank `own` on their diagonal, by half; nothing where the plan has none."""
    outs: list[list[Tensor]] = []
    lses: list[list[Tensor]] = []
    for part in plan.parts if plan.diagonal else ():
        out, lse = scores.kernel.forward(
            *(_side_by_side(_queries_of(part, x)) for x in (q, k, v)),
            band=_band(part),
            scale=scores.scale,
            dropout=_dropped_diagonal(scores, part, q, own),
        )
        outs.append(_halves(out, 1))
        lses.append(_halves(lse, 0))
    return Partials(_joined(outs, 0), _joined(lses, 2))


def differentiate(plan: TilePlan, scores: Scores, queries: Queries, k: Tensor, v: Tensor) -> PartialGradients:
    """Gradients of the tile's calls; arguments as in `attend`."""
    found: list[list[list[Tensor]]] = [[], [], []]  # dq, dk, dv by sequence and slot
    for part in plan.parts:
        mine, k_rows, v_rows = queries.of(part), _rows(_keys_of(part, k)), _rows(_keys_of(part, v))
        q_rows, dout_rows = _rows(mine.q), _rows(mine.dout)
        out_rows = None if mine.out is None else _rows(mine.out)
        pieces = _Pieces(len(plan.queries), part.chunk)
        buffers: tuple[Tensor, Tensor] | None = None
        # Under a plain mask the longest prefix comes first: its dk and dv are the buffers into which others are added.
        for call in reversed(part.calls):
            rows, columns = slice(call.start, call.stop), slice(call.first, call.last)
            part_q, *gradients = scores.kernel.backward(
                dout_rows[rows],
                q_rows[rows],
                k_rows[columns],
                v_rows[columns],
                None if out_rows is None else out_rows[rows],
                _per_row(mine.lse, call, part.chunk),
                _per_row(mine.delta, call, part.chunk),
                band=call.band,
                scale=scores.scale,
                dropout=_dropped(scores, plan, part, call, queries.q),
            )
            pieces.add(call, part_q)
            if buffers is None and call.last - call.first == k_rows.size(0):
                buffers = (gradients[0], gradients[1])
                continue
            if buffers is None:
                buffers = _zeros(k_rows), _zeros(v_rows)
            for buffer, gradient in zip(buffers, gradients, strict=True):
                buffer[columns] += gradient
        dk, dv = buffers or (_zeros(k_rows), _zeros(v_rows))
        found[0].append(pieces.summed(queries.q))
        for kind, buffer, like in zip(found[1:], (dk, dv), (k, v), strict=True):
            kind.append(list(buffer.to(like.dtype).unflatten(0, (like.size(0), part.key_chunk)).unbind()))
    return PartialGradients(*(_joined(kind, 0) for kind in found))


def differentiate_diagonal(
    plan: TilePlan, scores: Scores, queries: Queries, k: Tensor, v: Tensor, own: int
) -> PartialGradients:
    """Gradients of `attend_diagonal`, by half."""
    found: list[list[list[Tensor]]] = [[], [], []]
    for part in plan.parts if plan.diagonal else ():
        mine = queries.of(part)
        gradients = scores.kernel.backward(
            _side_by_side(mine.dout),
            _side_by_side(mine.q),
            _side_by_side(_queries_of(part, k)),
            _side_by_side(_queries_of(part, v)),
            None if mine.out is None else _side_by_side(mine.out),
            mine.lse.flatten(0, 1),
            mine.delta.flatten(0, 1),
            band=_band(part),
            scale=scores.scale,
            dropout=_dropped_diagonal(scores, part, queries.q, own),
        )
        for kind, gradient in zip(found, gradients, strict=True):
            kind.append(_halves(gradient, 1))
    return PartialGradients(*(_joined(kind, 0) for kind in found))


class _Pieces:
    """What the calls of one sequence found, by query slot: usually a call covers whole slots and no other does."""

    def __init__(self, slots: int, n: int) -> None:
        self._n = n
        self._found: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in range(slots)]

    def add(self, call: Call, rows: Tensor, lse: Tensor | None = None) -> None:
        """Rows [sq, b, h, d] of a call, and their log-sum-exp [b, h, sq] where they are to be merged by it."""
        slot, within = divmod(call.start, self._n)
        if within or call.stop - call.start < self._n:
            self._found[slot].append((within, rows, rows if lse is None else lse))
            return
        by_slot = rows.unflatten(0, (-1, self._n)).unbind()
        lses = by_slot if lse is None else lse.unflatten(2, (-1, self._n)).permute(2, 0, 1, 3).contiguous().unbind()
        for i, piece in enumerate(zip(by_slot, lses, strict=True)):
            self._found[slot + i].append((0, *piece))

    def merged(self, q: Tensor, v: Tensor) -> Partials:
        """Outputs and log-sum-exps by slot. A row that no call had has output 0 and log-sum-exp -inf.

        q and v, [slots, n, b, heads, d], lend their shapes and dtype.
        """
        outs, lses = [], []
        for found in self._found:
            if len(found) == 1 and found[0][1].size(0) == self._n:
                _, out, lse = found[0]
            else:
                out, lse = nothing(self._n, q, v)
                if found:
                    self._merge(found, out, lse)
            outs.append(out)
            lses.append(lse)
        return Partials(outs, lses)

    def _merge(self, found: list[tuple[int, Tensor, Tensor]], out: Tensor, lse: Tensor) -> None:
        outs, lses = [], []
        for at, rows, rows_lse in found:
            outs.append(torch.zeros_like(out))
            lses.append(torch.full_like(lse, -torch.inf))
            outs[-1][at : at + rows.size(0)] = rows
            lses[-1][..., at : at + rows.size(0)] = rows_lse
        merge_partials([outs], [lses], [out], [lse])

    def summed(self, q: Tensor) -> list[Tensor]:
        """Gradients by slot, like q [slots, n, b, h, d]; 0 for a row that no call had."""
        gradients = []
        for found in self._found:
            if len(found) == 1 and found[0][1].size(0) == self._n:
                gradients.append(found[0][1])
                continue
            total = q.new_zeros((self._n, *q.shape[2:]), dtype=accumulation_dtype(q.dtype))
            for at, rows, _ in found:
                total[at : at + rows.size(0)] += rows
            gradients.append(total.to(q.dtype))
        return gradients


def nothing(n: int, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [n, b, h, dv] and log-sum-exp [b, h, n] of rows without a key, for chunks [slots, n, b, heads, d]."""
    batch, heads = q.shape[2:4]
    lse = torch.full((batch, heads, n), -torch.inf, dtype=accumulation_dtype(q.dtype), device=q.device)
    return q.new_zeros((n, batch, heads, v.size(4))), lse


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
    halves = (Chunk(own, 0), Chunk(own, 1))
    rows = _positions(halves, part.offset, part.chunk, scores.ranks, q).unflatten(0, (2, -1))
    rows = rows.repeat_interleave(batch, 0)
    return scores.dropout.at(torch.arange(batch, device=q.device).repeat(2), heads, rows, rows)


def _positions(chunks: tuple[Chunk, ...], offset: int, n: int, ranks: int, like: Tensor) -> Tensor:
    """Positions of the tokens of chunks, [slots * n]; packed sequences follow each other."""
    starts = torch.tensor([chunk.position(ranks) * n for chunk in chunks], device=like.device, dtype=torch.int64)
    return (2 * ranks * offset + starts[:, None] + torch.arange(n, device=like.device)).flatten()


def _band(part: Part) -> Band:
    assert part.diagonal is not None
    return part.diagonal


def _queries_of(part: Part, chunks: Tensor) -> Tensor:
    """One packed sequence's part of query chunks [slots, n, ...]."""
    return chunks if part.chunk == chunks.size(1) else chunks[:, part.offset : part.offset + part.chunk]


def _keys_of(part: Part, chunks: Tensor) -> Tensor:
    return chunks if part.key_chunk == chunks.size(1) else chunks[:, part.key_offset : part.key_offset + part.key_chunk]


def _zeros(rows: Tensor) -> Tensor:
    return torch.zeros_like(rows, dtype=accumulation_dtype(rows.dtype))


def _joined(parts: list[list[Tensor]], dim: int) -> list[Tensor]:
    """The results of packed sequences, [sequence][slot], one after the other in each slot."""
    if len(parts) <= 1:
        return parts[0] if parts else []
    return [torch.cat(slot, dim) for slot in zip(*parts, strict=True)]


def _rows(chunks: Tensor) -> Tensor:
    """[slots, n, b, h, d] -> [slots * n, b, h, d], a view unless sequences are packed."""
    return chunks.flatten(0, 1)


def _per_row(chunks: Tensor, call: Call, n: int) -> Tensor:
    """[slots, b, h, n] -> [b, h, sq] of a call's rows."""
    first, last = call.start // n, -(-call.stop // n)
    rows = chunks[first:last].permute(1, 2, 0, 3).flatten(2)
    return rows[..., call.start - first * n : call.stop - first * n]


def _side_by_side(halves: Tensor) -> Tensor:
    """[2, n, b, h, d] -> [n, 2b, h, d]: both diagonal squares as one batch; a view for b = 1."""
    return halves.transpose(0, 1).flatten(1, 2)


def _halves(batch: Tensor, dim: int) -> list[Tensor]:
    """Undo `_side_by_side`: the lower and the upper half of a batch dim."""
    lower, upper = batch.unflatten(dim, (2, -1)).unbind(dim)
    return [lower, upper]
