"""Ring attention in the zigzag layout (Liu et al., arXiv 2310.01889): keys and values travel, queries stay.

At step j a rank holds the keys and values of the rank j places before it, attends them as a tile of its own queries and
sends them on meanwhile. Backward, the gradients of keys and values travel one step behind them and come home last.
Every rank receives 2(P-1)/x shards of Q's size forward and 4(P-1)/x backward, with x query heads per key head.

Legend as in `attention2d`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.attention.agreement import check_agreement, facts_of
from megatron_attn2d.attention.checks import check_first_derivative, check_sink, packed, request_of, sequences_of
from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.kernels import choose_kernel
from megatron_attn2d.attention.layout import LOWER, UPPER, Band, tile_plan
from megatron_attn2d.attention.merge import (
    accumulation_dtype,
    apply_sink,
    merge_partials,
    row_statistics,
    sink_gradient,
)
from megatron_attn2d.attention.messages import Pending, send_receive
from megatron_attn2d.attention.packing import Packing, Totals
from megatron_attn2d.attention.saved import without_neighbours
from megatron_attn2d.attention.tile import (
    Queries,
    Scores,
    Tile,
    attend,
    attend_own,
    differentiate,
    differentiate_own,
)

_KEYS, _GRADIENTS = 0, 1


@torch.compiler.disable  # a compiler would get wrong what is merged in place
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup | None,
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    sink: Tensor | None = None,
    dropout: Dropout | None = None,
    cu_seqlens: Totals | None = None,
    cu_seqlens_padded: Totals | None = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    label: str = "ring attention",
) -> Tensor:
    """Attention of the whole sequence over a ring of the ranks of `group` (None: this rank alone).

    Arguments, result and errors are those of `attention2d`; a rank's place in the zigzag layout is its rank in `group`.
    """
    if not (group is None or isinstance(group, dist.ProcessGroup)):
        raise ValueError(f"group is a {type(group).__name__}, not a process group: pass that of the context ranks")
    size = 1 if group is None else group.size()
    packing = packed(cu_seqlens, cu_seqlens_padded, max_seqlen, (q, k, v), size)
    if packing is not None:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    sequences, band = sequences_of(q, k, v, causal, window, size, 1, packing)
    check_sink(sink, q)
    dropout = Dropout.of_call(dropout)
    kernel = choose_kernel(backend, request_of(q, v, sequences, band, dropout))
    scale = 1.0 / sqrt(q.size(3)) if softmax_scale is None else softmax_scale
    check_agreement((group,), facts_of(q, k, v, sequences, band, scale, sink, dropout), q.device, label)
    q, k, v = without_neighbours(q, k, v)
    ring = _Ring(group, sequences, band, Scores(kernel, scale, dropout), label)
    out: Tensor = _RingAttention.apply(q, k, v, sink, ring)
    return out if packing is None else out.squeeze(1)


@dataclass(frozen=True)
class _Ring:
    group: dist.ProcessGroup | None
    sequences: Packing
    band: Band
    scores: Scores
    label: str

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def tile(self, step: int) -> Tile:
        """The tile of the own queries and the keys at hand; in the first step of the own chunks to themselves too."""
        plan = tile_plan((self.rank,), ((self.rank - step) % self.size,), self.sequences.mask(self.band))
        return Tile(plan, self.sequences, self.band, self.rank)

    def pass_on(self, tensors: list[Tensor], kind: int, what: str) -> tuple[list[Tensor], Pending]:
        """Start to send tensors to the next rank and to receive the previous rank's."""
        assert self.group is not None
        ranks = dist.get_process_group_ranks(self.group)
        next_rank, previous = ranks[(self.rank + 1) % self.size], ranks[self.rank - 1]
        arriving = [torch.empty_like(x) for x in tensors]
        # With two ranks both neighbours are one rank: keys and gradients in flight at once need tags of their own.
        sends, receives = ([(peer, x) for x in side] for peer, side in ((next_rank, tensors), (previous, arriving)))
        what = f"{self.label}, ring of ranks {ranks}: {what}"
        return arriving, send_receive(self.group, sends, receives, kind, what)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, ring: _Ring) -> Tensor:
        out, lse = _forward(q, k, v, ring)
        if sink is not None:
            apply_sink(out, lse, sink)
        ctx.save_for_backward(q, k, v, out, lse, sink)
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        q, k, v, out, lse, sink = ctx.saved_tensors
        return (*_backward(grads[0], q, k, v, out, lse, sink, ctx.ring), None)


def _forward(q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> tuple[Tensor, Tensor]:
    """The output [s/cp, b, h, dv] and its log-sum-exp, of the two halves of its rows, [2, b, h, n]."""
    own_q, own_k, own_v = (_halves(x) for x in (q, k, v))
    wide = accumulation_dtype(q.dtype)
    out = torch.zeros((*own_q.shape[:4], v.size(3)), dtype=wide, device=q.device)
    lse = torch.full((2, q.size(1), q.size(2), own_q.size(1)), -torch.inf, dtype=wide, device=q.device)

    travelling, pending = [own_k, own_v], Pending()
    for step in range(ring.size):
        pending.wait()
        at_hand = travelling
        if step + 1 < ring.size:
            travelling, pending = ring.pass_on(travelling, _KEYS, f"k, v at step {step}")
        tile = ring.tile(step)
        others = attend(tile, ring.scores, *tile.in_order([own_q, *at_hand], False))
        own = attend_own(tile, ring.scores, own_q, own_k, own_v)
        for half in (LOWER, UPPER):
            outs, lses = others.outs[half] + own.outs[half], others.lses[half] + own.lses[half]
            if outs:
                merge_partials([[out[half], *outs]], [[lse[half], *lses]], [out[half]], [lse[half]])
    return out.flatten(0, 1).to(q.dtype), lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sink: Tensor | None, ring: _Ring
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sink, like them."""
    own_q, own_k, own_v, own_dout, own_out = (_halves(x) for x in (q, k, v, dout, out))
    delta = row_statistics(own_dout, own_out, lse)[:, 1]
    queries = Queries(own_q, own_dout, lse, delta, own_out)
    dq = torch.zeros_like(own_q, dtype=lse.dtype)

    travelling, pending = [own_k, own_v], Pending()
    home: list[Tensor] = []  # gradients of the own keys and values from the own queries: they stay
    gradients, gradients_pending = home, Pending()
    for step in range(ring.size):
        pending.wait()
        at_hand = travelling
        if step + 1 < ring.size:
            travelling, pending = ring.pass_on(travelling, _KEYS, f"k, v at step {step} of the backward pass")
        tile = ring.tile(step)
        in_order = queries if tile.tables is None else queries.in_a_row()
        others = differentiate(tile, ring.scores, in_order, tile.in_order(list(at_hand), False))
        own = differentiate_own(tile, ring.scores, queries, own_k, own_v)
        partial = [torch.zeros_like(own_k), torch.zeros_like(own_v)]
        totals = ((dq, others.dq, own.dq), (partial[0], others.dk, own.dk), (partial[1], others.dv, own.dv))
        for total, *found in totals:
            for slots in found:
                for half, parts in enumerate(slots):
                    for part in parts:
                        total[half].add_(part)
        if step == 0:
            home = partial
            continue
        gradients_pending.wait()
        if step > 1:
            partial = [mine.add_(theirs) for mine, theirs in zip(partial, gradients, strict=True)]
        gradients, gradients_pending = ring.pass_on(partial, _GRADIENTS, f"dk, dv at step {step} of the backward pass")
    gradients_pending.wait()
    if ring.size > 1:
        home = [mine.add_(theirs) for mine, theirs in zip(home, gradients, strict=True)]
    dk, dv = home
    dsink = None if sink is None else sink_gradient(lse, delta, sink)
    return dq.flatten(0, 1).to(q.dtype), dk.flatten(0, 1), dv.flatten(0, 1), dsink


def _halves(shard: Tensor) -> Tensor:
    """[s/cp, ...] -> [2, n, ...], contiguous."""
    return shard.contiguous().unflatten(0, (2, -1))
