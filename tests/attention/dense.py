"""The dense attention that everything is checked against, and the zigzag layout as an index."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def zigzag(total: int, ranks: int, rank: int) -> Tensor:
    """Indices of the tokens that `rank` of `ranks` holds, [total / ranks]."""
    chunks = torch.arange(total).chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def packed_zigzag(places: Sequence[int], ranks: int, rank: int) -> Tensor:
    """The same for sequences of `places` tokens that follow each other, each in its own zigzag."""
    starts = [sum(places[:i]) for i in range(len(places))]
    return torch.cat([start + zigzag(place, ranks, rank) for start, place in zip(starts, places, strict=True)])


def inputs(
    total: int,
    batch: int,
    heads: tuple[int, int],
    dims: tuple[int, int] = (8, 8),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    keys: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output for the whole sequence, [s, b, heads, d]; `keys` tokens of k and v."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (total, heads[0], dims[0]),
        (keys or total, heads[1], dims[0]),
        (keys or total, heads[1], dims[1]),
        (total, heads[0], dims[1]),
    ]
    q, k, v, dout = (torch.randn(s, batch, h, d, generator=generator, dtype=torch.float64) for s, h, d in shapes)
    return q.to(dtype), k.to(dtype), v.to(dtype), dout.to(dtype)


def hidden(queries: int, keys: int, causal: bool, window: tuple[int, int] = (-1, -1)) -> Tensor:
    """Which keys a query does not see, [queries, keys]."""
    ahead = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]
    unseen = torch.zeros_like(ahead, dtype=torch.bool)
    if causal:
        unseen |= ahead > 0
    if window[0] >= 0:
        unseen |= ahead < -window[0]
    if window[1] >= 0:
        unseen |= ahead > window[1]
    return unseen


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    sink: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """Softmax attention in float64 by einsum, differentiable; [s, b, h, d] in, [s, b, h, dv] out.

    `sink` [h] are scores of one more key of value 0; `factors` [b, h, s, t] multiply probabilities, as dropout does.
    """
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, k) * (q.size(3) ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(hidden(q.size(0), k.size(0), causal, window), -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    probabilities = scores.softmax(-1)[..., : k.size(0)]
    if factors is not None:
        probabilities = probabilities * factors
    return torch.einsum("bhst,tbhd->sbhd", probabilities, v)


def dense_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    causal: bool,
    window: tuple[int, int] = (-1, -1),
    sink: Tensor | None = None,
    factors: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Output and gradients of q, k, v, and of the sinks where there are any, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, *(() if sink is None else (sink,)))]
    out = dense_attention(*leaves[:3], causal, window=window, sink=None if sink is None else leaves[3], factors=factors)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout.double()))


def packed_gradients(
    whole: Sequence[Tensor],
    lengths: Sequence[int],
    places: Sequence[int],
    causal: bool,
    window: tuple[int, int] = (-1, -1),
    factors: Tensor | None = None,
) -> list[Tensor]:
    """`dense_gradients` of each packed sequence alone, tokens [t, heads, d] of q, k, v, dout; 0 where padding is.

    `factors` [1, h, t, t] multiply the probabilities of the whole pack.
    """
    results = [torch.zeros_like(whole[i]) for i in (3, 0, 1, 2)]
    for start, length in zip(accumulate(places, initial=0), lengths, strict=False):
        if length:
            alone = slice(start, start + length)
            of_these = None if factors is None else factors[:, :, alone, alone]
            found = dense_gradients(*(x[alone].unsqueeze(1) for x in whole), causal, window, factors=of_these)
            for result, part in zip(results, found, strict=True):
                result[alone] = part.squeeze(1)
    return results


def batch_first(x: Tensor) -> Tensor:
    """The same numbers [s, b, ...], sequence after sequence in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)
