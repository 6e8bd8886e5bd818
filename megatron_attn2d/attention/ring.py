"""Ring attention in the zigzag layout (Liu et al., arXiv 2310.01889): keys and values travel, queries stay.

At step j a rank holds the keys and values of the rank j places before it, attends them as a tile of its own queries and
sends them on meanwhile. Backward, the gradients of keys and values travel one step behind them and come home last.
Every rank receives 2(P-1)/x shards of Q's size forward and 4(P-1)/x backward, with x query heads a key head.

Legend as in `attention2d`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.attention.agreement import check_agreement, facts_of
from megatron_attn2d.attention.checks import check_first_derivative, check_sink, mask_of, packed, request_of
from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.kernels import choose_kernel
from megatron_attn2d.attention.layout import LOWER, UPPER, Mask, TilePlan, tile_plan
from megatron_attn2d.attention.merge import (
    accumulation_dtype,
    apply_sink,
    merge_partials,
    row_statistics,
    sink_gradient,
)
from megatron_attn2d.attention.messages import Pending, send_receive
from megatron_attn2d.attention.saved import without_neighbours
from megatron_attn2d.attention.tile import (
    Queries,
    Scores,
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
    cu_seqlens: Sequence[int] | None = None,
    cu_seqlens_padded: Sequence[int] | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    label: str = "ring attention",
) -> Tensor:
    """Attention of the whole sequence over a ring of the ranks of `group` (None: this rank alone).

    Arguments, result and errors are those of `attention2d`; a rank's place in the zigzag layout is its rank in `group`.
    """
    size = 1 if group is None else group.size()
    packing = packed(cu_seqlens, cu_seqlens_padded, (q, k, v), size)
    if packing is not None:
        q, k, v = (packing.by_half(x, size) for x in (q, k, v))
    mask = mask_of(q, k, v, causal, window, size, 1, packing)
    check_sink(sink, q)
    dropout = Dropout.of_call(dropout)
    kernel = choose_kernel(backend, request_of(q, v, mask, dropout))
    scale = 1.0 / sqrt(q.size(3)) if softmax_scale is None else softmax_scale
    check_agreement((group,), facts_of(q, k, v, mask, scale, sink, dropout), q.device, label)
    q, k, v = without_neighbours(q, k, v)
    ring = _Ring(group, mask, Scores(kernel, scale, size, dropout), label)
    out: Tensor = _RingAttention.apply(q, k, v, sink, ring)
    return out if packing is None else packing.by_sequence(out, size)


@dataclass(frozen=True)
class _Ring:
    group: dist.ProcessGroup | None
    mask: Mask
    scores: Scores
    label: str

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def tile(self, step: int) -> tuple[TilePlan, slice, slice]:
        """The plan of a step's tile, and which of the two own queries and of the two keys at hand it uses."""
        plan = tile_plan((self.rank,), ((self.rank - step) % self.size,), self.mask)
        rows, keys = (
            slice(chunks[0].half, chunks[-1].half + 1) if chunks else slice(0, 0)
            for chunks in (plan.queries, plan.keys)
        )
        return plan, rows, keys

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
    """The output [s/cp, b, h, dv] and its log-sum-exp [2, b, h, n]."""
    own_q, own_k, own_v = (_chunks(x) for x in (q, k, v))
    wide = accumulation_dtype(q.dtype)
    out = torch.zeros((*own_q.shape[:4], v.size(3)), dtype=wide, device=q.device)
    lse = torch.full((2, q.size(1), q.size(2), own_q.size(1)), -torch.inf, dtype=wide, device=q.device)

    travelling, pending = [own_k, own_v], Pending()
    for step in range(ring.size):
        pending.wait()
        keys, values = travelling
        if step + 1 < ring.size:
            travelling, pending = ring.pass_on(travelling, _KEYS, f"k, v at step {step}")
        plan, rows, seen = ring.tile(step)
        halves = [chunk.half for chunk in plan.queries]
        tile = attend(plan, ring.scores, own_q[rows], keys[seen], values[seen])
        diagonal = attend_own(plan, ring.scores, own_q, own_k, own_v, ring.rank)
        partials = [
            *zip(halves, tile.outs, tile.lses, strict=True),
            *zip((LOWER, UPPER), diagonal.outs, diagonal.lses, strict=plan.diagonal),
        ]
        for half, parts, part_lses in partials:
            merge_partials([[out[half], *parts]], [[lse[half], *part_lses]], [out[half]], [lse[half]])
    return out.flatten(0, 1).to(q.dtype), lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sink: Tensor | None, ring: _Ring
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sink, like them."""
    own_q, own_k, own_v, own_dout, own_out = (_chunks(x) for x in (q, k, v, dout, out))
    delta = row_statistics(own_dout, own_out, lse)[:, 1]
    own = Queries(own_q, own_dout, lse, delta, own_out)
    dq = torch.zeros_like(own_q, dtype=lse.dtype)

    travelling, pending = [own_k, own_v], Pending()
    home: list[Tensor] = []  # gradients of the own keys and values from the own queries: they stay
    gradients, gradients_pending = home, Pending()
    for step in range(ring.size):
        pending.wait()
        keys, values = travelling
        if step + 1 < ring.size:
            travelling, pending = ring.pass_on(travelling, _KEYS, f"k, v at step {step} of the backward pass")
        plan, rows, seen = ring.tile(step)
        tile = differentiate(plan, ring.scores, own.slots(rows), keys[seen], values[seen])
        diagonal = differentiate_own(plan, ring.scores, own, own_k, own_v, ring.rank)
        for half, parts in (*zip(range(2)[rows], tile.dq, strict=True), *enumerate(diagonal.dq)):
            for part in parts:
                dq[half] += part
        partial = [torch.zeros_like(own_k), torch.zeros_like(own_v)]
        for total, by_slot, own_part in zip(partial, (tile.dk, tile.dv), (diagonal.dk, diagonal.dv), strict=True):
            for half, parts in (*zip(range(2)[seen], by_slot, strict=True), *enumerate(own_part)):
                for part in parts:
                    total[half] += part
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


def _chunks(shard: Tensor) -> Tensor:
    """[s/cp, ...] -> [2, n, ...], contiguous."""
    return shard.contiguous().unflatten(0, (2, -1))
