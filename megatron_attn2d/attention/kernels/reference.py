"""Attention in plain torch, for any device and dtype: what CPU ranks run.

Scores are formed in the input's dtype if it is fp32 or fp64, else in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_attn2d.attention.merge import accumulation_dtype


class ReferenceKernel:
    """Softmax attention written out; memory grows with [b, h, sq, sk]."""

    name = "reference"
    needs_out = False
    deterministic = True

    @staticmethod
    def refusal(dtype: torch.dtype, head_dim: int, v_head_dim: int) -> str | None:
        """Why the kernel can't serve these, or None."""
        return None if dtype.is_floating_point else "serves floating-point dtypes"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        scores = _scores(q, k, causal, scale)
        lse = scores.logsumexp(-1)
        probabilities = torch.exp(scores.sub_(lse.unsqueeze(-1)))
        out = _unfold(probabilities @ _keys(v), q)
        return out.to(q.dtype), _unfold_rows(lse, q)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor,
        delta: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        heads = k.size(2)
        folded_q, folded_k, folded_v, folded_dout = _queries(q, heads), _keys(k), _keys(v), _queries(dout, heads)
        p = torch.exp(_scores(q, k, causal, scale).sub_(_fold_rows(lse, heads)))
        dv = p.transpose(-1, -2) @ folded_dout
        ds = (folded_dout @ folded_v.transpose(-1, -2)).sub_(_fold_rows(delta, heads)).mul_(p).mul_(scale)
        dq = _unfold(ds @ folded_k, q)
        dk = ds.transpose(-1, -2) @ folded_q
        return dq.to(q.dtype), dk.permute(2, 0, 1, 3).to(k.dtype), dv.permute(2, 0, 1, 3).to(v.dtype)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """Scaled scores [b, g, (h/g) * sq, sk], -inf where masked."""
    scores = (_queries(q, k.size(2)) @ _keys(k).transpose(-1, -2)).mul_(scale)
    if causal:
        future = torch.ones(q.size(0), k.size(0), dtype=torch.bool, device=q.device).triu(1)
        scores.unflatten(2, (-1, q.size(0))).masked_fill_(future, -torch.inf)
    return scores


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
