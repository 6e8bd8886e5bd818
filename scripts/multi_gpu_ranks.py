"""The ranks of one section of benchmark_multi_gpu.py: measure the links, then case after case of attention.

    python scripts/multi_gpu_ranks.py SECTION.json ROWS.jsonl FIRST

SECTION.json says what (`multi_gpu_cases.Section`), FIRST with which case to begin. Rank 0 appends an object a line to
ROWS.jsonl: the links, `{"begin": i}` before a case and `{"end": i, ...}` after it. All ranks agree over Gloo how a case
went: where one alone failed the others hang, and whoever started this process ends it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_modes import Attention, parse_grid, refusal, spawn, transformer_engine
from benchmark_attention import inputs, measure, slowest
from torch import Tensor

from megatron_attn2d import Grid, attention2d, ring_attention

_LARGE, _SMALL = 2**24, 2**6  # bytes of a message that measures a rate, and of one that measures latency
_BURST = 8  # messages at once that tell what each costs
COMPARED = 2**16
"""Tokens up to which results are compared: the first mode's lie in memory meanwhile."""

type Results = dict[str, list[Tensor]]
"""O, dQ, dK and dV of the first mode that ran, by case."""


def main() -> None:
    """Start the ranks."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks agree within this host
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # as in training: see configs/clusters/gpu.yaml
    section = json.loads(Path(sys.argv[1]).read_text())
    args = argparse.Namespace(**section, rows=Path(sys.argv[2]), first=int(sys.argv[3]))
    spawn(run_rank, args)


def run_rank(rank: int, args: argparse.Namespace) -> None:
    """All cases on one rank."""
    agreement = dist.new_group(backend="gloo")
    record(args, {"links": links(args)})
    grids: dict[str, Grid] = {}
    reference: Results = {}
    for i, case in enumerate(args.cases):
        if i < args.first:
            continue
        late = [time.time() + case["expected_s"] > args.deadline]
        dist.broadcast_object_list(late, 0, agreement)  # by one clock
        if late[0]:
            record(args, {"end": i, "failed": "not run: out of time"})
            continue
        record(args, {"begin": i})
        begin = time.time()
        row, error = attempt(case, args, grids, reference)
        errors: list[str | None] = [None] * args.ranks
        dist.all_gather_object(errors, error, agreement)
        failed = next((f"{e} (rank {r})" for r, e in enumerate(errors) if e), None)
        record(args, {"end": i, "took_s": time.time() - begin, **({"failed": failed} if failed else row)})
        another_length = i + 1 < len(args.cases) and args.cases[i + 1]["seq"] != case["seq"]
        if another_length:
            reference.clear()
        if failed or another_length:
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()


def attempt(
    case: dict[str, Any], args: argparse.Namespace, grids: dict[str, Grid], reference: Results
) -> tuple[dict[str, float], str]:
    """What was measured, or why not."""
    h, g = map(int, case["heads"].split("/"))
    try:
        attention = build(case["mode"], h, g, args, grids)
        row = measure(attention, case["seq"], h, g, args)
        if case["seq"] <= COMPARED:
            row["apart"] = slowest(apart(attention, case, args, reference), args.device)
        return row, ""
    except (RuntimeError, AssertionError, ValueError) as error:
        kind = "out of memory: " if isinstance(error, torch.OutOfMemoryError) else ""
        return {}, kind + (str(error).strip().splitlines() or [type(error).__name__])[0][:100]


def apart(attention: Attention, case: dict[str, Any], args: argparse.Namespace, reference: Results) -> float:
    """How far this rank's O, dQ, dK, dV are from the first mode's of the case: relative, Euclidean, the largest."""
    *leaves, dout = inputs(case["seq"], *map(int, case["heads"].split("/")), args)
    out = attention(*(x.requires_grad_() for x in leaves))
    found = [out.detach().view_as(dout), *torch.autograd.grad(out, leaves, dout.view_as(out))]
    key = f"{case['seq']} {case['heads']}"
    if key not in reference:
        reference.clear()
        reference[key] = found
    pairs = zip(found, reference[key], strict=True)
    return max(((x.float() - y.float()).norm() / y.float().norm()).item() for x, y in pairs)


def build(mode: str, h: int, g: int, args: argparse.Namespace, grids: dict[str, Grid]) -> Attention:
    """The attention function of a mode: `ring`, `te:TYPE` or `attention2d SHAPE`, in groups of heads ` GN`.

    Raises:
        ValueError: Transformer Engine can't run it with these heads.
    """
    if mode == "ring":
        return partial(ring_attention, group=dist.group.WORLD)
    if mode.startswith("te:"):
        comm = mode.removeprefix("te:")
        if reason := refusal(comm, args.ranks, h, g):
            raise ValueError(reason)
        return transformer_engine(comm, h, g, args.head_dim)
    shape, groups = parse_grid(mode)
    grids[str(shape)] = grids.get(str(shape)) or shape.build()
    return partial(attention2d, grid=grids[str(shape)], head_groups=groups)


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
    case = args.cases[0]
    h, g = map(int, case["heads"].split("/"))
    tokens = max(2, round(case["seq"] / args.ranks**0.5 / 2) * 2)
    leaves = [torch.randn(tokens, 1, n, args.head_dim, requires_grad=True) for n in (h, g, g)]
    flops = 2 * tokens**2 * h * args.head_dim
    forward = typical(lambda: attention2d(*leaves, Grid.single()).sum().item(), args.device)
    out = attention2d(*leaves, Grid.single()).sum()
    backward = typical(lambda: torch.autograd.grad(out, leaves, retain_graph=True), args.device)
    return {"forward_flops": flops / forward, "backward_flops": 2.5 * flops / backward}


def record(args: argparse.Namespace, what: dict[str, Any]) -> None:
    """Append a line, on rank 0."""
    if dist.get_rank() == 0:
        with args.rows.open("a") as rows:
            rows.write(json.dumps(what) + "\n")


if __name__ == "__main__":
    main()
