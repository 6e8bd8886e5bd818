"""Attention of a rank's queries to its own shard of cached keys, and partial results of all ranks made one.

A row of the result over a shard is its output and its log-sum-exp, [rows, h, dv] in fp32 and [rows, h], with a
log-sum-exp of -inf for a row that sees no key there. All merging is in fp32 (fp64 for fp64 inputs). What ranks exchange
of a prompt's later chunks is rounded to the queries' dtype before, what they exchange of a new token is not.

Legend: h query heads, g key heads, d head dim, dv the values' head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_attn2d.attention.kernels.base import Kernel, Softmax
from megatron_attn2d.attention.layout import CAUSAL, FULL, Band
from megatron_attn2d.attention.merge import accumulation_dtype

_SCORES = 1 << 26
"""Scores that a masked block of queries may have at once: 256 MiB in fp32."""


class Rows:
    """The rows of a chunk's queries, to which results over more and more keys are added."""

    def __init__(self, queries: Tensor, value_dim: int) -> None:
        """For queries [rows, h, d]."""
        dtype = accumulation_dtype(queries.dtype)
        self.queries = queries
        self.out = queries.new_zeros((*queries.shape[:2], value_dim), dtype=dtype)
        self.lse = queries.new_full(queries.shape[:2], -torch.inf, dtype=dtype)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merges the result out [n, h, dv], lse [n, h] of some rows into what they have."""
        held = self.lse[rows]
        total = torch.logaddexp(held, lse)
        reference = torch.where(total == -torch.inf, torch.zeros_like(total), total)
        kept, weight = (torch.exp(x - reference).unsqueeze(-1) for x in (held, lse))
        # A kernel leaves anything in the output of a row without a key, NaN included.
        added = torch.where(weight == 0, torch.zeros_like(weight), out.to(total.dtype) * weight)
        self.out[rows] = self.out[rows] * kept + added
        self.lse[rows] = total

    def attend(self, rows: slice, k: Tensor, v: Tensor, band: Band, kernel: Kernel, scale: float) -> None:
        """Adds attention of some rows to keys k [n, g, d] and values v [n, g, dv]; `band` is FULL or CAUSAL."""
        queries = self.queries[rows]
        if k.size(0) and queries.size(0):
            queries, k, v = (x.unsqueeze(1) for x in (queries, k, v))
            out, lse = kernel.forward(queries, k, v, band, Softmax(scale))
            self.add(rows, out.squeeze(1), lse.squeeze(0).t())

    def attend_piece(self, first: int, k: Tensor, v: Tensor, kernel: Kernel, scale: float) -> None:
        """Adds causal attention to keys that are the rows from `first` on themselves, n of them."""
        behind = first + k.size(0)
        self.attend(slice(first, behind), k, v, CAUSAL, kernel, scale)
        self.attend(slice(behind, None), k, v, FULL, kernel, scale)

    def attend_window(self, start: int, k: Tensor, v: Tensor, key_positions: Tensor, window: int, scale: float) -> None:
        """Adds attention of rows from position `start` on to keys at `key_positions` [n], at most `window` before."""
        number = self.queries.size(0)
        positions = torch.arange(start, start + number, device=k.device)
        near = (key_positions >= start - window) & (key_positions < start + number)
        k, v, key_positions = k[near], v[near], key_positions[near]
        if k.size(0) == 0:
            return
        step = max(1, _SCORES // (self.queries.size(1) * k.size(0)))
        for begin in range(0, number, step):
            rows = slice(begin, begin + step)
            distance = positions[rows, None] - key_positions
            out, lse = masked(
                self.queries[rows].unsqueeze(0), k[None], v[None], (distance >= 0) & (distance <= window), scale
            )
            self.add(rows, out[0], lse[0])


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend q [b, n, h, d] to k [b, keys, g, d] and v [b, keys, g, dv] where `seen`, [b, n, keys] or [n, keys].

    Returns:
        [b, n, h, dv] and the log-sum-exp [b, n, h], in fp32 or wider; zeros and -inf where nothing is seen.
    """
    dtype = accumulation_dtype(q.dtype)
    grouped = q.to(dtype).unflatten(2, (k.size(2), -1))
    scores = torch.einsum("bngxd,bkgd->bngxk", grouped, k.to(dtype)).mul_(scale)
    seen = seen if seen.dim() == 3 else seen.unsqueeze(0)
    scores.masked_fill_(~seen[:, :, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    reference = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    probabilities = scores.sub_(reference.unsqueeze(-1)).exp_()
    out = torch.einsum("bngxk,bkgd->bngxd", probabilities, v.to(dtype))
    return out.flatten(2, 3), lse.flatten(2)


def merged(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """One result of the ranks' results outs [P, rows, h, dv] and lses [P, rows, h]."""
    total = lses.logsumexp(0)
    reference = torch.where(total == -torch.inf, torch.zeros_like(total), total)
    weights = torch.exp(lses - reference).unsqueeze(-1)
    return torch.where(weights == 0, torch.zeros_like(outs), outs * weights).sum(0), total


def with_sink(out: Tensor, lse: Tensor, sink: Tensor | None) -> Tensor:
    """`out` [rows, h, dv] where every row also sees a key of score `sink` [h] and value 0."""
    if sink is None:
        return out
    scores = sink.to(lse.dtype)
    return out * torch.exp(lse - torch.logaddexp(lse, scores)).unsqueeze(-1)
