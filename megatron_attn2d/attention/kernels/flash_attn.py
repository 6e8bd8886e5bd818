"""FlashAttention-4 (the `flash-attn-4` package), whose kernels for Hopper and newer are written in CuTe.

Measured on H100 at 16K-token chunks: a tenth faster than cuDNN forward and backward, and the only one here whose
deterministic backward pass costs a few percent and no gigabytes. Its functions below autograd take and return the
log-sum-exp. The first call for a head dim compiles for some seconds. So does the first with a table of segments, and
once more the first with a table of more than 256.

Segments of a few rows go to a kernel of ours (`triton.short`), many of them to a block. Here each takes blocks of its
own, and a block of fp32 sums in the backward pass.

With grouped heads the backward pass adds dK and dV up in fp32 buffers of its own, [keys, g, d] and [keys, g, dv]: twice
the bytes of both gradients, for as long as the call takes. dQ has such a buffer in any case.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megatron_attn2d.attention.kernels.base import BackwardRows, Gradients, Outputs, Request, Softmax
from megatron_attn2d.attention.kernels.triton.kernel import installed as triton_installed
from megatron_attn2d.attention.layout import CAUSAL, Band
from megatron_attn2d.attention.segments import Segments

_HEAD_DIMS = (64, 96, 128, 192, 256)  # it takes others too, with wrong gradients for 80 (4.0.0b36 on H100)
_LATENT = (192, 128)  # of multi-latent attention
_BLOCKS = 257  # more rows or keys than one block has
# Query rows, of which a block of FlashAttention-4 has 128 forward, 64 or 80 backward. Of the bounds 0, 16, 32, 64 and
# 128 on H200 64 is the fastest or within 0.03 ms of it, forward and backward together (`docs/attention_kinds.md`).
_SHORT = 64
_FEW = 128  # fewer short segments than that are not worth calls of their own


class FlashAttention4Kernel:
    """FlashAttention-4 on Hopper."""

    name = "flash_attn_4"
    needs_out = True
    deterministic = True  # on request: it follows torch.use_deterministic_algorithms

    @staticmethod
    def refusal(request: Request) -> str | None:
        """Why the kernel can't serve the request, or None."""
        if request.dropout:
            return "has no dropout of probabilities by position"
        if request.dtype not in (torch.bfloat16, torch.float16):
            return "serves bfloat16 and float16"
        dims = request.head_dim, request.v_head_dim
        if dims not in [(dim, dim) for dim in _HEAD_DIMS] and (dims != _LATENT or request.grouped):
            return (
                f"serves head dims {', '.join(map(str, _HEAD_DIMS))}, the same for queries and values, and without "
                f"grouped heads {_LATENT[0]} with {_LATENT[1]}"
            )
        if not _installed():
            return "needs the package flash-attn-4"
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
            return "serves Hopper GPUs so far"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, band: Band, softmax: Softmax) -> Outputs:
        """See `Kernel.forward`."""
        from flash_attn.cute.interface import _flash_attn_fwd

        out = torch.empty((*q.shape[:3], v.size(3)), dtype=q.dtype, device=q.device)
        _, lse, *_ = _flash_attn_fwd(
            *map(_bshd, (q, k, v)), softmax_scale=softmax.scale, return_lse=True, out=_bshd(out), **_mask(band)
        )
        return out, lse

    def backward(self, rows: BackwardRows, k: Tensor, v: Tensor, band: Band, softmax: Softmax) -> Gradients:
        """See `Kernel.backward`."""
        from flash_attn.cute.interface import _flash_attn_bwd

        q, dout, lse, _, out = rows
        assert out is not None
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        _flash_attn_bwd(
            *map(_bshd, (q, k, v, out, dout)),
            lse.contiguous(),
            softmax_scale=softmax.scale,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dq=_bshd(dq),
            dk=_bshd(dk),
            dv=_bshd(dv),
            **_mask(band),
        )
        return dq, dk, dv

    def forward_segments(
        self, q: Tensor, k: Tensor, v: Tensor, table: Segments, softmax: Softmax, into: Outputs
    ) -> None:
        """See `Kernel.forward_segments`."""
        long, short = _by_length(table, softmax.scale)
        if short is not None:
            from megatron_attn2d.attention.kernels.triton import short as short_segments

            short_segments.attend(q, k, v, short, softmax.scale, into)
        if long is None or long.most_q == 0:
            return
        from flash_attn.cute.interface import _flash_attn_fwd

        out, lse = into
        _flash_attn_fwd(
            *(q, k, v),
            softmax_scale=softmax.scale,
            return_lse=True,
            out=out,
            lse=lse,
            **_places(long),
            **_mask(long.band),
        )

    def backward_segments(
        self, rows: BackwardRows, k: Tensor, v: Tensor, table: Segments, softmax: Softmax, into: Gradients
    ) -> None:
        """See `Kernel.backward_segments`."""
        q, dout, lse, _, out = rows
        assert out is not None
        long, short = _by_length(table, softmax.scale)
        if short is not None:
            from megatron_attn2d.attention.kernels.triton import short as short_segments

            short_segments.differentiate(rows, k, v, short, softmax.scale, into)
        if long is None or long.most_q == 0:
            return
        from flash_attn.cute.interface import _flash_attn_bwd

        deterministic = torch.are_deterministic_algorithms_enabled()
        # Only the deterministic pass has counters for every block of the longest segment. Where one block would do for
        # all of them, another kernel is compiled: bounds beyond the largest block leave one.
        bounds = (max(long.most_q, _BLOCKS), max(long.most_k, _BLOCKS)) if deterministic else (None, None)
        _flash_attn_bwd(
            *(q, k, v, out, dout, lse),
            softmax_scale=softmax.scale,
            deterministic=deterministic,
            max_seqlen_q=bounds[0],
            max_seqlen_k=bounds[1],
            **dict(zip(("dq", "dk", "dv"), into, strict=True)),
            **_places(long),
            **_mask(long.band),
        )


@cache
def _installed() -> bool:
    try:
        return find_spec("flash_attn.cute") is not None and find_spec("cutlass") is not None
    except ModuleNotFoundError:  # no flash_attn at all
        return False


def _by_length(table: Segments, scale: float) -> tuple[Segments | None, Segments | None]:
    """Segments for FlashAttention-4, and those so short that a block of it would be empty but for a few rows."""
    if scale <= 0 or not triton_installed():
        return table, None
    return table.by_length(_SHORT, _FEW)


def _mask(band: Band) -> dict[str, Any]:
    return {"causal": band == CAUSAL, "window_size_left": band.left, "window_size_right": band.right}


def _places(table: Segments) -> dict[str, Tensor]:
    """The table as it takes them: beside lengths, running totals are but the starts."""
    return {
        "cu_seqlens_q": table.q_starts,
        "cu_seqlens_k": table.k_starts,
        "seqused_q": table.q_lengths,
        "seqused_k": table.k_lengths,
    }


def _bshd(x: Tensor) -> Tensor:
    """[s, b, h, d] -> [b, s, h, d], a view."""
    return x.transpose(0, 1)
