#!/usr/bin/env python3
"""What a network between hosts costs, emulated on the GPUs of one, and whole training, beside the plan and its ring.

    python benchmarks/benchmark_multi_gpu.py --out multi_gpu                  # all GPUs; under 9 minutes on 8
    python benchmarks/benchmark_multi_gpu.py --out multi_gpu --quick          # five cases on nodes, two trainings
    python benchmarks/benchmark_multi_gpu.py --out multi_gpu --node-ranks 16 32 --sections nodes
    python benchmarks/benchmark_multi_gpu.py --out multi_gpu --quick --device cpu --ranks 2

Sections, in this order; `--sections` picks some:
    nodes     attention forward + backward with each GPU, then each two, as a node of NCCL over loopback sockets:
              Transformer Engine's p2p, all_gather, a2a, a2a+p2p (all-to-all among as many neighbours as heads divide
              by, at most half), attention2d on U x R x C whose heads divide, in as many head groups (G) as the planner
              says; with more ranks than GPUs where --node-ranks says so. All grids for the first heads at up to 8
              ranks, else the best two and the best R x C
    training  whole steps of benchmark_multi_gpu.yaml, a GPT-3 2.7B, ring (Transformer Engine's p2p where it is
              installed) and attention2d: all GPUs context ranks, tensor 2 x context N/2; from 8 GPUs on also
              context N/2 x data 2

Attention over NVLink, of every kind and at every length, is benchmarks/benchmark_attention.py.

Each section has a share of the budget, and what the ones before it left; short sequences come first. What time
doesn't suffice for is printed as `not run: out of time`; what fails (memory, heads that don't divide, ranks that hang)
is a row that says why. OUT/multi_gpu.json holds all rows, multi_gpu.png draws them, NAME.log is what ranks printed.

`predicted` is the planner's forward and backward, with links as they are measured first and kernels of shared GPUs at
their share. a2a+p2p it does not model. `apart` is how far the output and the gradients of a mode are from those of the
first of its case.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from attention_kinds import Kind
from attention_section import GRACE_S, ROOT, YAML, Section, gpus, node_modes, run_section
from benchmark_attention import KERNEL_CACHE, host
from multi_gpu_plot import draw
from multi_gpu_training import train

from megatron_attn2d.planner.cost import Cluster

WEIGHTS = {"nodes by one": 20, "nodes by two": 10, "training": 44, "shared": 6}
"""By which sections share the budget; `shared`: each of those on nodes with more ranks than GPUs."""

LONG = 2**17
"""Tokens from which only few grids are run: a case takes seconds at last."""


def main() -> None:
    """Run the sections and write what they found."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks are ended
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(KERNEL_CACHE, "1")  # messages and whole steps are measured, not how fast a kernel starts
    start = time.time()
    found: dict[str, Any] = {"host": host(), "budget": args.budget, "sections": [], "training": []}
    end = start + args.budget
    sections = planned(args)
    total, used = sum(weight for weight, _ in sections), 0
    for weight, section in sections:
        used += weight
        deadline = start + args.budget * used / total
        if section is None:
            train(args, deadline, found)
        else:
            section.deadline = deadline
            found["sections"].append(run_section(section, args.out, args.case_timeout, min(deadline + GRACE_S, end)))
        write(args, found)
    draw(found, args.out / "multi_gpu.png")
    print(f"\n{time.time() - start:.0f} s of {args.budget:.0f}; {args.out}/multi_gpu.json, {args.out}/multi_gpu.png")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--budget", type=float, help="seconds for all; default: 520, with --quick 240")
    parser.add_argument("--quick", action="store_true", help="few cases, 4 layers")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2, help="GPUs, or CPU ranks")
    parser.add_argument("--sections", nargs="+", choices=["nodes", "training"])
    parser.add_argument("--node-seq", nargs="+", type=int, help="tokens of the sequence, on nodes")
    parser.add_argument("--heads", nargs="+", default=["12/12", "16/2", "40/40"], help="query/key heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument(
        "--node-ranks", nargs="+", type=int, help="ranks on emulated nodes; default: --ranks and 16; quick: --ranks"
    )
    parser.add_argument("--train-seq", type=int, help="tokens of the sequence in training")
    parser.add_argument("--train-steps", type=int)
    parser.add_argument("--train-yaml", type=Path, help="default: benchmark_multi_gpu.yaml; on CPU the quickstart")
    parser.add_argument("--case-timeout", type=float, default=90, help="seconds after which a case counts as hung")
    parser.add_argument("overrides", nargs="*", help="key=value of the YAML, for training")
    args = parser.parse_args()
    cpu = args.device == "cpu"
    args.node_seq = args.node_seq or [n * (args.ranks if cpu else 1024) for n in ([16] if args.quick else [16, 32])]
    args.heads = args.heads[:1] if args.quick else args.heads
    args.node_ranks = args.node_ranks or ([args.ranks] if args.quick else [args.ranks, 16])
    args.train_seq = args.train_seq or (64 * args.ranks if cpu else 4096 * args.ranks)
    args.train_steps = args.train_steps or (6 if args.quick else 12)
    args.budget = args.budget or (240 if args.quick else 520)
    if args.quick:
        args.overrides = [*([] if cpu else ["model.num_layers=4"]), *args.overrides]
    if cpu and args.train_yaml is None:
        args.overrides = ["parallelism.pipeline=1", "data.mock=true", *args.overrides]
    args.train_yaml = args.train_yaml or (ROOT / "configs/runs/quickstart.yaml" if cpu else YAML)
    return args


def planned(args: argparse.Namespace) -> list[tuple[int, Section | None]]:
    """The sections by what they are worth, with their weights; None stands for training."""
    machines = gpus(args.ranks)
    gpu_count = args.ranks if args.device == "cpu" else torch.cuda.device_count()
    found: list[tuple[str, int, Section | None]] = []

    def add_nodes(shared: bool) -> None:
        for node, weight in ((1, "nodes by one"), (2, "nodes by two"))[: 1 if args.quick else 2]:
            for ranks in sorted({n for n in args.node_ranks if (n > gpu_count) == shared}):
                if ranks // node > 1 and ranks % node == 0 and node <= gpu_count:
                    section = nodes(args, ranks, node, shared, machines)
                    found.append(("nodes", WEIGHTS["shared" if shared else weight], section))

    add_nodes(shared=False)
    found.append(("training", WEIGHTS["training"], None))
    add_nodes(shared=True)
    return [(weight, section) for kind, weight, section in found if args.sections is None or kind in args.sections]


def nodes(args: argparse.Namespace, ranks: int, node: int, shared: bool, machines: Cluster) -> Section:
    """Emulated nodes of `node` ranks: short sequences first; few of them where ranks share GPUs."""
    section = Section(
        f"nodes-{ranks}x{node}", args.device, ranks, nodes=True, ranks_per_node=node, repeats=3, inner=1
    )  # calls take up to seconds there
    for seq in args.node_seq[: 1 if shared else None]:
        for pair in args.heads[: 2 if shared else None]:
            h, g = map(int, pair.split("/"))
            kind = Kind("dense", seq, h, g, head_dim=args.head_dim, value_dim=args.head_dim)
            few = args.quick or seq >= LONG or ranks > 8 or pair != args.heads[0]
            section.add(kind, node_modes(section, kind, machines, few))
    return section


def write(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """What is known so far."""
    (args.out / "multi_gpu.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
