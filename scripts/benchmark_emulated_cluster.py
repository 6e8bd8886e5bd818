#!/usr/bin/env python3
"""Ring attention against attention2d on an emulated cluster: time, and bytes by the kernel's counters.

    sudo python scripts/benchmark_emulated_cluster.py --hosts 16
    sudo python scripts/benchmark_emulated_cluster.py --hosts 64 --modes ring 8x8 16x4 8x2x4 --nic 50mbit

Hosts are network namespaces on this machine whose cards are limited to --nic in each direction. Ranks are processes
that run this package's attention over Gloo, fp32, causal. A mode is `ring`, RxC or UxRxC; `:rxc` behind it sets the
tile of a host. Bytes are those that a card received, the mean over the hosts, in units of a rank's shard of Q, beside
the count of the messages that the plan lists. `predicted` is the planner's time; what a message costs besides its
bytes and what this machine computes, shared by all ranks, are measured first, by a ring of the smallest shards and by
the kernel alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes  # torch imports it at a first backward pass: once, before the ranks fork

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from emulated_cluster import EmulatedCluster, card_bytes

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.planner.cost import Candidate, Cluster, predict
from megatron_attn2d.planner.traffic import Workload, attention2d_traffic, received_by_nodes, ring_traffic

_RATES = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8}


class Mode(NamedTuple):
    """What one line of the table ran."""

    name: str
    axes: tuple[int, int, int] | None
    tile: tuple[int, int] | None

    @classmethod
    def parse(cls, text: str) -> Mode:
        """`ring`, `RxC`, `UxRxC`, each but the ring with an optional `:rxc`."""
        if text == "ring":
            return cls(text, None, None)
        shape, _, tile = text.partition(":")
        sizes = [int(part) for part in shape.split("x")]
        u, r, c = sizes if len(sizes) == 3 else (1, *sizes)
        rows, cols = (int(part) for part in tile.split("x")) if tile else (r, 1)
        return cls(text, (u, r, c), (rows, cols))


def main() -> None:
    """Build the cluster, run every mode on it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=16)
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--nic", default="50mbit", help="rate of a card in each direction, as tc writes it")
    parser.add_argument("--seq", type=int, default=1024, help="tokens of the sequence")
    parser.add_argument("--heads", default="64/64", help="query/key heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--modes", nargs="+", help="default: ring, the square grids, and those with heads over 2, 4, 8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for all of it")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    ranks = args.hosts * args.ranks_per_host
    modes = [Mode.parse(text) for text in args.modes or default_modes(ranks)]
    torch.set_num_threads(1)
    with EmulatedCluster(args.hosts, args.nic) as cluster:
        found = cluster.run(run_rank, args.ranks_per_host, modes, args, timeout=args.timeout)
    machines = calibrated([rank[0] for rank in found], args)
    rows = [row(mode, [rank[i] for rank in found], machines, args) for i, mode in enumerate(modes, 1)]
    print(f"{args.hosts} hosts x {args.ranks_per_host} ranks, {args.nic} cards, S={args.seq}, h={args.heads}, fp32")
    print("mode            forward  backward     sum   speed  predicted   received a card, u (counted by the plan)")
    base = next((r for r in rows if r["mode"] == "ring"), rows[0])
    for r in rows:
        total = r["forward_s"] + r["backward_s"]
        speed = (base["forward_s"] + base["backward_s"]) / total
        print(
            f"{r['mode']:14s} {r['forward_s']:7.2f} s {r['backward_s']:7.2f} s {total:6.2f} s {speed:5.2f}x "
            f"{r['predicted_s']:6.2f} s {r['predicted_s'] / total - 1:+4.0%}  "
            f"{r['forward_u']:6.1f} ({r['forward_plan_u']:.1f}) + {r['backward_u']:6.1f} ({r['backward_plan_u']:.1f})"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def default_modes(ranks: int) -> list[str]:
    """The ring, the most square grids of the ranks, alone and with heads over 2, 4 and 8."""
    modes = ["ring"]
    for heads in (1, 2, 4, 8):
        if ranks % heads == 0:
            places = ranks // heads
            cols = max(c for c in range(1, places + 1) if places % c == 0 and c * c <= places)
            modes.append(("" if heads == 1 else f"{heads}x") + f"{places // cols}x{cols}")
    return modes


def run_rank(rank: int, modes: list[Mode], args: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds and received bytes of every mode on one rank."""
    world = dist.get_world_size()
    h, g = (int(n) for n in args.heads.split("/"))
    torch.manual_seed(rank)
    q, k, v = (torch.randn(args.seq // world, 1, n, args.head_dim).requires_grad_() for n in (h, g, g))
    dout = torch.randn(args.seq // world, 1, h, args.head_dim)
    results = [probe(world, h, g, args)]
    for mode in modes:
        grid = None
        if mode.axes is not None:
            u, r, c = mode.axes
            grid = Grid.from_group(dist.group.WORLD, rows=r, cols=c, heads=u, tile=mode.tile)
        # Connect the ranks, and pay for what torch does at a first backward pass.
        small = [x.detach()[:2].requires_grad_() for x in (q, k, v)]
        out = ring_attention(*small, dist.group.WORLD) if grid is None else attention2d(*small, grid)
        torch.autograd.grad(out, small, torch.ones_like(out))
        runs = []
        for _ in range(args.repeats):
            before, begin = settled_bytes(), time.perf_counter()
            out = ring_attention(q, k, v, dist.group.WORLD) if grid is None else attention2d(q, k, v, grid)
            middle = time.perf_counter()
            between, start = settled_bytes(), time.perf_counter()
            torch.autograd.grad(out, (q, k, v), dout)
            end = time.perf_counter()
            runs.append((middle - begin, end - start, between - before, settled_bytes() - between))
        kept = list(zip(*runs, strict=True))
        names = ("forward_s", "backward_s", "forward_bytes", "backward_bytes")
        results.append({name: statistics.median(values) for name, values in zip(names, kept, strict=True)})
    return results


def settled_bytes() -> int:
    """Bytes that the host's card has received, read while no rank sends; all ranks call it and leave it together."""
    dist.barrier()  # all ranks are done, those that share the card too
    received = card_bytes()[0]
    dist.barrier()  # all have read before anyone goes on
    return received


def probe(world: int, h: int, g: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a message without bytes to speak of, and of a rank's share of the kernels, all ranks at work."""
    small = [torch.randn(2, 1, 1, 8) for _ in range(3)]
    share = 2 * round(args.seq / world**0.5 / 2)  # tokens whose attention is 1/P of the whole
    q, k, v = (torch.randn(share, 1, n, args.head_dim).requires_grad_() for n in (h, g, g))
    times: dict[str, list[float]] = {"message_s": [], "forward_s": [], "backward_s": []}
    for _ in range(args.repeats + 1):
        dist.barrier()
        begin = time.perf_counter()
        ring_attention(*small, dist.group.WORLD)
        times["message_s"].append((time.perf_counter() - begin) / (2 * (world - 1)))
        dist.barrier()
        begin = time.perf_counter()
        out = attention2d(q, k, v, Grid.single())
        middle = time.perf_counter()
        torch.autograd.grad(out.sum(), (q, k, v))
        times["forward_s"].append(middle - begin)
        times["backward_s"].append(time.perf_counter() - middle)
    return {"share": share, **{name: statistics.median(values[1:]) for name, values in times.items()}}


def calibrated(ranks: list[dict[str, float]], args: argparse.Namespace) -> Cluster:
    """The planner's cluster for this machine."""
    rate = next(float(args.nic.removesuffix(unit)) * scale for unit, scale in _RATES.items() if args.nic.endswith(unit))
    flops = 2 * ranks[0]["share"] ** 2 * int(args.heads.split("/")[0]) * args.head_dim
    message = statistics.median(rank["message_s"] for rank in ranks)
    return Cluster(
        ranks_per_node=args.ranks_per_host,
        intra_bytes_per_s=1e9,
        nic_bytes_per_s=rate / args.ranks_per_host,
        rank_nic_bytes_per_s=rate,
        intra_latency_s=message,
        nic_latency_s=message,
        forward_flops=flops / statistics.median(rank["forward_s"] for rank in ranks),
        backward_flops=2.5 * flops / statistics.median(rank["backward_s"] for rank in ranks),
    )


def row(mode: Mode, ranks: list[dict[str, float]], machines: Cluster, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the table: the slowest rank's seconds, the mean card's bytes."""
    h, g = (int(n) for n in args.heads.split("/"))
    world = len(ranks)
    work = Workload(args.seq, h, g, args.head_dim, element_bytes=4)
    traffic = ring_traffic(world, work) if mode.axes is None else attention2d_traffic(mode.axes, work, tile=mode.tile)
    unit = work.shard_bytes(world)
    candidate = Candidate("ring" if mode.axes is None else "attention2d", mode.axes, mode.tile)
    result: dict[str, Any] = {"mode": mode.name, "predicted_s": predict(candidate, world, work, machines, (1,)).total_s}
    for side, phases in (("forward", traffic.forward), ("backward", traffic.backward)):
        result[f"{side}_s"] = max(rank[f"{side}_s"] for rank in ranks)
        # Ranks of one host read one card.
        cards = [rank[f"{side}_bytes"] for rank in ranks[:: args.ranks_per_host]]
        result[f"{side}_u"] = statistics.mean(cards) / unit
        result[f"{side}_plan_u"] = statistics.mean(received_by_nodes(phases, world, args.ranks_per_host)) / unit
    return result


if __name__ == "__main__":
    main()
