"""Ring attention in the zigzag layout (Liu et al., arXiv 2310.01889): keys and values travel, queries stay.

At step j a rank holds the keys and values of the rank j before it in the ring. It attends them as a tile of its own
queries and sends them on meanwhile. In the backward pass the gradients of keys and values travel one step behind them
and reach their owner last. Every rank receives 2(P-1)/x shards of Q's size forward and 4(P-1)/x backward, with x query
heads per key head.

Legend as in `attention2d`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.attention.call import Call, Results, prepare, run
from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.kernels.base import BackwardRows
from megatron_attn2d.attention.layout import tile_plan
from megatron_attn2d.attention.merge import accumulation_dtype, merge_partials, row_statistics
from megatron_attn2d.attention.messages import Pending, send_receive
from megatron_attn2d.attention.packing import Totals
from megatron_attn2d.attention.tile import Tile, attend, attend_diagonal, differentiate, differentiate_diagonal

_KEYS, _GRADIENTS = 0, 1


@torch.compiler.disable  # a compiler would get merges in place wrong
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
    results: Results | None = None,
    label: str = "ring attention",
) -> Tensor:
    """Attention of the whole sequence over a ring of the ranks of `group` (None: this rank alone).

    Arguments, result and errors are those of `attention2d`. A rank's rank in the zigzag layout is its rank in `group`.
    """
    if not (group is None or isinstance(group, dist.ProcessGroup)):
        raise ValueError(f"group is a {type(group).__name__}, not a process group: pass that of the context ranks")
    call, q, k, v = prepare(
        q,
        k,
        v,
        (group,),
        1 if group is None else group.size(),
        causal=causal,
        window=window,
        sink=sink,
        dropout=dropout,
        cu_seqlens=cu_seqlens,
        cu_seqlens_padded=cu_seqlens_padded,
        max_seqlen=max_seqlen,
        softmax_scale=softmax_scale,
        backend=backend,
        label=label,
    )
    out = run(RingSchedule(call, group), q, k, v, sink, results)
    return out if call.packing is None else out.squeeze(1)


@dataclass(frozen=True)
class RingSchedule:
    """The schedule of a ring.

    Attributes:
        call: what is asked for.
        group: the ranks, in the order of the ring; None for one rank.
    """

    call: Call
    group: dist.ProcessGroup | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Schedule.forward`; the log-sum-exp comes by half of the rows, [2, b, h, n]."""
        q, k, v = (_halves(x) for x in (q, k, v))
        wide, op = accumulation_dtype(q.dtype), self.call.op
        out = torch.zeros((*q.shape[:4], v.size(4)), dtype=wide, device=q.device)
        lse = torch.full((2, *q.shape[2:4], q.size(1)), -torch.inf, dtype=wide, device=q.device)
        for _, tile, keys in self._rounds(k, v, "forward"):
            others = attend(tile, op, *tile.in_order([q], False), *tile.in_order(keys, False))
            own = attend_diagonal(tile, op, q, k, v)
            for half, total in enumerate(out):
                outs, lses = others.outs[half] + own.outs[half], others.lses[half] + own.lses[half]
                if outs:
                    merge_partials([[total, *outs]], [[lse[half], *lses]], [total], [lse[half]])
        return out.flatten(0, 1).to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, want_delta: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `Schedule.backward`."""
        q, k, v, dout, out = (_halves(x) for x in (q, k, v, dout, out))
        op = self.call.op
        statistics = lse.unsqueeze(1)
        if want_delta or not op.kernel.needs_out:
            statistics = row_statistics(dout, out, lse)
        rows = BackwardRows.of(op.kernel, statistics, q, dout, out)
        dq = torch.zeros_like(q, dtype=lse.dtype)
        home: list[Tensor] = []  # gradients of the own keys and values from the own queries: they stay
        gradients, pending = home, Pending()
        for step, tile, keys in self._rounds(k, v, "backward"):
            others = differentiate(tile, op, tile.halves_in_order(rows), tile.in_order(keys, False))
            own = differentiate_diagonal(tile, op, rows, k, v)
            partial = [torch.zeros_like(k), torch.zeros_like(v)]
            totals = ((dq, others.dq, own.dq), (partial[0], others.dk, own.dk), (partial[1], others.dv, own.dv))
            for total, *found in totals:
                for slots in found:
                    for half, parts in enumerate(slots):
                        for part in parts:
                            total[half].add_(part)
            if step == 0:
                home = partial
                continue
            pending.wait()
            if step > 1:
                partial = [local.add_(passed) for local, passed in zip(partial, gradients, strict=True)]
            gradients, pending = self._send_recv(partial, _GRADIENTS, f"dk, dv at step {step} of the backward pass")
        pending.wait()
        if self._size > 1:
            home = [local.add_(passed) for local, passed in zip(home, gradients, strict=True)]
        dk, dv = home
        delta = statistics[:, 1] if want_delta else None
        return dq.flatten(0, 1).to(q.dtype), dk.flatten(0, 1), dv.flatten(0, 1), delta

    def _rounds(self, k: Tensor, v: Tensor, direction: str) -> Iterator[tuple[int, Tile, list[Tensor]]]:
        """Number, tile, keys and values of each step. While a step computes, the keys and values of the next travel.

        The caller empties the list of keys and values, so that their memory is free for the step after.
        """
        travelling, pending = [k, v], Pending()
        for step in range(self._size):
            pending.wait()
            at_hand = travelling
            if step + 1 < self._size:
                what = f"k, v at step {step}" + (" of the backward pass" if direction == "backward" else "")
                travelling, pending = self._send_recv(at_hand, _KEYS, what)
            yield step, self._tile(step), at_hand

    def _tile(self, step: int) -> Tile:
        """The tile of the own queries and the step's keys; in the first step it has the diagonal too."""
        sequences, band = self.call.sequences, self.call.band
        plan = tile_plan((self._rank,), ((self._rank - step) % self._size,), sequences.mask(band))
        return Tile(plan, sequences, band, self._rank)

    def _send_recv(self, tensors: list[Tensor], kind: int, what: str) -> tuple[list[Tensor], Pending]:
        """Start to send tensors to the next rank and to receive the previous rank's."""
        assert self.group is not None
        ranks = dist.get_process_group_ranks(self.group)
        next_rank, previous = ranks[(self._rank + 1) % self._size], ranks[self._rank - 1]
        arriving = [torch.empty_like(x) for x in tensors]
        # With two ranks both neighbours are one rank: keys and gradients in flight at once need tags of their own.
        sends, receives = ([(peer, x) for x in side] for peer, side in ((next_rank, tensors), (previous, arriving)))
        what = f"{self.call.label}, ring of ranks {ranks}: {what}"
        return arriving, send_receive(self.group, sends, receives, kind, what)

    @property
    def _size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def _rank(self) -> int:
        return 0 if self.group is None else self.group.rank()


def _halves(shard: Tensor) -> Tensor:
    """[s/cp, ...] -> [2, n, ...], contiguous."""
    return shard.contiguous().unflatten(0, (2, -1))
