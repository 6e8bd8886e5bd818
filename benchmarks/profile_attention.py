#!/usr/bin/env python3
"""Profile attention2d: export a trace for Perfetto or chrome://tracing, and say how much communication kernels hide.

    python benchmarks/profile_attention.py --seq 65536 --heads 12/12 --grids 2x1 --trace trace.json

Rank 0's trace is written. A message's kernel counts as hidden while an attention, merge or sum kernel runs on the same
GPU; the time that it waits for its peer to arrive counts as communication too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attention_modes import add_arguments, add_sizes, build_modes, spawn

Span = tuple[float, float]


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    add_sizes(parser, 65536, ["12/12"])
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--trace", type=Path, required=True, help="write the trace here; one more per mode and grid")
    args = parser.parse_args()
    if args.device != "cuda":
        parser.error("--device cpu: there is nothing to overlap, choose cuda")
    spawn(run_rank, args)


def run_rank(rank: int, args: argparse.Namespace) -> None:
    """Profile every mode; rank 0 writes and prints."""
    h, g = map(int, args.heads[0].split("/"))
    for i, (name, attention) in enumerate(build_modes(args, h, g, {})):
        q, k, v = (
            torch.randn(args.seq // args.ranks, 1, n, args.head_dim, device="cuda", dtype=torch.bfloat16)
            for n in (h, g, g)
        )
        dout, leaves = torch.randn_like(q), [x.requires_grad_() for x in (q, k, v)]
        for _ in range(3):
            torch.autograd.grad(attention(*leaves), leaves, dout)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(args.calls):
                torch.autograd.grad(attention(*leaves), leaves, dout)
            torch.cuda.synchronize()
        if rank:
            continue
        path = args.trace if i == 0 else args.trace.with_stem(f"{args.trace.stem}_{i}")
        profile.export_chrome_trace(str(path))
        messages, kernels = spans(json.loads(path.read_text())["traceEvents"])
        total = sum(end - begin for begin, end in messages)
        print(
            f"S={args.seq} h={args.heads[0]} {name:28s} messages {total / args.calls / 1e3:8.3f} ms per call, "
            f"{hidden(messages, kernels) / total if total else 0.0:4.0%} hidden; {path}",
            flush=True,
        )


def spans(events: Sequence[dict[str, Any]]) -> tuple[list[Span], list[Span]]:
    """When NCCL's kernels ran and when others did, microseconds."""
    kernels = [e for e in events if e.get("cat") == "kernel"]
    messages, others = (
        [(e["ts"], e["ts"] + e["dur"]) for e in kernels if e["name"].startswith("nccl") == nccl]
        for nccl in (True, False)
    )
    return messages, others


def hidden(messages: Sequence[Span], kernels: Sequence[Span]) -> float:
    """How long of `messages` any of `kernels` ran."""
    union: list[Span] = []
    for begin, end in sorted(kernels):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((begin, end))
    return sum(max(0.0, min(end, stop) - max(begin, start)) for begin, end in messages for start, stop in union)


if __name__ == "__main__":
    main()
