#!/usr/bin/env python3
"""Ring attention against attention2d on an emulated cluster: time, and bytes by the kernel's counters.

    sudo python benchmarks/benchmark_emulated_cluster.py --hosts 16
    sudo python benchmarks/benchmark_emulated_cluster.py --hosts 64 --nic 4mbit --modes ring 8x8 16x4 8x4x2
    sudo python benchmarks/benchmark_emulated_cluster.py --hosts 16 --ranks-per-host 4 --modes ring 8x8:2x2 8x8:1x4
    sudo python benchmarks/benchmark_emulated_cluster.py --hosts 16 --seq 2048 --shapes 4/4x64 --documents 0 32

Hosts are network namespaces on this machine whose cards are limited to --nic in each direction. Ranks are processes
that run this package's attention over Gloo, fp32, causal. A mode is `ring`, RxC or UxRxC; `:rxc` behind it is the block
of the grid that a host's ranks fill. Several --seq, --shapes and --documents run one after the other on the same
cluster; documents are packed, with lengths drawn as real text has them, and 0 stands for one dense sequence.

A row's bytes are those that a card received, the mean over the hosts, in units of a rank's shard of Q: all, less the
packets' headers, and what the plan lists. `predicted` is the planner's time, the least of each table marked *; what a
message costs besides its bytes and what this machine computes, shared by all ranks, are measured first, by a ring of
the smallest shards, by many small messages at once, and by the kernel alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes  # torch imports it at a first backward pass: once, before the ranks fork
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attention_kinds import Pack
from emulated_cluster import HEADERS, EmulatedCluster, card_received

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.planner.cost import Candidate, Cluster, predict
from megatron_attn2d.planner.traffic import Workload, attention2d_traffic, ring_traffic

_RATES = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8}


class Case(NamedTuple):
    """What one table is about; `documents` are packed, 0: one dense sequence."""

    work: Workload
    documents: int


class Mode(NamedTuple):
    """What one line of a table ran."""

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
        if not tile:
            return cls(text, (u, r, c), None)
        rows, cols = (int(part) for part in tile.split("x"))
        return cls(text, (u, r, c), (rows, cols))

    def grid(self) -> Grid | None:
        """The caller's place in it; None for the ring."""
        if self.axes is None:
            return None
        u, r, c = self.axes
        assert dist.group.WORLD is not None
        return Grid.from_group(dist.group.WORLD, rows=r, cols=c, ulysses_size=u, node_block=self.tile)


def main() -> None:
    """Build the cluster, run every mode on every workload, print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=16)
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--nic", default="50mbit", help="rate of a card in each direction, as tc writes it")
    parser.add_argument("--seq", type=int, nargs="+", default=[512], help="tokens of the sequence")
    parser.add_argument("--shapes", nargs="+", default=["64/64x128"], help="query/key heads x head dim")
    parser.add_argument("--documents", type=int, nargs="+", default=[0], help="packed; 0: one dense sequence")
    parser.add_argument("--modes", nargs="+", help="default: ring, the square grids, and those with heads over 2, 4, 8")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=700.0, help="seconds for all of it")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    ranks = args.hosts * args.ranks_per_host
    modes = [Mode.parse(text) for text in args.modes or default_modes(ranks)]
    works = [workload(shape, seq) for shape in args.shapes for seq in args.seq]
    cases = [Case(work, documents) for work in works for documents in args.documents]
    for work, documents in cases:
        if work.seq < 2 * ranks * documents:
            parser.error(f"--documents {documents}: {work.seq} tokens on {ranks} ranks hold {work.seq // (2 * ranks)}")
    torch.set_num_threads(1)
    with EmulatedCluster(args.hosts, args.nic) as cluster:
        found = cluster.run(run_rank, args.ranks_per_host, modes, cases, args.repeats, timeout=args.timeout)
    rows = []
    for i, case in enumerate(cases):
        measured = [rank[i] for rank in found]
        machines = calibrated([rank["probe"] for rank in measured], case.work, args)
        table = [row(mode, [rank[mode.name] for rank in measured], case, machines, args) for mode in modes]
        show(table, args)
        rows += table
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def workload(shape: str, seq: int) -> Workload:
    """`64/64x128` and a number of tokens."""
    heads, _, dim = shape.partition("x")
    h, g = (int(n) for n in heads.split("/"))
    return Workload(seq, h, g, int(dim), element_bytes=4)


def default_modes(ranks: int) -> list[str]:
    """The ring, the most square grids of the ranks, alone and with heads over 2, 4 and 8."""
    modes = ["ring"]
    for heads in (1, 2, 4, 8):
        if ranks % heads == 0:
            places = ranks // heads
            cols = max(c for c in range(1, places + 1) if places % c == 0 and c * c <= places)
            modes.append(("" if heads == 1 else f"{heads}x") + f"{places // cols}x{cols}")
    return modes


def run_rank(rank: int, modes: list[Mode], cases: list[Case], repeats: int) -> list[dict[str, dict[str, float]]]:
    """For each case: what `probe` and every mode measured on one rank."""
    torch.manual_seed(rank)
    probes = {work: probe(work) for work in dict.fromkeys(case.work for case in cases)}
    results = [{"probe": probes[case.work]} for case in cases]
    for mode in modes:
        grid = mode.grid()
        small = shards(replace(cases[0].work, head_dim=8), 2)
        out = attend(grid, *small)  # connects the ranks, and pays for what torch does at a first backward pass
        torch.autograd.grad(out, small, torch.ones_like(out))
        for case, result in zip(cases, results, strict=True):
            result[mode.name] = measure(grid, case, repeats)
    return results


def shards(work: Workload, tokens: int) -> list[Tensor]:
    """Random q, k, v of so many tokens."""
    heads = work.heads, work.kv_heads, work.kv_heads
    return [torch.randn(tokens, 1, n, work.head_dim).requires_grad_() for n in heads]


def attend(grid: Grid | None, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int] | None = None) -> Tensor:
    """Attention on a grid; on the ring of all ranks if there is none."""
    if grid is None:
        return ring_attention(q, k, v, dist.group.WORLD, cu_seqlens=cu_seqlens)
    return attention2d(q, k, v, grid, cu_seqlens=cu_seqlens)


def measure(grid: Grid | None, case: Case, repeats: int) -> dict[str, float]:
    """Medians of the seconds, bytes and packets that the host's card received, forward and backward."""
    world = dist.get_world_size()
    tensors = shards(case.work, case.work.seq // world)
    cu_seqlens = None
    if case.documents:
        cu_seqlens = Pack.drawn(case.work.seq, case.documents, world).cu_seqlens
        tensors = [x.detach().squeeze(1).requires_grad_() for x in tensors]
    dout = torch.randn_like(tensors[0])
    runs = []
    for _ in range(repeats):
        first, begin = settled_card(), time.perf_counter()
        out = attend(grid, *tensors, cu_seqlens)
        middle = time.perf_counter()
        second, start = settled_card(), time.perf_counter()
        torch.autograd.grad(out, tensors, dout)
        end, last = time.perf_counter(), settled_card()
        forward, backward = (
            [after - before for before, after in zip(a, b, strict=True)] for a, b in ((first, second), (second, last))
        )
        runs.append((middle - begin, *forward, end - start, *backward))
    names = [f"{side}_{what}" for side in ("forward", "backward") for what in ("s", "bytes", "packets")]
    return {name: statistics.median(values) for name, values in zip(names, zip(*runs, strict=True), strict=True)}


def settled_card() -> tuple[int, int]:
    """What the host's card has received, read while no rank sends; all ranks call it and leave it together."""
    dist.barrier()  # all ranks are done, those that share the card too
    received = card_received()
    dist.barrier()  # all have read before anyone goes on
    return received


def probe(work: Workload) -> dict[str, float]:
    """Seconds, all ranks at work: of messages without bytes to speak of, and of a rank's share of the kernels.

    `step_s`: of a step of the ring, two messages; `burst_s`: of `burst` messages at once; `share`: the tokens whose
    attention is 1/P of the whole.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    burst = min(16, world - 1)
    small, token = [torch.randn(2, 1, 1, 8) for _ in range(3)], torch.zeros(16)
    share = 2 * round(work.seq / world**0.5 / 2)
    tensors = shards(work, share)
    for _ in range(2):  # the first connects and warms up
        dist.barrier()
        begin = time.perf_counter()
        ring_attention(*small, dist.group.WORLD)
        step = (time.perf_counter() - begin) / (world - 1)
        dist.barrier()
        begin = time.perf_counter()
        operations = [dist.P2POp(dist.irecv, torch.zeros(16), (rank - i) % world) for i in range(1, burst + 1)]
        operations += [dist.P2POp(dist.isend, token, (rank + i) % world) for i in range(1, burst + 1)]
        for message in dist.batch_isend_irecv(operations):
            message.wait()
        together = time.perf_counter() - begin
        dist.barrier()
        begin = time.perf_counter()
        out = attend(Grid.single(), *tensors)
        middle = time.perf_counter()
        torch.autograd.grad(out.sum(), tensors)
        end = time.perf_counter()
    found = {"step_s": step, "burst_s": together, "forward_s": middle - begin, "backward_s": end - middle}
    return {"share": share, "burst": burst, **found}


def calibrated(ranks: list[dict[str, float]], work: Workload, args: argparse.Namespace) -> Cluster:
    """The planner's cluster for this machine."""
    rate = next(float(args.nic.removesuffix(unit)) * scale for unit, scale in _RATES.items() if args.nic.endswith(unit))
    flops = 2 * ranks[0]["share"] ** 2 * work.heads * work.head_dim
    step, together, forward, backward = (
        statistics.median(rank[name] for rank in ranks) for name in ("step_s", "burst_s", "forward_s", "backward_s")
    )
    message = max(0.0, together - step) / max(1, ranks[0]["burst"] - 2)
    latency = max(0.0, step - 2 * message)
    return Cluster(
        ranks_per_node=args.ranks_per_host,
        intra_bytes_per_s=1e9,
        nic_bytes_per_s=rate / args.ranks_per_host,
        rank_nic_bytes_per_s=rate,
        intra_latency_s=latency,
        nic_latency_s=latency,
        message_s=message,
        forward_flops=flops / forward,
        backward_flops=2.5 * flops / backward,
    )


def row(
    mode: Mode, ranks: list[dict[str, float]], case: Case, machines: Cluster, args: argparse.Namespace
) -> dict[str, Any]:
    """One line of a table: the slowest rank's seconds, the mean card's bytes."""
    work = case.work
    world = len(ranks)
    node = args.ranks_per_host
    traffic = (
        ring_traffic(world, work, ranks_per_node=node)
        if mode.axes is None
        else attention2d_traffic(mode.axes, work, tile=mode.tile, ranks_per_node=node)
    )
    unit = work.shard_bytes(world)
    candidate = Candidate("ring" if mode.axes is None else "attention2d", mode.axes, mode.tile)
    result: dict[str, Any] = {
        "hosts": args.hosts,
        "ranks_per_host": args.ranks_per_host,
        "nic": args.nic,
        "seq": work.seq,
        "shape": f"{work.heads}/{work.kv_heads}x{work.head_dim}",
        "documents": case.documents,
        "mode": mode.name,
        "predicted_s": predict(candidate, world, work, machines, (1,)).total_s,
    }
    for side, phases in (("forward", traffic.forward), ("backward", traffic.backward)):
        result[f"{side}_s"] = max(rank[f"{side}_s"] for rank in ranks)
        cards = ranks[:: args.ranks_per_host]  # ranks of one host read one card
        received, packets = (statistics.mean(card[f"{side}_{what}"] for card in cards) for what in ("bytes", "packets"))
        result[f"{side}_u"] = received / unit
        result[f"{side}_payload_u"] = (received - HEADERS * packets) / unit
        result[f"{side}_plan_u"] = sum(phase.outside * phase.times for phase in phases) / args.hosts / unit
    result["total_s"] = result["forward_s"] + result["backward_s"]
    return result


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the table of one workload."""
    first = rows[0]
    hosts = f"{args.hosts} hosts x {args.ranks_per_host} ranks, {args.nic} cards"
    packed = f", {first['documents']} documents" if first["documents"] else ""
    print(f"\n{hosts}, S={first['seq']}{packed}, heads {first['shape']}, fp32")
    columns = "mode          forward  backward       sum   speed     predicted"
    print(f"{columns}    received per card, u: all (no headers, plan)")
    base = next((r for r in rows if r["mode"] == "ring"), first)["total_s"]
    least = min(r["predicted_s"] for r in rows)
    for r in rows:
        received = " + ".join(
            f"{r[f'{side}_u']:6.2f} ({r[f'{side}_payload_u']:.2f}, {r[f'{side}_plan_u']:.2f})"
            for side in ("forward", "backward")
        )
        print(
            f"{r['mode']:12s} {r['forward_s']:6.2f} s  {r['backward_s']:6.2f} s  {r['total_s']:6.2f} s "
            f"{base / r['total_s']:6.2f}x {r['predicted_s']:6.2f} s {r['predicted_s'] / r['total_s'] - 1:+4.0%}"
            f"{'*' if r['predicted_s'] == least else ' '}  {received}"
        )


if __name__ == "__main__":
    main()
