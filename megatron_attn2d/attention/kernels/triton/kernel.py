"""The package's attention as a kernel of the seam: slower than vendors', but with any band, dropout and fp32."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_attn2d.attention.kernels.base import BackwardRows, Gradients, Outputs, Request, Softmax
from megatron_attn2d.attention.layout import Band
from megatron_attn2d.attention.segments import Segments


class TritonKernel:
    """Attention in linear memory for any band; see the package's docstring."""

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
        if not installed():
            return "needs the package triton"
        if torch.cuda.is_available():
            from megatron_attn2d.attention.kernels.triton.launch import AMPERE_SHARED_BYTES, shared_bytes

            if shared_bytes(torch.device("cuda", torch.cuda.current_device())) < AMPERE_SHARED_BYTES:
                return "needs a GPU with the shared memory of an A100"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, band: Band, softmax: Softmax) -> Outputs:
        """See `Kernel.forward`."""
        from megatron_attn2d.attention.kernels.triton.forward import attend

        sq, batch, heads, _ = q.shape
        out = q.new_empty((sq, batch, heads, v.size(3)))
        lse = q.new_empty((batch, heads, sq), dtype=torch.float32)
        q, k, v = map(_rows_contiguous, (q, k, v))
        attend(q, k, v, band, softmax, (out, lse.flatten(0, 1)))
        return out, lse

    def backward(self, rows: BackwardRows, k: Tensor, v: Tensor, band: Band, softmax: Softmax) -> Gradients:
        """See `Kernel.backward`."""
        from megatron_attn2d.attention.kernels.triton.backward import differentiate

        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (rows.q, k, v))
        rows = rows.each(_rows_contiguous, lambda x: x.contiguous().flatten(0, 1))
        differentiate(rows, _rows_contiguous(k), _rows_contiguous(v), band, softmax, (dq, dk, dv))
        return dq, dk, dv

    def forward_segments(
        self, q: Tensor, k: Tensor, v: Tensor, table: Segments, softmax: Softmax, into: Outputs
    ) -> None:
        """See `Kernel.forward_segments`."""
        from megatron_attn2d.attention.kernels.triton.forward import attend

        (out, lse), (q, k, v) = into, map(_of_one, (q, k, v))
        attend(q, k, v, table.band, softmax, (out.unsqueeze(1), lse), table)

    def backward_segments(
        self, rows: BackwardRows, k: Tensor, v: Tensor, table: Segments, softmax: Softmax, into: Gradients
    ) -> None:
        """See `Kernel.backward_segments`."""
        from megatron_attn2d.attention.kernels.triton.backward import differentiate

        dq, dk, dv = (x.unsqueeze(1) for x in into)
        rows = rows.each(_of_one, lambda x: x)
        differentiate(rows, _of_one(k), _of_one(v), table.band, softmax, (dq, dk, dv), table)


def _rows_contiguous(x: Tensor) -> Tensor:
    """Itself or a copy whose last dim is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _of_one(x: Tensor) -> Tensor:
    """[rows, heads, d] -> [rows, 1, heads, d], the last dim contiguous."""
    return _rows_contiguous(x).unsqueeze(1)


@cache
def installed() -> bool:
    """Whether the package is there."""
    return find_spec("triton") is not None
