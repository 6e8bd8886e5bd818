"""The dense attention that everything is checked against, and the zigzag layout as an index."""

from __future__ import annotations

import torch
from torch import Tensor


def zigzag(total: int, ranks: int, rank: int) -> Tensor:
    """Indices of the tokens that `rank` of `ranks` holds, [total / ranks]."""
    chunks = torch.arange(total).chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def inputs(
    total: int,
    batch: int,
    heads: tuple[int, int],
    dims: tuple[int, int] = (8, 8),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output for the whole sequence, [s, b, heads, d]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1])]
    q, k, v, dout = (torch.randn(total, batch, h, d, generator=generator, dtype=torch.float64) for h, d in shapes)
    return q.to(dtype), k.to(dtype), v.to(dtype), dout.to(dtype)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> Tensor:
    """Softmax attention in float64 by einsum, differentiable; [s, b, h, d] in, [s, b, h, dv] out."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, k) * (q.size(3) ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(q.size(0), k.size(0), dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), v)


def dense_gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> tuple[Tensor, ...]:
    """Output and gradients of q, k, v in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = dense_attention(*leaves, causal)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout.double()))
