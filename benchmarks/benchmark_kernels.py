#!/usr/bin/env python3
"""Time the attention kernels of one device side by side: full, causal, in a window, packed, and with dropout.

    python benchmarks/benchmark_kernels.py                                   # on a GPU
    python benchmarks/benchmark_kernels.py --head-dims 192x128 --masks full packed --kernels flash_attn_4 triton
    python benchmarks/benchmark_kernels.py --device cpu --tokens 256 --heads 2 --documents 4

One sequence or one pack, as many keys as queries. A row has forward / backward in ms, the mean of --calls back to back
after two others, their TFLOP/s by the pairs of query and key that see each other, and the seconds of both first calls,
in which some kernels compile.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from attention_kinds import Pack
from attention_timing import alone

from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.kernels import choose_kernel
from megatron_attn2d.attention.kernels.base import BackwardRows, Request, Softmax
from megatron_attn2d.attention.layout import CAUSAL, FULL, Band
from megatron_attn2d.attention.segments import Segments

KERNELS = ("flash_attn_4", "cudnn", "transformer_engine", "flash", "triton", "reference")
MASKS = ("full", "causal", "window", "packed", "packed_full", "packed_window", "dropout", "packed_dropout")
P = 0.1  # of dropout


def main() -> None:
    """Print a row for each head dim, mask and kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="--heads if left out")
    parser.add_argument("--head-dims", nargs="+", default=["64", "128"], help="192x128: of queries and of values")
    parser.add_argument("--window", type=int, default=1024, help="tokens before a token that it sees, in those cases")
    parser.add_argument("--documents", type=int, default=64, help="of a pack, many short and a few long")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS[:-1])
    parser.add_argument("--calls", type=int, default=10)
    args = parser.parse_args()
    if args.device == "cpu":
        args.kernels = ["reference"]
    args.kv_heads = args.kv_heads or args.heads
    print("dims     mask            kernel                  ms: forward / backward    TFLOP/s       first calls, s")
    for dims in args.head_dims:
        for mask in args.masks:
            for name in args.kernels:
                print(f"{dims:8s} {mask:15s} {name:20s} {row(name, dims, mask, args)}", flush=True)


def row(name: str, dims: str, mask: str, args: argparse.Namespace) -> str:
    """What is measured, or why the kernel does not serve."""
    d, dv = (int(dims.split("x")[i]) for i in (0, -1))
    band = FULL if mask.endswith("full") else Band(args.window, 0) if mask.endswith("window") else CAUSAL
    request = Request(
        args.device,
        torch.bfloat16 if args.device == "cuda" else torch.float32,
        d,
        dv,
        windows=band not in (FULL, CAUSAL),
        dropout=mask.endswith("dropout"),
        grouped=args.heads > args.kv_heads,
        segments=mask.startswith("packed"),
    )
    try:
        kernel = choose_kernel(name, request)
    except ValueError as refusal:
        return str(refusal).split(" (")[0]
    q, k, v, dout = (
        torch.randn(args.tokens, 1, heads, width, device=args.device, dtype=request.dtype)
        for heads, width in ((args.heads, d), (args.kv_heads, d), (args.kv_heads, dv), (args.heads, dv))
    )
    how = Softmax(d**-0.5)
    if request.dropout:
        positions = torch.arange(args.tokens, device=args.device)[None]
        seed = torch.ones(1, dtype=torch.int64, device=args.device)
        how = Softmax(how.scale, Dropout(P, seed).at(positions[0, :1], args.heads, positions, positions))
    lengths = (args.tokens,)
    if not request.segments:
        attend = partial(kernel.forward, q, k, v, band, how)
    else:
        lengths = Pack.drawn(args.tokens, args.documents, 1).lengths
        starts = np.cumsum([0, *lengths[:-1]])
        table = Segments.of(np.stack((starts, lengths, starts, lengths), 1), band, args.tokens, args.tokens, q.device)
        q, k, v, dout = (x.squeeze(1) for x in (q, k, v, dout))
        out, lse = torch.empty_like(dout), q.new_empty((args.heads, args.tokens), dtype=torch.float32)
        attend = partial(kernel.forward_segments, q, k, v, table, how, (out, lse))
    result, first, forward = timed(attend, args)
    out, lse = result or (out, lse)
    delta = (out.float() * dout.float()).sum(-1).movedim(0, -1).contiguous()
    rows = BackwardRows(q, dout, lse, delta, out)
    if not request.segments:
        differentiate = partial(kernel.backward, rows, k, v, band, how)
    else:
        into = tuple(map(torch.empty_like, (q, k, v)))
        differentiate = partial(kernel.backward_segments, rows, k, v, table, how, into)
    _, first_backward, backward = timed(differentiate, args)
    gflop = sum(scores(int(n), band) for n in lengths) * args.heads * 2 * (d + dv) / 1e9
    return (
        f"{forward:8.3f} / {backward:8.3f}    {gflop / forward:5.0f} / {2.5 * gflop / backward:5.0f}    "
        f"{first:5.1f} / {first_backward:5.1f}"
    )


def scores(tokens: int, band: Band) -> int:
    """How many keys all queries of a sequence see."""
    rows = np.arange(tokens)
    first = 0 if band.left is None else np.maximum(rows - band.left, 0)
    last = tokens - 1 if band.right is None else np.minimum(rows + band.right, tokens - 1)
    return int(np.broadcast_to(last - first + 1, tokens).sum())


def timed(call: Callable[[], Any], args: argparse.Namespace) -> tuple[Any, float, float]:
    """What the first call returned and its seconds; milliseconds per call of those back to back."""
    begin = time.perf_counter()
    result = call()
    if args.device == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - begin
    call()
    return result, first, alone(call, args.calls, args.device)


if __name__ == "__main__":
    main()
