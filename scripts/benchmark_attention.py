#!/usr/bin/env python3
"""Time attention2d, our ring and Transformer Engine's context parallelism side by side, forward and backward.

    python scripts/benchmark_attention.py                          # all GPUs of this host
    python scripts/benchmark_attention.py --ranks 16 --nodes       # 16 emulated one-GPU nodes
    python scripts/benchmark_attention.py --device cpu --ranks 4 --seq 4096 --modes ring attention2d

Every mode gets the same tensors in the same run: bf16 (fp32 on CPU), causal, one sequence. A figure is the median over
repeats of the slowest rank; MiB is the peak of allocated memory above the inputs, outputs and gradients included, on
the hungriest rank. With --nodes each rank poses as a host of its own: NCCL talks over loopback sockets.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_attn2d import Grid, attention2d, ring_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2, help="context-parallel ranks")
    parser.add_argument("--nodes", action="store_true", help="pose as one node a rank")
    parser.add_argument("--seq", nargs="+", type=int, default=[16384, 65536, 131072], help="tokens of the sequence")
    parser.add_argument("--heads", nargs="+", default=["12/12", "16/2"], help="query/key heads")
    parser.add_argument("--modes", nargs="+", default=["te:p2p", "te:all_gather", "te:a2a", "ring", "attention2d"])
    parser.add_argument("--grids", nargs="*", help="RxC or UxRxC; default: all RxC of --ranks")
    parser.add_argument("--groups", nargs="+", type=int, default=[1], help="head groups of attention2d")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--inner", type=int, default=0, help="calls a repeat, back to back; 0: about 40 ms worth")
    parser.add_argument("--forward", action="store_true", help="forward only")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw a PNG here")
    args = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(run_rank, (args, port), nprocs=args.ranks)
    if args.plot:
        plot(json.loads(args.json.read_text()), args.plot)


def run_rank(rank: int, args: argparse.Namespace, port: int) -> None:
    """All cases on one rank; rank 0 prints."""
    if args.nodes:
        os.environ |= {
            "NCCL_HOSTID": f"node{rank}",
            "NCCL_SOCKET_IFNAME": "lo",
            "NCCL_P2P_DISABLE": "1",
            "NCCL_SHM_DISABLE": "1",
            "NCCL_NET": "Socket",
        }
    if args.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    grids = [tuple(map(int, g.split("x"))) for g in args.grids or []] or [
        (r, args.ranks // r) for r in range(1, args.ranks + 1) if args.ranks % r == 0
    ]
    assert dist.group.WORLD is not None
    built = {}
    for heads, rows, cols in ((1, *g) if len(g) == 2 else g for g in grids):
        name = f"{heads}x{rows}x{cols}" if heads > 1 else f"{rows}x{cols}"
        built[name] = Grid.from_group(dist.group.WORLD, rows=rows, cols=cols, heads=heads)
    rows: list[dict[str, Any]] = []
    for heads in args.heads:
        h, g = map(int, heads.split("/"))
        for seq in args.seq:
            for name, attention in modes(args, h, g, built):
                try:
                    row = measure(attention, seq, h, g, args)
                except (RuntimeError, AssertionError, ValueError) as error:
                    row = {"failed": str(error).strip().splitlines()[0][:90]}
                    if os.environ.get("DEBUG"):
                        traceback.print_exc()
                    if isinstance(error, torch.cuda.OutOfMemoryError):
                        torch.cuda.empty_cache()
                rows.append({"ranks": args.ranks, "nodes": args.nodes, "seq": seq, "heads": heads, "mode": name, **row})
                if rank == 0:
                    show(rows[-1], rows)
    if rank == 0 and args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    dist.destroy_process_group()


def modes(args: argparse.Namespace, h: int, g: int, grids: dict[str, Grid]) -> list[tuple[str, Attention]]:
    """The attention functions to compare, by name."""
    found: list[tuple[str, Attention]] = []
    for mode in args.modes:
        if mode.startswith("te:"):
            comm = mode.removeprefix("te:")
            if comm != "a2a" or (h % args.ranks == 0 and g % args.ranks == 0):
                found.append((f"TE {comm}", transformer_engine(comm, h, g, args.head_dim)))
        elif mode == "ring":
            found.append(("ring", partial(ring_attention, group=dist.group.WORLD)))
        else:
            for shape, grid in grids.items():
                for count in (count for count in args.groups if g % count == 0):
                    label = f"attention2d {shape}" + (f" G{count}" if count > 1 else "")
                    found.append((label, partial(attention2d, grid=grid, head_groups=count)))
    return found


def transformer_engine(comm: str, h: int, g: int, head_dim: int) -> Attention:
    """Transformer Engine's attention with its context parallelism over all ranks."""
    from transformer_engine.pytorch import DotProductAttention

    module = DotProductAttention(
        h, head_dim, num_gqa_groups=g, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal"
    )
    ranks = list(range(dist.get_world_size()))
    module.set_context_parallel_group(dist.group.WORLD, ranks, torch.cuda.Stream(), comm)
    return lambda q, k, v: module(q, k, v).unflatten(-1, (h, head_dim))


def measure(attention: Attention, seq: int, h: int, g: int, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds and MiB of one mode."""
    shard = seq // args.ranks
    torch.manual_seed(dist.get_rank())
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    q, k, v = (torch.randn(shard, 1, n, args.head_dim, device=args.device, dtype=dtype) for n in (h, g, g))
    dout = torch.randn_like(q)
    leaves = [x.requires_grad_(not args.forward) for x in (q, k, v)]

    def call() -> None:
        out = attention(*leaves)
        if not args.forward:
            torch.autograd.grad(out, leaves, dout)

    for _ in range(3):
        call()
    transient = peak(call) if args.device == "cuda" else 0.0
    inner = args.inner or max(1, int(40 / max(timed(call, 1, args.device), 1e-3)))
    times = [timed(call, inner, args.device) for _ in range(args.repeats)]
    return {
        "ms": statistics.median(times),
        "spread": (max(times) - min(times)) / min(times),
        "mib": slowest(transient, args.device),
    }


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
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(inner):
            call()
        return slowest((time.perf_counter() - begin) * 1e3 / inner, device)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(inner):
        call()
    stop.record()
    torch.cuda.synchronize()
    return slowest(start.elapsed_time(stop) / inner, device)


def slowest(value: float, device: str) -> float:
    """The largest value of all ranks."""
    highest = torch.tensor([value], device=device, dtype=torch.float64)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest.item()


def show(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print a row; the speed-up is against Transformer Engine's p2p, or the ring, of the same case."""
    head = f"{row['ranks']:3d} ranks  S={row['seq']:7d}  h={row['heads']:6s} {row['mode']:22s}"
    if "failed" in row:
        print(head, row["failed"], flush=True)
        return
    same = [r for r in rows if (r["seq"], r["heads"]) == (row["seq"], row["heads"]) and "ms" in r]
    base = next((r for r in same if r["mode"] == "TE p2p"), next((r for r in same if r["mode"] == "ring"), None))
    speed = f"{base['ms'] / row['ms']:5.2f}x {base['mode']}" if base else ""
    print(f"{head} {row['ms']:9.3f} ms (+-{row['spread'] * 50:4.1f}%) {row['mib']:8.0f} MiB  {speed}", flush=True)


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
    axes.legend(ncols=3, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
