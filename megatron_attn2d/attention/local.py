"""Attention of a whole sequence on one rank: the 1 x 1 grid, where a kernel needs no tiles and no merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_attn2d.attention.kernels import Kernel


def local_attention(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, causal: bool, scale: float) -> Tensor:
    """Attend q [s, b, h, d] to k [s, b, g, d] and v [s, b, g, dv]; a single rank's two chunks are the sequence."""
    out: Tensor = _LocalAttention.apply(q, k, v, kernel, causal, scale)
    return out


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, causal: bool, scale: float) -> Tensor:
        out, lse = kernel.forward(q, k, v, causal=causal, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = kernel, causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        kernel, causal, scale = ctx.call
        # Kernels that take the output derive delta from it themselves.
        delta = lse if kernel.needs_out else (grads[0].to(lse.dtype) * out).sum(-1).permute(1, 2, 0)
        return (*kernel.backward(grads[0], q, k, v, out, lse, delta, causal=causal, scale=scale), None, None, None)
