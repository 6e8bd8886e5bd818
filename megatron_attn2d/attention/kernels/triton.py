"""Our own Triton kernel: slower than vendors' kernels, but it takes any band, drops probabilities and has fp32."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_attn2d.attention.dropout import KeepMask
from megatron_attn2d.attention.kernels.request import Request
from megatron_attn2d.attention.layout import Band


class TritonKernel:
    """Attention in linear memory for any band; see `triton_attention`."""

    name = "triton"
    needs_out = False
    deterministic = True

    @staticmethod
    def refusal(request: Request) -> str | None:
        """Why the kernel can't serve the request, or None."""
        if request.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return "serves bfloat16, float16 and float32"
        if max(request.head_dim, request.v_head_dim) > 256:
            return "serves head dims up to 256"
        if not _installed():
            return "needs the package triton"
        if torch.cuda.is_available():
            from megatron_attn2d.attention.triton_attention.launch import AMPERE_SHARED_BYTES, shared_bytes

            if shared_bytes(torch.device("cuda", torch.cuda.current_device())) < AMPERE_SHARED_BYTES:
                return "needs a GPU with the shared memory of an A100"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, band: Band, scale: float, dropout: KeepMask | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        from megatron_attn2d.attention import triton_attention

        return triton_attention.forward(q, k, v, band, scale, dropout)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor,
        delta: Tensor | None,
        *,
        band: Band,
        scale: float,
        dropout: KeepMask | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        from megatron_attn2d.attention import triton_attention

        assert delta is not None
        return triton_attention.backward(dout, q, k, v, lse, delta, band, scale, dropout)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
