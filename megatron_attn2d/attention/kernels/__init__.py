"""The kernel seam: the only place that knows which attention kernels exist and what they can do.

A kernel attends a rectangle without a mask or a square under the causal mask; some attend any band of a rectangle,
some drop probabilities, and some take a table of many such pieces in one call. It returns the log-sum-exp of the scores
beside the output, and its backward pass takes the log-sum-exp and delta over *all* keys, of which it sees some.

`choose_kernel` picks one for a request, once, and logs it. A request that the asked kernel can't serve is refused, and
the error names the kernels that can.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch

from megatron_attn2d.attention.kernels.base import Kernel, Request
from megatron_attn2d.attention.kernels.flash_attn import FlashAttention4Kernel
from megatron_attn2d.attention.kernels.reference import ReferenceKernel
from megatron_attn2d.attention.kernels.torch_sdpa import CudnnKernel, FlashKernel
from megatron_attn2d.attention.kernels.transformer_engine import TransformerEngineKernel
from megatron_attn2d.attention.kernels.triton.kernel import TritonKernel

__all__ = ["Kernel", "choose_kernel", "refusals"]

logger = logging.getLogger(__name__)


# In the order in which "auto" prefers them, but for `_preferred`.
_KERNELS = {
    kernel.name: kernel
    for kernel in (
        FlashAttention4Kernel,
        CudnnKernel,
        TransformerEngineKernel,
        FlashKernel,
        TritonKernel,
        ReferenceKernel,
    )
}


def choose_kernel(name: str, request: Request) -> Kernel:
    """The kernel `name`, or with "auto" the fastest one known to serve the request.

    Under torch.use_deterministic_algorithms (Megatron's --deterministic-mode) only kernels whose backward pass has a
    fixed order serve.

    Args:
        name: "auto", "flash_attn_4", "cudnn", "transformer_engine", "flash", "triton" or "reference".
        request: what the call needs.

    Raises:
        ValueError: if the name is unknown or that kernel can't serve the request.
    """
    deterministic = request.deterministic or torch.are_deterministic_algorithms_enabled()
    return _choose(name, replace(request, deterministic=deterministic))


def refusals(request: Request) -> dict[str, str | None]:
    """Why each kernel can't serve the request, in the order in which "auto" prefers them; None: it can.

    For a request of a CUDA device on a machine without one, what the installed packages serve.
    """

    def refusal(kernel: Any) -> str | None:
        if request.device != "cuda" and kernel is not ReferenceKernel:
            return "needs a CUDA device"
        if request.deterministic and not kernel.deterministic:
            return "has no deterministic backward pass, which torch.use_deterministic_algorithms asks for,"
        if request.segments and not hasattr(kernel, "forward_segments"):
            return "takes no tables of segments, of which packed sequences and windows on a grid are made"
        refused: str | None = kernel.refusal(request)
        return refused

    return {each: refusal(kernel) for each, kernel in _KERNELS.items()}


@lru_cache
def _choose(name: str, request: Request) -> Kernel:
    found = refusals(request)
    able = [each for each, refused in found.items() if refused is None]
    if name != "auto" and name not in _KERNELS:
        raise ValueError(f"backend={name!r} is no attention kernel: choose one of auto, {', '.join(_KERNELS)}")
    if name != "auto" and found[name] is not None:
        raise ValueError(f"backend={name!r} {found[name]} ({request}): choose one of auto, {', '.join(able)}")
    if not able:
        raise ValueError(f"no attention kernel serves {request}: reference {found['reference']}")
    chosen = _preferred(able, request) if name == "auto" else name
    if chosen == "reference" and request.device == "cuda":
        why = "; ".join(f"{each} {refused}" for each, refused in found.items() if refused is not None)
        logger.warning(
            "attention kernel: reference, slow, its memory grows with the square of tokens (%s): %s", request, why
        )
    else:
        logger.info("attention kernel: %s (%s)", chosen, request)
    return cast(Kernel, _KERNELS[chosen]())  # one that takes no tables is refused where they are asked for


def _preferred(able: list[str], request: Request) -> str:
    # FlashAttention-2 is made for Ampere: on H100 the Triton kernel is 1.2 to 1.4 times as fast (head dims 64 and 128,
    # 8K tokens, forward and backward), but slower with larger heads.
    if able[0] == "flash" and "triton" in able and max(request.head_dim, request.v_head_dim) <= 128:
        return "triton" if torch.cuda.get_device_capability()[0] >= 9 else "flash"
    return able[0]
