"""Transformer Engine's fused attention: cuDNN with larger and unequal head dims than torch gives access to.

Its own attention module is made of `fused_attn_fwd` and `fused_attn_bwd`. They return and take the log-sum-exp, as
attention of one tile needs.
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megatron_attn2d.attention.kernels.base import BackwardRows, Gradients, Outputs, Request, Softmax
from megatron_attn2d.attention.kernels.ragged import inside, put, running
from megatron_attn2d.attention.kernels.reference import ReferenceKernel
from megatron_attn2d.attention.layout import CAUSAL, Band
from megatron_attn2d.attention.segments import Segments


class TransformerEngineKernel:
    """cuDNN's fused attention through Transformer Engine."""

    name = "transformer_engine"
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
        if request.dtype not in (torch.bfloat16, torch.float16):
            return "serves bfloat16 and float16"
        if head_dim % 8 or v_head_dim % 8 or max(head_dim, v_head_dim) > 256:
            return "serves head dims up to 256 in multiples of 8"
        if find_spec("transformer_engine") is None:
            return "needs the package transformer-engine"
        try:
            functions = _functions()
        except (ImportError, OSError) as error:  # a library of cuDNN that does not fit the one torch has loaded, say
            return f"can't load Transformer Engine: {error}"
        if "fake_dtype" not in inspect.signature(functions.fused_attn_bwd).parameters:
            return "needs Transformer Engine 2.20 or a version with its arguments"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, band: Band, softmax: Softmax) -> Outputs:
        """See `Kernel.forward`."""
        if q.size(0) == k.size(0) == 1:  # which cuDNN refuses
            return ReferenceKernel().forward(q, k, v, band, softmax)
        causal = band == CAUSAL
        te = _functions()
        q, k, v = (x.contiguous() for x in (q, k, v))
        out, (lse, *_) = te.fused_attn_fwd(
            True,
            q.size(0),
            k.size(0),
            *_lengths(q, k),
            q,
            k,
            v,
            q.dtype,
            te.FusedAttnBackend["F16_arbitrary_seqlen"],
            attn_scale=softmax.scale,
            qkv_layout="sbhd_sbhd_sbhd",
            o_format="sbhd",
            **_mask(causal),
        )
        return out.view(*q.shape[:3], v.size(3)), lse.squeeze(-1)

    def backward(self, rows: BackwardRows, k: Tensor, v: Tensor, band: Band, softmax: Softmax) -> Gradients:
        """See `Kernel.backward`."""
        q, dout, lse, _, out = rows
        if q.size(0) == k.size(0) == 1:
            return ReferenceKernel().backward(rows, k, v, band, softmax)
        causal = band == CAUSAL
        assert out is not None
        te = _functions()
        q, k, v, out, dout = (x.contiguous() for x in (q, k, v, out, dout))
        dq, dk, dv, *_ = te.fused_attn_bwd(
            q.size(0),
            k.size(0),
            *_lengths(q, k),
            q,
            k,
            v,
            out,
            dout,
            dout.dtype,
            # log-sum-exp and the state of the random numbers, which only dropout reads
            [lse.contiguous().unsqueeze(-1), torch.zeros(2, dtype=torch.int64, device=q.device)],
            te.FusedAttnBackend["F16_arbitrary_seqlen"],
            attn_scale=softmax.scale,
            qkv_layout="sbhd_sbhd_sbhd",
            o_format="sbhd",
            do_format="sbhd",
            dqkv_layout="sbhd_sbhd_sbhd",
            **_mask(causal),
        )
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)

    def forward_segments(
        self, q: Tensor, k: Tensor, v: Tensor, table: Segments, softmax: Softmax, into: Outputs
    ) -> None:
        """See `Kernel.forward_segments`."""
        if table.most_q == 0:
            return
        te = _functions()
        q, k, v = (x.contiguous() for x in (q, k, v))
        found, (found_lse, *_) = te.fused_attn_fwd(
            True,
            *_bounds(table),
            *_totals(table),
            *(q, k, v, q.dtype),
            te.FusedAttnBackend["F16_arbitrary_seqlen"],
            attn_scale=softmax.scale,
            qkv_layout="thd_thd_thd",
            o_format="thd",
            **_places(table),
        )
        out, lse = into
        rows = inside(table.q_starts, table.q_lengths, q.size(0))
        put(out, found.view(out.shape), rows)
        put(lse.t(), found_lse.squeeze(-1), rows)

    def backward_segments(
        self, rows: BackwardRows, k: Tensor, v: Tensor, table: Segments, softmax: Softmax, into: Gradients
    ) -> None:
        """See `Kernel.backward_segments`."""
        if table.most_q == 0:
            return
        q, dout, lse, _, out = rows
        assert out is not None
        te = _functions()
        q, k, v, out, dout = (x.contiguous() for x in (q, k, v, out, dout))
        found_q, *found_kv = te.fused_attn_bwd(
            *_bounds(table),
            *_totals(table),
            *(q, k, v, out, dout, dout.dtype),
            [lse.t().contiguous().unsqueeze(-1), torch.zeros(2, dtype=torch.int64, device=q.device)],
            te.FusedAttnBackend["F16_arbitrary_seqlen"],
            attn_scale=softmax.scale,
            qkv_layout="thd_thd_thd",
            o_format="thd",
            do_format="thd",
            dqkv_layout="thd_thd_thd",
            **_places(table),
        )[:3]
        dq, *dkv = into
        put(dq, found_q.view(dq.shape), inside(table.q_starts, table.q_lengths, q.size(0)))
        keys = inside(table.k_starts, table.k_lengths, k.size(0))
        for room, found in zip(dkv, found_kv, strict=True):
            put(room, found.view(room.shape), keys)


def _totals(table: Segments) -> tuple[Tensor, Tensor]:
    """Running totals of the lengths alone."""
    return running(table.q_lengths), running(table.k_lengths)


def _places(table: Segments) -> dict[str, Any]:
    """Where segments start, and their mask."""
    causal = table.band == CAUSAL
    return {
        "cu_seqlens_q_padded": table.q_starts,
        "cu_seqlens_kv_padded": table.k_starts,
        "attn_mask_type": "padding_causal" if causal else "padding",
        "window_size": (-1, 0) if causal else (-1, -1),
    }


def _bounds(table: Segments) -> tuple[int, int]:
    """Lengths of the longest segments, rounded up: cuDNN makes a plan for each, which takes a second."""
    q, k = (1 << max(most - 1, 63).bit_length() for most in (table.most_q, table.most_k))
    return q, k


@cache
def _functions() -> Any:
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    return fused_attn


def _mask(causal: bool) -> dict[str, Any]:
    return {"attn_mask_type": "causal" if causal else "no_mask", "window_size": (-1, 0) if causal else (-1, -1)}


def _lengths(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return _cumulative(q.size(1), q.size(0), q.device), _cumulative(k.size(1), k.size(0), k.device)


@cache
def _cumulative(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, (batch + 1) * length, length, device=device, dtype=torch.int32)
