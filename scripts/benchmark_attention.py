#!/usr/bin/env python3
"""Time attention2d, our ring and Transformer Engine's context parallelism side by side, forward and backward.

    python scripts/benchmark_attention.py                          # all GPUs of this host
    python scripts/benchmark_attention.py --ranks 16 --nodes       # 16 emulated one-GPU nodes
    python scripts/benchmark_attention.py --graphs --seq 16384     # and as CUDA graphs
    python scripts/benchmark_attention.py --alone --seq 16384      # and one call at a time, with the CPU's part of it
    python scripts/benchmark_attention.py --device cpu --ranks 4 --seq 4096 --modes ring attention2d

Every mode gets the same tensors in the same run: bf16 (fp32 on CPU), causal, one sequence. A figure is the median over
repeats of the slowest rank; MiB is the peak of allocated memory above the inputs, outputs and gradients included, on
the hungriest rank. With --nodes each rank poses as a host of its own: NCCL talks over loopback sockets.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_modes import Attention, add_arguments, build_grids, build_modes, spawn
from torch import Tensor


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--seq", nargs="+", type=int, default=[16384, 65536, 131072], help="tokens of the sequence")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=3, help="calls before the first timed one")
    parser.add_argument("--seconds", type=float, default=0, help="fewer repeats of what takes longer; 0: never fewer")
    parser.add_argument("--inner", type=int, default=0, help="calls a repeat, back to back; 0: about 40 ms worth")
    parser.add_argument("--forward", action="store_true", help="forward only")
    parser.add_argument("--graphs", action="store_true", help="time each mode as a replayed CUDA graph too")
    parser.add_argument("--alone", action="store_true", help="time calls with nothing queued before them too")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw a PNG here")
    args = parser.parse_args()
    spawn(run_rank, args)
    if args.plot:
        plot(json.loads(args.json.read_text()), args.plot)


def run_rank(rank: int, args: argparse.Namespace) -> None:
    """All cases on one rank; rank 0 prints."""
    grids = build_grids(args)
    rows: list[dict[str, Any]] = []
    if rank == 0 and args.device == "cuda":
        print(
            f"{args.ranks} ranks on {torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {torch.__version__}"
        )
    for heads in args.heads:
        h, g = map(int, heads.split("/"))
        for seq in args.seq:
            for name, attention in build_modes(args, h, g, grids):
                for graphed in (False, True) if args.graphs else (False,):
                    try:
                        alone = args.alone and not graphed and not args.forward
                        row = measure(attention, seq, h, g, args, graphed, alone)
                    except (RuntimeError, AssertionError, ValueError) as error:
                        row = {"failed": str(error).strip().splitlines()[0][:90]}
                        if os.environ.get("DEBUG"):
                            traceback.print_exc()
                        if isinstance(error, torch.cuda.OutOfMemoryError):
                            torch.cuda.empty_cache()
                    case = {"ranks": args.ranks, "nodes": args.nodes, "seq": seq, "heads": heads}
                    rows.append({**case, "mode": name + (", graph" if graphed else ""), **row})
                    if rank == 0:
                        show(rows[-1], rows)
    if rank == 0 and args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def measure(
    attention: Attention,
    seq: int,
    h: int,
    g: int,
    args: argparse.Namespace,
    graphed: bool = False,
    alone: bool = False,
) -> dict[str, float]:
    """Milliseconds and MiB of one mode; with `alone` also those of `unqueued`."""
    *leaves, dout = inputs(seq, h, g, args)
    for x in leaves:
        x.requires_grad_(not args.forward)

    def call() -> None:
        out = attention(*leaves)
        if not args.forward:
            torch.autograd.grad(out, leaves, dout)

    for _ in range(args.warmup):
        call()
    transient = peak(call) if args.device == "cuda" else 0.0
    timed_call = captured(call) if graphed else call
    once = max(timed(timed_call, 1, args.device), 1e-3)
    inner = args.inner or max(1, int(40 / once))
    fitting = int(args.seconds * 1e3 / (inner * once)) if args.seconds else args.repeats
    times = [timed(timed_call, inner, args.device) for _ in range(max(1, min(fitting, args.repeats)))]
    row = {
        "ms": statistics.median(times),
        "spread": (max(times) - min(times)) / min(times),
        "mib": slowest(transient, args.device),
    }
    if alone:
        row |= unqueued(attention, leaves, dout, args)
    return row


def unqueued(attention: Attention, leaves: list[Tensor], dout: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Medians over 3 x repeats of a call that finds the GPU idle, ms: the CPU's forward and backward, and all of it."""
    calls = []
    for _ in range(3 * args.repeats):
        slowest(0.0, args.device)  # all ranks start together, nothing is queued
        begin = time.perf_counter()
        out = attention(*leaves)
        forward = time.perf_counter()
        torch.autograd.grad(out, leaves, dout)
        backward = time.perf_counter()
        if args.device == "cuda":
            torch.cuda.synchronize()
        calls.append((forward - begin, backward - forward, time.perf_counter() - begin))
    names = ("cpu_forward_ms", "cpu_backward_ms", "alone_ms")
    medians = (statistics.median(column) * 1e3 for column in zip(*calls, strict=True))
    return {name: slowest(ms, args.device) for name, ms in zip(names, medians, strict=True)}


def inputs(seq: int, h: int, g: int, args: argparse.Namespace) -> list[Tensor]:
    """q, k, v and the output's gradient of this rank, the same in every call: [seq / ranks, 1, heads, head dim]."""
    torch.manual_seed(dist.get_rank())
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    sizes = [(seq // args.ranks, 1, n, args.head_dim) for n in (h, g, g, h)]
    return [torch.randn(size, device=args.device, dtype=dtype) for size in sizes]


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, NCCL's watchdog above all, go on meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph.replay


def peak(call: Callable[[], None]) -> float:
    """MiB that a call allocates at its peak above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def timed(call: Callable[[], None], inner: int, device: str) -> float:
    """Milliseconds a call on the slowest rank, which all ranks agree on."""
    slowest(0.0, device)  # all ranks start together
    return slowest(alone(call, inner, device), device)


def alone(call: Callable[[], object], inner: int, device: str) -> float:
    """Milliseconds a call on this rank, of `inner` back to back."""
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(inner):
            call()
        return (time.perf_counter() - begin) * 1e3 / inner
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(inner):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / inner


def slowest(value: float, device: str) -> float:
    """The largest value of all ranks."""
    highest = torch.tensor([value], device=device, dtype=torch.float64)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest.item()


def show(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print a row; the speed-up is against Transformer Engine's p2p, or the ring, of the same case."""
    head = f"{row['ranks']:3d} ranks  S={row['seq']:7d}  h={row['heads']:6s} {row['mode']:32s}"
    if "failed" in row:
        print(head, row["failed"], flush=True)
        return
    same = [r for r in rows if (r["seq"], r["heads"]) == (row["seq"], row["heads"]) and "ms" in r]
    base = next((r for r in same if r["mode"] == "TE p2p"), next((r for r in same if r["mode"] == "ring"), None))
    speed = f"{base['ms'] / row['ms']:5.2f}x {base['mode']}" if base else ""
    print(f"{head} {row['ms']:9.3f} ms (+-{row['spread'] * 50:4.1f}%) {row['mib']:8.0f} MiB  {speed}", flush=True)
    if "alone_ms" in row:
        cpu = f"CPU forward {row['cpu_forward_ms']:.2f}, backward {row['cpu_backward_ms']:.2f} ms"
        print(f"{'':{len(head)}} a call alone {row['alone_ms']:.3f} ms; {cpu}", flush=True)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed over Transformer Engine's p2p by case, one bar a mode (the best grid of attention2d)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((r["heads"], r["seq"]) for r in rows))
    series: dict[str, dict[Any, float]] = {}
    for row in rows:
        if "ms" in row:
            best = series.setdefault(row["mode"].split()[0] if "attention2d" in row["mode"] else row["mode"], {})
            case = (row["heads"], row["seq"])
            best[case] = min(best.get(case, float("inf")), row["ms"])
    base = series.get("TE p2p") or series["ring"]
    figure, axes = plt.subplots(figsize=(1.6 * len(cases) + 3, 4.2))
    width = 0.8 / len(series)
    for i, (mode, times) in enumerate(series.items()):
        at = [c for c, case in enumerate(cases) if case in times and case in base]
        axes.bar([c + i * width for c in at], [base[cases[c]] / times[cases[c]] for c in at], width, label=mode)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([c + 0.4 - width / 2 for c in range(len(cases))], [f"h={h}\n{s // 1024}K" for h, s in cases])
    axes.set_ylabel("speed relative to " + ("Transformer Engine p2p" if "TE p2p" in series else "ring"))
    axes.set_title(
        f"Attention forward + backward, {rows[0]['ranks']} ranks"
        + (", one emulated node each" if rows[0]["nodes"] else "")
    )
    axes.set_ylim(0, 1.25 * axes.dataLim.y1)  # room for the legend
    axes.legend(ncols=5, fontsize=8, loc="upper center")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
