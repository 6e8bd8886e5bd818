"""Attention of a rank's queries to its own shard of cached keys, and partial results of all ranks made one.

A partial result is, per row, its output and its log-sum-exp, which is -inf for a row that sees no key. They are merged
by `attention.merge`. What ranks exchange of a prompt's later chunks is rounded to the queries' dtype before; what they
exchange of a new token is not.

Legend: n rows, h query heads, g key heads, d head dim, dv the values' head dim, P context ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_attn2d.attention.kernels.base import Kernel, Softmax
from megatron_attn2d.attention.layout import CAUSAL, FULL, Band
from megatron_attn2d.attention.merge import accumulation_dtype, apply_sink, merge_partials

_SCORES = 1 << 26
"""Scores that a masked block of queries may have at once: 256 MiB in fp32."""


class Rows:
    """The rows of a chunk's queries, to which results over more and more keys are added.

    Attributes:
        queries: [n, h, d].
        out: the result so far, [n, h, dv] in fp32 (fp64 for fp64 queries).
        lse: its log-sum-exp, [h, n] in the same dtype.
    """

    def __init__(self, queries: Tensor, value_dim: int) -> None:
        """For queries [n, h, d] and values of dim dv, `value_dim`; no row has seen a key."""
        number, heads, _ = queries.shape
        dtype = accumulation_dtype(queries.dtype)
        self.queries = queries
        self.out = queries.new_zeros((number, heads, value_dim), dtype=dtype)
        self.lse = queries.new_full((heads, number), -torch.inf, dtype=dtype)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merges the result out [n, h, dv], lse [h, n] of some rows into what they have."""
        outs, lses = [self.out[rows], out], [self.lse[:, rows], lse]
        self.out[rows], self.lse[:, rows] = merged(outs, lses)

    def attend(self, rows: slice, k: Tensor, v: Tensor, band: Band, kernel: Kernel, scale: float) -> None:
        """Adds attention of some rows to keys k [n, g, d] and values v [n, g, dv]; `band` is FULL or CAUSAL."""
        queries = self.queries[rows]
        if k.size(0) and queries.size(0):
            queries, k, v = (x.unsqueeze(1) for x in (queries, k, v))
            out, lse = kernel.forward(queries, k, v, band, Softmax(scale))
            self.add(rows, out.squeeze(1), lse.squeeze(0))

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
        [b, n, h, dv] and the log-sum-exp [b, h, n], in fp32 or wider; zeros and -inf where nothing is seen.
    """
    dtype = accumulation_dtype(q.dtype)
    grouped = q.to(dtype).unflatten(2, (k.size(2), -1))
    scores = torch.einsum("bngxd,bkgd->bgxnk", grouped, k.to(dtype)).mul_(scale)
    seen = seen if seen.dim() == 3 else seen.unsqueeze(0)
    scores.masked_fill_(~seen[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    reference = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    probabilities = scores.sub_(reference.unsqueeze(-1)).exp_()
    out = torch.einsum("bgxnk,bkgd->bngxd", probabilities, v.to(dtype))
    return out.flatten(2, 3), lse.flatten(1, 2)


def merged(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One result, [n, h, dv] and [h, n], of several of these shapes or of stacks [P, ...]; in the dtype of `lses`."""
    out = torch.empty(outs[0].shape[-3:], dtype=lses[0].dtype, device=lses[0].device)
    lse = lses[0].new_empty(lses[0].shape[-2:])
    # merge_partials has a batch dim: [n, 1, h, dv] and [1, h, n]
    merge_partials(
        [[x.unsqueeze(-3) for x in outs]], [[x.unsqueeze(-3) for x in lses]], [out.unsqueeze(1)], [lse.unsqueeze(0)]
    )
    return out, lse


def add_sink(out: Tensor, lse: Tensor, sink: Tensor | None) -> None:
    """Lets every row of out [n, h, dv], lse [h, n] also see a key of score `sink` [h] and value 0; changes both."""
    if sink is not None:
        apply_sink(out.unsqueeze(1), lse.unsqueeze(0), sink)
