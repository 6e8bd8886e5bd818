"""Ring attention in the zigzag layout (Liu et al., arXiv 2310.01889): keys and values travel, queries stay.

At step j a rank holds the keys and values of the rank j places before it, attends them as a tile of its own queries and
sends them on meanwhile. Backward, the gradients of keys and values travel one step behind them and come home last.
Every rank receives 2(P-1)/g shards forward and 4(P-1)/g backward, however many ranks there are.

Legend as in `attention2d`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.attention.checks import check_shards
from megatron_attn2d.attention.exchange import Pending, launch
from megatron_attn2d.attention.kernels import Kernel, choose_kernel
from megatron_attn2d.attention.layout import LOWER, UPPER, tile_plan
from megatron_attn2d.attention.merge import accumulation_dtype, merge_partials, row_statistics
from megatron_attn2d.attention.tile import Queries, attend, attend_diagonal, differentiate, differentiate_diagonal

_KEYS, _GRADIENTS = 0, 1


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup | None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    backend: str = "auto",
    label: str = "ring attention",
) -> Tensor:
    """Attention of the whole sequence over a ring of the ranks of `group` (None: this rank alone).

    Arguments, result and errors are those of `attention2d`; a rank's place in the zigzag layout is its rank in `group`.
    """
    check_shards(q, k, v)
    kernel = choose_kernel(backend, q.device.type, q.dtype, q.size(3), v.size(3))
    scale = 1.0 / sqrt(q.size(3)) if softmax_scale is None else softmax_scale
    out: Tensor = _RingAttention.apply(q, k, v, _Ring(group, causal, kernel, scale, label))
    return out


@dataclass(frozen=True)
class _Ring:
    group: dist.ProcessGroup | None
    causal: bool
    kernel: Kernel
    scale: float
    label: str

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def pass_on(self, tensors: list[Tensor], kind: int, what: str) -> tuple[list[Tensor], Pending]:
        """Start to send tensors to the next rank and to receive the previous rank's."""
        assert self.group is not None
        ranks = dist.get_process_group_ranks(self.group)
        next_rank, previous = ranks[(self.rank + 1) % self.size], ranks[self.rank - 1]
        arriving = [torch.empty_like(x) for x in tensors]
        # With two ranks both neighbours are one rank: keys and gradients in flight at once need tags of their own.
        sends, receives = [(next_rank, x) for x in tensors], [(previous, x) for x in arriving]
        return arriving, launch(self.group, sends, receives, kind, f"{self.label}, ring of ranks {ranks}: {what}")


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> Tensor:
        out, lse = _forward(q, k, v, ring)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return (*_backward(grads[0], q, k, v, out, lse, ctx.ring), None)


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
        plan = tile_plan((ring.rank,), ((ring.rank - step) % ring.size,), ring.causal)
        halves, seen = [chunk.half for chunk in plan.queries], len(plan.keys)
        tile = attend(plan, ring.kernel, ring.scale, own_q[halves[0] :], keys[:seen], values[:seen])
        diagonal = attend_diagonal(plan, ring.kernel, ring.scale, own_q, own_k, own_v)
        partials = [
            *zip(halves, tile.outs, tile.lses, strict=True),
            *zip((LOWER, UPPER), diagonal.outs, diagonal.lses, strict=plan.diagonal),
        ]
        for half, part, part_lse in partials:
            merge_partials([[out[half], part]], [[lse[half], part_lse]], [out[half]], [lse[half]])
    return out.flatten(0, 1).to(q.dtype), lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ring: _Ring
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, like them."""
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
        plan = tile_plan((ring.rank,), ((ring.rank - step) % ring.size,), ring.causal)
        first, seen = plan.queries[0].half, len(plan.keys)
        tile = differentiate(plan, ring.kernel, ring.scale, own.starting(first), keys[:seen], values[:seen])
        diagonal = differentiate_diagonal(plan, ring.kernel, ring.scale, own, own_k, own_v)
        for half, part in (*zip((LOWER, UPPER)[first:], tile.dq, strict=True), *enumerate(diagonal.dq)):
            dq[half] += part
        partial = [torch.zeros_like(own_k), torch.zeros_like(own_v)]
        for total, by_slot, own_part in zip(partial, (tile.dk, tile.dv), (diagonal.dk, diagonal.dv), strict=True):
            for half, part in (*enumerate(by_slot), *enumerate(own_part)):
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
    return dq.flatten(0, 1).to(q.dtype), dk.flatten(0, 1), dv.flatten(0, 1)


def _chunks(shard: Tensor) -> Tensor:
    """[s/cp, ...] -> [2, n, ...], contiguous."""
    return shard.contiguous().unflatten(0, (2, -1))
