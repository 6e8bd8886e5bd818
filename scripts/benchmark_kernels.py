#!/usr/bin/env python3
"""Time the attention kernels of one device side by side: full, causal, in a window and with dropout.

    python scripts/benchmark_kernels.py                                   # on a GPU
    python scripts/benchmark_kernels.py --device cpu --tokens 256 --heads 2

One sequence, as many keys as queries; forward / backward in ms, the mean of --calls back to back after two others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from attention_timing import alone

from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.kernels import choose_kernel
from megatron_attn2d.attention.kernels.request import Request
from megatron_attn2d.attention.layout import CAUSAL, FULL, Band

KERNELS = ("flash_attn_4", "cudnn", "transformer_engine", "flash", "triton", "reference")
P = 0.1  # of dropout


def main() -> None:
    """Print a row for each head dim, mask and kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--window", type=int, default=1024, help="tokens before a token that it sees, in that case")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS[:-1])
    parser.add_argument("--calls", type=int, default=10)
    args = parser.parse_args()
    if args.device == "cpu":
        args.kernels = ["reference"]
    for head_dim in args.head_dims:
        for mask, band in {"full": FULL, "causal": CAUSAL, "window": Band(args.window, 0), "dropout": CAUSAL}.items():
            for name in args.kernels:
                print(f"{head_dim:4d}  {mask:8s} {name:20s} {row(name, head_dim, mask, band, args)}", flush=True)


def row(name: str, head_dim: int, mask: str, band: Band, args: argparse.Namespace) -> str:
    """Forward / backward in ms, or why the kernel does not serve."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    request = Request(
        args.device, dtype, head_dim, head_dim, windows=band not in (FULL, CAUSAL), dropout=mask == "dropout"
    )
    try:
        kernel = choose_kernel(name, request)
    except ValueError as refusal:
        return str(refusal).split(" (")[0]
    q, k, v, dout = (torch.randn(args.tokens, 1, args.heads, head_dim, device=args.device, dtype=dtype) for _ in "qkvo")
    how: dict[str, Any] = {"band": band, "scale": head_dim**-0.5}
    if mask == "dropout":
        positions = torch.arange(args.tokens, device=args.device)[None]
        seed = torch.ones(1, dtype=torch.int64, device=args.device)
        how["dropout"] = Dropout(P, seed).at(positions[0, :1], args.heads, positions, positions)
    out, lse = kernel.forward(q, k, v, **how)
    delta = (out.float() * dout.float()).sum(-1).permute(1, 2, 0).contiguous()
    forward = milliseconds(lambda: kernel.forward(q, k, v, **how), args)
    backward = milliseconds(lambda: kernel.backward(dout, q, k, v, out, lse, delta, **how), args)
    return f"{forward:8.3f} / {backward:8.3f}"


def milliseconds(call: Callable[[], object], args: argparse.Namespace) -> float:
    """The mean of calls back to back."""
    for _ in range(2):
        call()
    return alone(call, args.calls, args.device)


if __name__ == "__main__":
    main()
