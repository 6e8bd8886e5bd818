#!/usr/bin/env python3
"""Everything that needs several GPUs of one host, in one run within a budget: attention and training, beside the plan.

    python scripts/benchmark_multi_gpu.py --out multi_gpu                  # all GPUs; under 9 minutes on 8
    python scripts/benchmark_multi_gpu.py --out multi_gpu --quick          # three minutes
    python scripts/benchmark_multi_gpu.py --out multi_gpu --node-ranks 16 32 --sections nodes
    python scripts/benchmark_multi_gpu.py --out multi_gpu --quick --device cpu --ranks 2

Sections, in this order; `--sections` picks some:
    nvlink    attention forward + backward on all GPUs: Transformer Engine's p2p, all_gather, a2a, a2a+p2p (all-to-all
              among as many neighbours as heads divide by, at most half), attention2d on every U x R x C whose heads
              divide, in as many head groups (G) as the planner says; from 128K tokens on, on its
              best two and the best R x C
    nodes     the same with each GPU, then each two, as a node of NCCL over loopback sockets; with more ranks than GPUs
              where --node-ranks says so. All grids for the first heads at up to 8 ranks, else as few
    training  whole steps of benchmark_multi_gpu.yaml, a GPT-3 2.7B, ring (Transformer Engine's p2p where it is
              installed) and attention2d: all GPUs context ranks, tensor 2 x context N/2; from 8 GPUs on also
              context N/2 x data 2
    half      as nvlink, on half of the GPUs, where that is 4 or more; 16K and 64K tokens

Each section has a share of the budget, and what the ones before it left; short sequences come first. What time
doesn't suffice for is printed as `not run: out of time`; what fails (memory, heads that don't divide, ranks that hang)
is a row that says why. OUT/multi_gpu.json holds all rows, multi_gpu.png draws them, NAME.log is what ranks printed.

`predicted` is the planner's forward and backward: with configs/clusters/h100.yaml over NVLink; on emulated nodes and
CPU ranks with links as they are measured first, and kernels of shared GPUs at their share. a2a+p2p it does not model.
`apart` is how far the output and the gradients of a mode are from those of the first of its case, up to 64K tokens.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark_training import ROOT
from multi_gpu_cases import Section, attention_section, gpus, measured_cluster, predicted_s
from multi_gpu_plot import draw
from multi_gpu_training import train
from watched import Watched, python

from megatron_attn2d.planner.traffic import Workload

YAML = ROOT / "scripts/benchmark_multi_gpu.yaml"
_GRACE_S = 10.0  # for a case that has begun when its section's time is up
WEIGHTS = {"nvlink": 30, "nodes by one": 9, "nodes by two": 7, "training": 44, "half": 8, "shared": 6}
"""By which sections share the budget; `shared`: each of those on nodes with more ranks than GPUs."""

KERNEL_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
"""FlashAttention-4 compiles its kernels in every process anew, for half a minute in all, or keeps them on disk. Those
that come from there start slower: 16K tokens take 4.8 ms on two H100 instead of 3.8. So over NVLink it compiles."""


def main() -> None:
    """Run the sections and write what they found."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks are ended
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    found: dict[str, Any] = {"host": host(), "budget": args.budget, "sections": [], "training": []}
    end = start + args.budget
    sections, cache_is_set = planned(args), KERNEL_CACHE in os.environ
    total, used = sum(weight for weight, _ in sections), 0
    for weight, section in sections:
        if not cache_is_set:
            os.environ[KERNEL_CACHE] = "0" if section is not None and not section.nodes else "1"
        used += weight
        deadline = start + args.budget * used / total
        if section is None:
            train(args, deadline, found)
        else:
            section.deadline = deadline
            run_section(section, args, found, min(deadline + _GRACE_S, end))
        write(args, found)
    draw(found, args.out / "multi_gpu.png")
    print(f"\n{time.time() - start:.0f} s of {args.budget:.0f}; {args.out}/multi_gpu.json, {args.out}/multi_gpu.png")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--budget", type=float, default=520, help="seconds for all")
    parser.add_argument("--quick", action="store_true", help="few and short cases, 4 layers, 180 s")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2, help="GPUs, or CPU ranks")
    parser.add_argument("--sections", nargs="+", choices=["nvlink", "nodes", "training", "half"])
    parser.add_argument("--seq", nargs="+", type=int, help="tokens of the sequence, over NVLink")
    parser.add_argument("--node-seq", nargs="+", type=int, help="the same on nodes")
    parser.add_argument("--heads", nargs="+", default=["12/12", "16/2", "40/40"], help="query/key heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument(
        "--node-ranks",
        nargs="+",
        type=int,
        help="ranks on emulated nodes; default: --ranks and 16; quick: --ranks and twice",
    )
    parser.add_argument("--train-seq", type=int, help="tokens of the sequence in training")
    parser.add_argument("--train-steps", type=int)
    parser.add_argument("--train-yaml", type=Path, help="default: benchmark_multi_gpu.yaml; on CPU the quickstart")
    parser.add_argument("--case-timeout", type=float, default=90, help="seconds after which a case counts as hung")
    parser.add_argument("overrides", nargs="*", help="key=value of the YAML, for training")
    args = parser.parse_args()
    cpu = args.device == "cpu"
    lengths = [16, 64] if args.quick else [16, 32, 64, 128, 256, 512]
    args.seq = args.seq or [n * (args.ranks if cpu else 1024) for n in lengths]
    args.node_seq = args.node_seq or args.seq[: 1 if args.quick else 2]
    args.heads = args.heads[:2] if args.quick else args.heads
    args.node_ranks = args.node_ranks or ([args.ranks, 2 * args.ranks] if args.quick else [args.ranks, 16])
    args.train_seq = args.train_seq or (64 * args.ranks if cpu else 4096 * args.ranks)
    args.train_steps = args.train_steps or (6 if args.quick else 12)
    if args.quick:
        args.budget = min(args.budget, 180)
        args.overrides = [*([] if cpu else ["model.num_layers=4"]), *args.overrides]
    if cpu and args.train_yaml is None:
        args.overrides = ["parallelism.pipeline=1", "data.mock=true", *args.overrides]
    args.train_yaml = args.train_yaml or (ROOT / "configs/runs/quickstart.yaml" if cpu else YAML)
    return args


def planned(args: argparse.Namespace) -> list[tuple[int, Section | None]]:
    """The sections by what they are worth, with their weights; None stands for training."""
    machines = gpus(str(YAML), args.ranks)
    gpu_count = args.ranks if args.device == "cpu" else torch.cuda.device_count()
    found: list[tuple[str, int, Section | None]] = []

    def add(kind: str, name: str, weight: str, ranks: int, node: int | None = None) -> None:
        section = Section(name, args.device, ranks, node is not None, node or 1, args.head_dim)
        few = weight == "shared"
        if section.nodes:  # calls take up to seconds there
            section.repeats, section.inner = 3, 1
        if args.device == "cpu":
            section.inner = 1
        lengths = args.node_seq[: 1 if few else None] if section.nodes else args.seq
        lengths = lengths[:3:2] if name == "half" else lengths
        attention_section(section, lengths, args.heads[: 2 if few else None], machines)
        found.append((kind, WEIGHTS[weight], section))

    def add_nodes(weights: tuple[str, str], shared: bool) -> None:
        for node, weight in zip((1, 2), weights, strict=True):
            for ranks in sorted({n for n in args.node_ranks if (n > gpu_count) == shared}):
                if ranks // node > 1 and ranks % node == 0 and node <= gpu_count:
                    add("nodes", f"nodes-{ranks}x{node}", weight, ranks, node)

    add("nvlink", "nvlink", "nvlink", args.ranks)
    add_nodes(("nodes by one", "nodes by two"), shared=False)
    found.append(("training", WEIGHTS["training"], None))
    if args.ranks >= 8 and args.ranks % 2 == 0:
        add("half", "half", "half", args.ranks // 2)
    add_nodes(("shared", "shared"), shared=True)
    return [(weight, section) for kind, weight, section in found if args.sections is None or kind in args.sections]


def run_section(section: Section, args: argparse.Namespace, found: dict[str, Any], end: float) -> None:
    """Measure a section's cases, printing each as it is done; all of its ranks are gone at `end`."""
    rows: list[dict[str, Any]] = []
    known: dict[str, Any] = {"name": section.name, "title": section.title, "nodes": section.nodes, "rows": rows}
    found["sections"].append(known)
    print(f"\n{section.name}: {section.title}, {len(section.cases)} cases", flush=True)
    machines = gpus(str(YAML), args.ranks)
    sharing = -(-section.ranks // max(1, torch.cuda.device_count()))

    def tell(line: dict[str, Any]) -> None:
        if "links" in line:
            known["links"] = line["links"]
            print("  links: " + ", ".join(f"{k} {v:.3g}" for k, v in line["links"].items()), flush=True)
        if "end" not in line:
            return
        case = section.cases[line["end"]]
        row = {k: case[k] for k in ("seq", "heads", "mode")} | {k: v for k, v in line.items() if k != "end"}
        if "links" in known:
            h, g = map(int, case["heads"].split("/"))
            cluster = measured_cluster(section, known["links"], machines, sharing)
            work = Workload(case["seq"], h, g, section.head_dim)
            seconds = predicted_s(case["mode"], section, work, cluster)
            row["predicted_ms"] = None if seconds is None else seconds * 1e3
        rows.append(row)
        show(row, rows)

    spec, log = args.out / f"{section.name}.json", args.out / f"{section.name}.log"
    spec.write_text(json.dumps(section.described()))
    log.unlink(missing_ok=True)
    command = python(ROOT / "scripts/multi_gpu_ranks.py", str(spec), str(args.out / f"{section.name}.jsonl"))
    limit = args.case_timeout
    watched = Watched(command, args.out / f"{section.name}.jsonl", log, 3 * limit, limit, end)
    watched.run(len(section.cases), tell)


def show(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print a row, its speed against the ring (Transformer Engine's where it runs) of the same case."""
    head = f"  S={row['seq']:7d}  h={row['heads']:6s} {row['mode']:24s}"
    predicted = row.get("predicted_ms")
    if "ms" not in row:
        foreseen = "" if predicted is None else f", predicted {predicted:.3f} ms"
        print(f"{head} {row['failed']}{foreseen}", flush=True)
        return
    same = [r for r in rows if (r["seq"], r["heads"]) == (row["seq"], row["heads"]) and "ms" in r]
    base = next((r for r in same if r["mode"] in ("te:p2p", "ring")), None)
    speed = f"{base['ms'] / row['ms']:5.2f}x" if base else "     -"
    plan = "-" if predicted is None else f"{predicted:10.3f} ms {predicted / row['ms'] - 1:+5.0%}"
    apart = f"  apart {row['apart']:.1e}" if "apart" in row else ""
    print(
        f"{head} {row['ms']:10.3f} ms (+-{row['spread'] * 50:4.1f}%) {row['mib']:7.0f} MiB {speed}  "
        f"predicted {plan}{apart}",
        flush=True,
    )


def host() -> dict[str, Any]:
    """What the figures were measured on."""
    cuda = torch.cuda.is_available()
    return {
        "gpus": torch.cuda.device_count(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
    }


def write(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """What is known so far."""
    (args.out / "multi_gpu.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
