"""Attention of whole sequences on one rank: the 1 x 1 grid, where a kernel needs no tiles and no merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_attn2d.attention.checks import check_first_derivative
from megatron_attn2d.attention.dropout import KeepMask
from megatron_attn2d.attention.layout import Band
from megatron_attn2d.attention.merge import apply_sink, sink_gradient
from megatron_attn2d.attention.packing import Packing
from megatron_attn2d.attention.segmented import attend_tables, differentiate_tables
from megatron_attn2d.attention.tables import whole_tables
from megatron_attn2d.attention.tile import Queries, Scores


@dataclass(frozen=True)
class Whole:
    """What a rank attends that has all tokens of its heads.

    Attributes:
        packing: the sequences, on one place.
        band: who sees whom within each.
        scores: how scores become probabilities.
    """

    packing: Packing
    band: Band
    scores: Scores


def local_attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, whole: Whole) -> Tensor:
    """Attend q [s, b, h, d] to k [s, b, g, d] and v [s, b, g, dv]; a single rank's two chunks are a whole sequence."""
    out: Tensor = _LocalAttention.apply(q, k, v, sink, whole)
    return out


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, whole: Whole) -> Tensor:
        out, lse = _attend(q, k, v, whole)
        if sink is not None:
            apply_sink(out, lse, sink)
        ctx.save_for_backward(q, k, v, out, lse, sink)
        ctx.whole = whole
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        q, k, v, out, lse, sink = ctx.saved_tensors
        delta = None
        if sink is not None or not ctx.whole.scores.kernel.needs_out:
            delta = (grads[0].to(lse.dtype) * out).sum(-1).permute(1, 2, 0)
        gradients = _differentiate(grads[0], q, k, v, out, lse, delta, ctx.whole)
        dsink = None if sink is None or delta is None else sink_gradient(lse, delta, sink)
        return (*gradients, dsink, None)


def _attend(q: Tensor, k: Tensor, v: Tensor, whole: Whole) -> tuple[Tensor, Tensor]:
    """Output, contiguous as on every grid, and log-sum-exp [b, h, s]."""
    scores = whole.scores
    if whole.packing.plain:
        out, lse = scores.kernel.forward(q, k, v, band=whole.band, scale=scores.scale, dropout=_dropped(q, k, scores))
        return out.contiguous(), lse
    tables = whole_tables(whole.packing, whole.band)
    (out,), (lse,) = attend_tables(tables, scores, _positions(scores, q, k), q, k, v, zeros=True)
    return out, lse


def _differentiate(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, delta: Tensor | None, whole: Whole
) -> tuple[Tensor, Tensor, Tensor]:
    scores = whole.scores
    if whole.packing.plain:
        return scores.kernel.backward(
            dout, q, k, v, out, lse, delta, band=whole.band, scale=scores.scale, dropout=_dropped(q, k, scores)
        )
    tables = whole_tables(whole.packing, whole.band)
    queries = Queries(*(None if x is None else x.unsqueeze(0) for x in (q, dout, lse, delta, out)))  # type: ignore[arg-type]
    found: list[Tensor] = []
    (dq,) = differentiate_tables(
        tables, scores, _positions(scores, q, k), queries, [k, v], lambda _, gradients: found.extend(gradients)
    )
    dk, dv = found or (torch.zeros_like(k), torch.zeros_like(v))  # all is padding
    return dq, dk, dv


def _positions(scores: Scores, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor] | None:
    if scores.dropout is None:  # which alone asks for them
        return None
    rows, keys = (torch.arange(x.size(0), device=x.device).unsqueeze(0) for x in (q, k))
    return rows, keys


def _dropped(q: Tensor, k: Tensor, scores: Scores) -> KeepMask | None:
    positions = _positions(scores, q, k)
    if scores.dropout is None or positions is None:
        return None
    batch = q.size(1)
    rows, keys = (x.expand(batch, -1) for x in positions)
    return scores.dropout.at(torch.arange(batch, device=q.device), q.size(2), rows, keys)
