"""The ranks of one section of a benchmark: measure the links, then case after case of attention.

    python benchmarks/attention_ranks.py SECTION.json ROWS.jsonl FIRST

SECTION.json says what (`attention_section.Section`), FIRST with which case to begin. Rank 0 appends an object per line
to ROWS.jsonl: the links, `{"begin": i}` before a case and `{"end": i, ...}` after it. All ranks agree over Gloo how a
case went: where one alone failed the others hang, and whoever started this process ends it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_kinds import Kind
from attention_modes import build, spawn
from attention_timing import Attention, both_passes, measure, slowest, unqueued
from cases import Attempt, record, run_cases, told
from faked_world import as_first_rank, received_bytes
from torch import Tensor

from megatron_attn2d import Grid, attention2d

_LARGE, _SMALL = 2**24, 2**6  # bytes of a message that measures a rate, and of one that measures latency
_BURST = 8  # messages at once that tell what each costs
_NEW_PACKS = 3
COMPARED = 2**17
"""Tokens up to which results are compared: the first mode's lie in memory meanwhile."""

type Results = dict[str, list[Tensor]]
"""O, dQ, dK and dV of the first mode that ran, by case."""


def main() -> None:
    """Start the ranks."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks agree within this host
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # as in training: see configs/clusters/gpu.yaml
    section = json.loads(Path(sys.argv[1]).read_text())
    args = argparse.Namespace(**section, rows=Path(sys.argv[2]), first=int(sys.argv[3]))
    (as_first_rank if args.faked else spawn)(run_rank, args)


def run_rank(rank: int, args: argparse.Namespace) -> None:
    """All cases on one rank."""
    if not args.faked and (args.nodes or args.device == "cpu"):  # over NVLink predictions know the links
        record(args, {"links": links(args)})
    grids: dict[str, Grid] = {}
    reference: Results = {}

    def attempted(case: dict[str, Any]) -> Attempt:
        return attempt(case["mode"], Kind.read(case["kind"]), args, grids, reference)

    for i, failed in run_cases(args, attempted):
        another_kind = i + 1 < len(args.cases) and args.cases[i + 1]["kind"] != args.cases[i]["kind"]
        if another_kind:
            reference.clear()
        if failed or another_kind:
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()


def attempt(mode: str, kind: Kind, args: argparse.Namespace, grids: dict[str, Grid], reference: Results) -> Attempt:
    """What was measured, or why not."""
    try:
        packs = [kind.pack(args.ranks, seed) for seed in range(1 + _NEW_PACKS * (args.alone and kind.documents > 1))]
        functions = build(mode, kind, args.ranks, args.device, grids, [pack for pack in packs if pack])
        *leaves, dout = inputs(kind, args)
        if not args.forward:
            for leaf in leaves:
                leaf.requires_grad_()
        row = measure(functions[0], leaves, dout, args)
        if args.faked:
            row |= received(functions[0], leaves, dout, args)
        if functions[1:]:  # documents that no call has seen, as every step of a training brings
            new = unqueued(functions[1:], leaves, dout, args.device)
            row["host_new_ms"] = new["host_forward_ms"] + new["host_backward_ms"]
        ours = not mode.startswith("te:")
        # Dropout of ours keeps the same probabilities on every grid; nobody else's are the same.
        comparable = kind.seq <= COMPARED and not args.forward and not args.faked
        if comparable and (ours or not kind.dropout):
            row["apart"] = slowest(apart(functions[0], leaves, dout, str(kind), reference), args.device)
        return row, ""
    except Exception as error:  # a kernel's compiler has kinds of its own
        refused = isinstance(error, (RuntimeError, AssertionError, ValueError, ImportError))
        cause = "out of memory: " if isinstance(error, torch.OutOfMemoryError) else ""
        cause = cause if refused else f"{type(error).__name__}: "
        return {}, cause + told(error)


def received(
    attention: Attention, leaves: Sequence[Tensor], dout: Tensor, args: argparse.Namespace
) -> dict[str, float]:
    """MiB that a call brings from other ranks; nothing where a kernel can't be watched."""
    try:
        return {"received_mib": received_bytes(lambda: both_passes(attention, leaves, dout, args)) / 2**20}
    except Exception as error:
        told(error)
        return {}


def inputs(kind: Kind, args: argparse.Namespace) -> list[Tensor]:
    """q, k, v, the sink where there is one, and the output's gradient, of this rank, the same in every call.

    They are [seq / ranks, 1, heads, dim], packed [seq / ranks, heads, dim].
    """
    torch.manual_seed(dist.get_rank())
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    lead = (kind.seq // args.ranks,) if kind.documents else (kind.seq // args.ranks, 1)
    h, g, d, dv = kind.heads, kind.kv_heads, kind.head_dim, kind.value_dim
    q, k, v, dout = (
        torch.randn(*lead, *size, device=args.device, dtype=dtype) for size in ((h, d), (g, d), (g, dv), (h, dv))
    )
    sink = [torch.nn.Parameter(torch.linspace(-1, 1, h, device=args.device))] if kind.sink else []
    return [q, k, v, *sink, dout]


def apart(attention: Attention, leaves: Sequence[Tensor], dout: Tensor, case: str, reference: Results) -> float:
    """How far this rank's O, dQ, dK, dV are from the first mode's of the case: relative, Euclidean, the largest."""
    out = attention(*leaves)
    found = [out.detach().view_as(dout), *torch.autograd.grad(out, leaves, dout.view_as(out))][:4]
    if case not in reference:
        reference.clear()
        reference[case] = found
    pairs = zip(found, reference[case], strict=True)
    return max(((x.float() - y.float()).norm() / y.float().norm()).item() for x, y in pairs)


def links(args: argparse.Namespace) -> dict[str, float]:
    """Bytes/s, seconds of latency and of each message, by sends and receives on all ranks at once; kernels on CPU.

    `within` a node and `between` nodes, where there are such; `alone`: between nodes, one rank of each sending.
    """
    rank, node = dist.get_rank(), args.ranks_per_node if args.nodes else args.ranks
    within = rank // node * node + (rank + 1) % node, rank // node * node + (rank - 1) % node
    between = (rank + node) % args.ranks, (rank - node) % args.ranks
    found: dict[str, float] = {}
    for name, peers, here in (
        ("within", within, node > 1),
        ("between", between, node < args.ranks),
        ("alone", between, 1 < node < args.ranks),
    ):
        if not here:
            continue
        taking_part = name != "alone" or rank % node == 0
        large, small, burst = (
            typical(exchange(*peers, size, count, args.device), args.device, taking_part)
            for size, count in ((_LARGE, 1), (_SMALL, 1), (_SMALL, _BURST))
        )
        found[f"{name}_bytes_per_s"] = _LARGE / max(large - small, 1e-9)
        found[f"{name}_latency_s"] = small
        found[f"{name}_message_s"] = max(0.0, burst - small) / (_BURST - 1)
    return found | (kernel_rates(args) if args.device == "cpu" else {})


def exchange(to: int, source: int, size: int, count: int, device: str) -> Callable[[], None]:
    """What sends so many messages of so many bytes to one rank and receives as many from another."""
    tensors = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2 * count)]

    def call() -> None:
        operations = [dist.P2POp(dist.isend, x, to) for x in tensors[:count]]
        operations += [dist.P2POp(dist.irecv, x, source) for x in tensors[count:]]
        for message in dist.batch_isend_irecv(operations):
            message.wait()

    return call


def typical(call: Callable[[], None], device: str, taking_part: bool = True) -> float:
    """Median seconds of a call on the slowest rank, after two that connect and warm up."""
    times = []
    for _ in range(5):
        slowest(0.0, device)  # all ranks start together
        begin = time.perf_counter()
        if taking_part:
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(slowest(time.perf_counter() - begin, device))
    return statistics.median(times[2:])


def kernel_rates(args: argparse.Namespace) -> dict[str, float]:
    """FLOP/s of the kernels, all ranks computing, on a share of the first case."""
    kind = Kind.read(args.cases[0]["kind"])
    h, g, d = kind.heads, kind.kv_heads, kind.head_dim
    tokens = max(2, round(kind.seq / args.ranks**0.5 / 2) * 2)
    leaves = [torch.randn(tokens, 1, n, d, requires_grad=True) for n in (h, g, g)]
    flops = 2 * tokens**2 * h * d
    forward = typical(lambda: attention2d(*leaves, Grid.single()).sum().item(), args.device)
    out = attention2d(*leaves, Grid.single()).sum()
    backward = typical(lambda: torch.autograd.grad(out, leaves, retain_graph=True), args.device)
    return {"forward_flops": flops / forward, "backward_flops": 2.5 * flops / backward}


if __name__ == "__main__":
    main()
