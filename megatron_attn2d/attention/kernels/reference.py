"""Attention in plain torch, for any device and dtype: what CPU ranks run.

Scores are formed in the input's dtype if it is fp32 or fp64, else in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps

import torch
from torch import Tensor

from megatron_attn2d.attention.dropout import KeepMask
from megatron_attn2d.attention.kernels.base import BackwardRows, Gradients, Outputs, Request, Softmax
from megatron_attn2d.attention.layout import FULL, Band
from megatron_attn2d.attention.merge import accumulation_dtype
from megatron_attn2d.attention.segments import Segments

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _outside_autocast[**Arguments, Result](call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`call` with autocast off, which would round results that must be fp32, log-sum-exps among them."""

    @wraps(call)
    def outside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        tensor = next(x for x in args if isinstance(x, Tensor))
        with torch.autocast(tensor.device.type, enabled=False):
            return call(*args, **kwargs)

    return outside


class ReferenceKernel:
    """Softmax attention written out; memory grows with [b, h, sq, sk]."""

    name = "reference"
    needs_out = False
    deterministic = True

    @staticmethod
    def refusal(request: Request) -> str | None:
        """Why the kernel can't serve the request, or None."""
        return None if request.dtype in _DTYPES else "serves fp16, bf16, fp32 and fp64"

    @_outside_autocast
    def forward(self, q: Tensor, k: Tensor, v: Tensor, band: Band, softmax: Softmax) -> Outputs:
        """See `Kernel.forward`."""
        scores = _scores(q, k, band, softmax.scale)
        lse = scores.logsumexp(-1)
        probabilities = torch.exp(scores.sub_(lse.unsqueeze(-1)))
        if softmax.dropout is not None:
            probabilities *= _kept(softmax.dropout, k.size(2), probabilities.dtype)
        out = _unfold(probabilities @ _keys(v), q)
        return out.to(q.dtype), _unfold_rows(lse, q)

    @_outside_autocast
    def backward(self, rows: BackwardRows, k: Tensor, v: Tensor, band: Band, softmax: Softmax) -> Gradients:
        """See `Kernel.backward`."""
        q, dout, lse, delta, out = rows
        scale, dropout = softmax
        if delta is None:
            assert out is not None
            delta = (dout.to(lse.dtype) * out).sum(-1).permute(1, 2, 0)
        heads = k.size(2)
        folded_q, folded_k, folded_v, folded_dout = _queries(q, heads), _keys(k), _keys(v), _queries(dout, heads)
        p = torch.exp(_scores(q, k, band, scale).sub_(_fold_rows(lse, heads)))
        dp = folded_dout @ folded_v.transpose(-1, -2)
        kept = p
        if dropout is not None:
            factors = _kept(dropout, heads, p.dtype)
            kept, dp = p * factors, dp * factors
        dv = kept.transpose(-1, -2) @ folded_dout
        ds = dp.sub_(_fold_rows(delta, heads)).mul_(p).mul_(scale)
        dq = _unfold(ds @ folded_k, q)
        dk = ds.transpose(-1, -2) @ folded_q
        return dq.to(q.dtype), dk.permute(2, 0, 1, 3).to(k.dtype), dv.permute(2, 0, 1, 3).to(v.dtype)

    def forward_segments(
        self, q: Tensor, k: Tensor, v: Tensor, table: Segments, softmax: Softmax, into: Outputs
    ) -> None:
        """See `Kernel.forward_segments`; one segment after the other."""
        out, lse = into
        for rows, keys in _slices(table):
            pieces = q[rows].unsqueeze(1), k[keys].unsqueeze(1), v[keys].unsqueeze(1)
            found, found_lse = self.forward(*pieces, table.band, _of(softmax, rows, keys))
            out[rows], lse[:, rows] = found.squeeze(1), found_lse.squeeze(0)

    def backward_segments(
        self, rows: BackwardRows, k: Tensor, v: Tensor, table: Segments, softmax: Softmax, into: Gradients
    ) -> None:
        """See `Kernel.backward_segments`."""
        dq, dk, dv = into
        for some, keys in _slices(table):
            piece = rows.each(lambda x, i=some: x[i].unsqueeze(1), lambda x, i=some: x[:, i].unsqueeze(0))  # type: ignore[misc]
            pair = k[keys].unsqueeze(1), v[keys].unsqueeze(1)
            found = self.backward(piece, *pair, table.band, _of(softmax, some, keys))
            dq[some], dk[keys], dv[keys] = (x.squeeze(1) for x in found)


def _slices(table: Segments) -> Iterator[tuple[slice, slice]]:
    """Query and key rows of each segment."""
    for q_start, q_length, k_start, k_length in table:
        yield slice(q_start, q_start + q_length), slice(k_start, k_start + k_length)


def _of(softmax: Softmax, rows: slice, keys: slice) -> Softmax:
    """That of one segment."""
    scale, dropout = softmax
    if dropout is None:
        return softmax
    return Softmax(scale, replace(dropout, rows=dropout.rows[:, rows], keys=dropout.keys[:, keys]))


def _scores(q: Tensor, k: Tensor, band: Band, scale: float) -> Tensor:
    """Scaled scores [b, g, (h/g) * sq, sk], -inf where masked."""
    scores = (_queries(q, k.size(2)) @ _keys(k).transpose(-1, -2)).mul_(scale)
    if band != FULL:
        last = k.size(0) - q.size(0)  # the diagonal that ends at the bottom right
        hidden = torch.zeros(q.size(0), k.size(0), dtype=torch.bool, device=q.device)
        if band.right is not None:
            hidden |= torch.ones_like(hidden).triu(last + band.right + 1)
        if band.left is not None:
            hidden |= torch.ones_like(hidden).tril(last - band.left - 1)
        scores.unflatten(2, (-1, q.size(0))).masked_fill_(hidden, -torch.inf)
    return scores


def _kept(dropout: KeepMask, heads: int, dtype: torch.dtype) -> Tensor:
    """[b, h, sq, sk] -> [b, g, (h/g) * sq, sk]."""
    return dropout.factors(dtype).unflatten(1, (heads, -1)).flatten(2, 3)


def _queries(x: Tensor, heads: int) -> Tensor:
    """[s, b, h, d] -> [b, g, (h/g) * s, d]: the query heads of one key head become rows of one product."""
    x = x.to(accumulation_dtype(x.dtype)).permute(1, 2, 0, 3)
    return x.unflatten(1, (heads, -1)).flatten(2, 3)


def _keys(x: Tensor) -> Tensor:
    """[s, b, g, d] -> [b, g, s, d]."""
    return x.to(accumulation_dtype(x.dtype)).permute(1, 2, 0, 3)


def _unfold(x: Tensor, q: Tensor) -> Tensor:
    """[b, g, (h/g) * s, d] -> [s, b, h, d]."""
    return x.unflatten(2, (-1, q.size(0))).flatten(1, 2).permute(2, 0, 1, 3)


def _fold_rows(x: Tensor, heads: int) -> Tensor:
    """[b, h, s] -> [b, g, (h/g) * s, 1]."""
    return x.unflatten(1, (heads, -1)).flatten(2).unsqueeze(-1)


def _unfold_rows(x: Tensor, q: Tensor) -> Tensor:
    """[b, g, (h/g) * s] -> [b, h, s]."""
    return x.unflatten(2, (-1, q.size(0))).flatten(1, 2)
