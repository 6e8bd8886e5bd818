"""cuDNN's and FlashAttention's kernels as torch ships them, called below autograd for their log-sum-exp.

torch's public `scaled_dot_product_attention` neither returns the log-sum-exp nor takes one in its backward pass. The
operators that it is made of do; torch's operator schema (native_functions.yaml) lists them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_attn2d.attention.kernels.base import BackwardRows, Gradients, Outputs, Request, Softmax
from megatron_attn2d.attention.kernels.ragged import inside, put
from megatron_attn2d.attention.kernels.reference import ReferenceKernel
from megatron_attn2d.attention.layout import CAUSAL, Band
from megatron_attn2d.attention.segments import Segments

_HALF = (torch.bfloat16, torch.float16)
_aten = torch.ops.aten


class CudnnKernel:
    """cuDNN's fused attention: on Hopper about twice as fast as FlashAttention-2.

    Its deterministic backward pass is not offered: it keeps partial dQ per block of keys, gigabytes at long context.
    """

    name = "cudnn"
    needs_out = True
    deterministic = False

    @staticmethod
    def refusal(request: Request) -> str | None:
        """Why the kernel can't serve the request, or None."""
        head_dim, v_head_dim = request.head_dim, request.v_head_dim
        if request.dropout:
            return "has no dropout of probabilities by position"
        if request.windows:
            return "serves full and causal attention, no sliding windows"
        if request.dtype not in _HALF:
            return "serves bfloat16 and float16"
        if head_dim % 8 or v_head_dim % 8 or max(head_dim, v_head_dim) > 128:
            return "serves head dims up to 128 in multiples of 8"
        if not torch.backends.cudnn.is_available():
            return "needs cuDNN"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, band: Band, softmax: Softmax) -> Outputs:
        """See `Kernel.forward`."""
        if q.size(0) == k.size(0) == 1:  # which cuDNN refuses
            return ReferenceKernel().forward(q, k, v, band, softmax)
        causal = band == CAUSAL
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            _bhsd(q), _bhsd(k), _bhsd(v), None, True, 0.0, causal, False, scale=softmax.scale
        )
        return _sbhd(out), lse.squeeze(-1)

    def backward(self, rows: BackwardRows, k: Tensor, v: Tensor, band: Band, softmax: Softmax) -> Gradients:
        """See `Kernel.backward`."""
        q, dout, lse, _, out = rows
        if q.size(0) == k.size(0) == 1:
            return ReferenceKernel().backward(rows, k, v, band, softmax)
        causal = band == CAUSAL
        unused = torch.empty((), dtype=torch.int64, device=q.device)
        assert out is not None
        dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
            _bhsd(dout),
            _bhsd(q),
            _bhsd(k),
            _bhsd(v),
            _bhsd(out),
            lse.contiguous().unsqueeze(-1),
            unused,
            unused,
            None,
            None,
            None,
            q.size(0),
            k.size(0),
            0.0,
            causal,
            scale=softmax.scale,
        )
        return _sbhd(dq), _sbhd(dk), _sbhd(dv)


class FlashKernel:
    """FlashAttention-2 as torch ships it."""

    name = "flash"
    needs_out = True
    deterministic = True  # on request: torch passes torch.use_deterministic_algorithms on to it

    @staticmethod
    def refusal(request: Request) -> str | None:
        """Why the kernel can't serve the request, or None."""
        head_dim, v_head_dim = request.head_dim, request.v_head_dim
        if request.dropout:
            return "has no dropout of probabilities by position"
        if request.dtype not in _HALF:
            return "serves bfloat16 and float16"
        if head_dim != v_head_dim or head_dim % 8 or head_dim > 256:
            return "serves equal head dims up to 256 in multiples of 8"
        if not torch.backends.cuda.is_flash_attention_available():
            return "is not part of this torch build"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, band: Band, softmax: Softmax) -> Outputs:
        """See `Kernel.forward`."""
        out, lse, *_ = _aten._flash_attention_forward(
            *map(_bshd, (q, k, v)),
            None,
            None,
            q.size(0),
            k.size(0),
            0.0,
            band == CAUSAL,
            False,
            scale=softmax.scale,
            **_window(band),
        )
        return _bshd(out), lse

    def backward(self, rows: BackwardRows, k: Tensor, v: Tensor, band: Band, softmax: Softmax) -> Gradients:
        """See `Kernel.backward`."""
        q, dout, lse, _, out = rows
        unused = torch.empty((), dtype=torch.int64, device=q.device)
        assert out is not None
        dq, dk, dv = _aten._flash_attention_backward(
            _bshd(dout),
            _bshd(q),
            _bshd(k),
            _bshd(v),
            _bshd(out),
            lse.contiguous(),
            None,
            None,
            q.size(0),
            k.size(0),
            0.0,
            band == CAUSAL,
            unused,
            unused,
            scale=softmax.scale,
            **_window(band),
        )
        return _bshd(dq), _bshd(dk), _bshd(dv)

    def forward_segments(
        self, q: Tensor, k: Tensor, v: Tensor, table: Segments, softmax: Softmax, into: Outputs
    ) -> None:
        """See `Kernel.forward_segments`."""
        if table.most_q == 0:
            return
        totals = _without_gaps(table)
        found, found_lse, *_ = _aten._flash_attention_forward(
            *(q, k, v, *totals, table.most_q, table.most_k, 0.0, table.band == CAUSAL, False),
            scale=softmax.scale,
            **_window(table.band),
        )
        out, lse = into
        rows = inside(table.q_starts, table.q_lengths, q.size(0))
        put(out, found, rows)
        put(lse.t(), found_lse.t(), rows)

    def backward_segments(
        self, rows: BackwardRows, k: Tensor, v: Tensor, table: Segments, softmax: Softmax, into: Gradients
    ) -> None:
        """See `Kernel.backward_segments`."""
        if table.most_q == 0:
            return
        q, dout, lse, _, out = rows
        unused = torch.empty((), dtype=torch.int64, device=q.device)
        assert out is not None
        totals = _without_gaps(table)
        found_q, *found_kv = _aten._flash_attention_backward(
            *(dout, q, k, v, out, lse.contiguous(), *totals, table.most_q, table.most_k, 0.0, table.band == CAUSAL),
            *(unused, unused),
            scale=softmax.scale,
            **_window(table.band),
        )
        dq, *dkv = into
        put(dq, found_q, inside(table.q_starts, table.q_lengths, q.size(0)))
        keys = inside(table.k_starts, table.k_lengths, k.size(0))
        for room, found in zip(dkv, found_kv, strict=True):
            put(room, found, keys)


def _without_gaps(table: Segments) -> tuple[Tensor, Tensor]:
    """Running totals of queries and of keys, [3 S + 3].

    FlashAttention-2 takes where a sequence ends for where the next one begins. Rows between two segments are a sequence
    of their own without keys, and keys between them one without queries: both cost nothing.
    """
    q_begins, k_begins = table.q_starts[:-1], table.k_starts[:-1]
    q_ends, k_ends = q_begins + table.q_lengths, k_begins + table.k_lengths
    k_before = torch.nn.functional.pad(k_ends[:-1], (1, 0))  # where the keys of the segment before end
    q_totals = torch.stack((q_begins, q_begins, q_ends), 1).flatten()
    k_totals = torch.stack((k_before, k_begins, k_ends), 1).flatten()
    first, q_last, k_last = q_totals.new_zeros(1), table.q_starts[-1:], table.k_starts[-1:]
    q_totals = torch.cat((first, q_totals, q_last, q_last))
    k_totals = torch.cat((first, k_totals, k_ends[-1:], k_last))
    # An empty segment may start before the end of the one before it.
    return q_totals.cummax(0).values, k_totals.cummax(0).values


def _window(band: Band) -> dict[str, int]:
    """FlashAttention-2's bands end at the bottom right, as ours do; -1 is no end."""
    left, right = (-1 if end is None else end for end in band)
    return {"window_size_left": left, "window_size_right": right}


def _bhsd(x: Tensor) -> Tensor:
    """[s, b, h, d] -> [b, h, s, d]."""
    return x.permute(1, 2, 0, 3)


def _sbhd(x: Tensor) -> Tensor:
    """[b, h, s, d] -> [s, b, h, d]."""
    return x.permute(2, 0, 1, 3)


def _bshd(x: Tensor) -> Tensor:
    """[s, b, h, d] <-> [b, s, h, d]."""
    return x.transpose(0, 1)
