"""Attention of whole sequences on one rank, the 1 x 1 grid: no tiles, no messages and no merge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_attn2d.attention.call import Call
from megatron_attn2d.attention.kernels.base import BackwardRows, Softmax
from megatron_attn2d.attention.segmented import Positions, attend_tables, differentiate_tables
from megatron_attn2d.attention.tables import whole_tables


@dataclass(frozen=True)
class SingleRank:
    """The schedule of a rank that has all tokens of its heads: its two chunks are the whole sequence.

    Attributes:
        call: what is asked for; its sequences are on one rank.
    """

    call: Call

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Schedule.forward`: the output, contiguous as on every grid, and its log-sum-exp [b, h, s]."""
        call = self.call
        if call.sequences.plain:
            out, lse = call.op.kernel.forward(q, k, v, call.band, self._softmax(q, k))
            return out.contiguous(), lse
        tables = whole_tables(call.sequences, call.band)
        (out,), (lse,) = attend_tables(tables, call.op, self._positions(q, k), q, k, v, zeros=True)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, want_delta: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `Schedule.backward`."""
        call, kernel = self.call, self.call.op.kernel
        dout = dout.contiguous()  # that of a sum has one number
        delta = None
        if want_delta or not kernel.needs_out:
            delta = (dout.to(lse.dtype) * out).sum(-1).permute(1, 2, 0)
        rows = BackwardRows(q, dout, lse, delta, out)
        if call.sequences.plain:
            return *kernel.backward(rows, k, v, call.band, self._softmax(q, k)), delta
        tables = whole_tables(call.sequences, call.band)
        found: list[Tensor] = []
        (dq,) = differentiate_tables(
            tables, call.op, self._positions(q, k), rows, [k, v], lambda _, gradients: found.extend(gradients)
        )
        dk, dv = found or (torch.zeros_like(k), torch.zeros_like(v))  # all is padding
        return dq, dk, dv, delta

    def _positions(self, q: Tensor, k: Tensor) -> Positions:
        if self.call.op.dropout is None:  # which alone asks for them
            return None
        rows, keys = (torch.arange(x.size(0), device=x.device).unsqueeze(0) for x in (q, k))
        return rows, keys

    def _softmax(self, q: Tensor, k: Tensor) -> Softmax:
        positions, op = self._positions(q, k), self.call.op
        if op.dropout is None or positions is None:
            return Softmax(op.scale)
        batch = q.size(1)
        rows, keys = (x.expand(batch, -1) for x in positions)
        return Softmax(op.scale, op.dropout.at(torch.arange(batch, device=q.device), q.size(2), rows, keys))
