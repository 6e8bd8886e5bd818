"""Attention of a whole sequence on one rank: the 1 x 1 grid, where a kernel needs no tiles and no merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_attn2d.attention.checks import check_first_derivative
from megatron_attn2d.attention.dropout import KeepMask
from megatron_attn2d.attention.layout import Band
from megatron_attn2d.attention.merge import apply_sink, sink_gradient
from megatron_attn2d.attention.tile import Scores


def local_attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, scores: Scores, band: Band) -> Tensor:
    """Attend q [s, b, h, d] to k [s, b, g, d] and v [s, b, g, dv]; a single rank's two chunks are the sequence."""
    out: Tensor = _LocalAttention.apply(q, k, v, sink, scores, band)
    return out


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, scores: Scores, band: Band) -> Tensor:
        kept = _kept(q, k, scores)
        out, lse = scores.kernel.forward(q, k, v, band=band, scale=scores.scale, dropout=kept)
        out = out.contiguous()  # as on every grid
        if sink is not None:
            apply_sink(out, lse, sink)
        ctx.save_for_backward(q, k, v, out, lse, sink)
        ctx.call = scores, band
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        q, k, v, out, lse, sink = ctx.saved_tensors
        scores, band = ctx.call
        delta = None
        if sink is not None or not scores.kernel.needs_out:
            delta = (grads[0].to(lse.dtype) * out).sum(-1).permute(1, 2, 0)
        gradients = scores.kernel.backward(
            grads[0], q, k, v, out, lse, delta, band=band, scale=scores.scale, dropout=_kept(q, k, scores)
        )
        dsink = None if sink is None or delta is None else sink_gradient(lse, delta, sink)
        return (*gradients, dsink, None, None)


def _kept(q: Tensor, k: Tensor, scores: Scores) -> KeepMask | None:
    if scores.dropout is None:
        return None
    batch = q.size(1)
    sequences = torch.arange(batch, device=q.device)
    rows, keys = (torch.arange(x.size(0), device=q.device).expand(batch, -1) for x in (q, k))
    return scores.dropout.at(sequences, q.size(2), rows, keys)
