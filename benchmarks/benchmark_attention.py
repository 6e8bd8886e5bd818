#!/usr/bin/env python3
"""All kinds of attention, forward and backward: attention2d's grids beside Transformer Engine's context parallelism.

    python benchmarks/benchmark_attention.py --out attention                      # all GPUs; under four minutes on four
    python benchmarks/benchmark_attention.py --out attention --quick              # three kinds, a minute and a half
    python benchmarks/benchmark_attention.py --out packed --kinds packed --documents 1 16 64 256 1024 --seq 65536
    python benchmarks/benchmark_attention.py --out dense --seq 16384 65536 --heads 12/12 16/2 40/40
    python benchmarks/benchmark_attention.py --out nodes --ranks 16 --nodes --seq 16384 --heads 8/8 --inner 1
    python benchmarks/benchmark_attention.py --out graphs --graphs --seq 16384    # as replayed CUDA graphs
    python benchmarks/benchmark_attention.py --out cpu --device cpu --ranks 4     # tiny sizes, our kernels alone
    python benchmarks/benchmark_attention.py --out faked --faked --ranks 8        # one GPU plays one rank of eight

Kinds: one dense sequence, causal and bidirectional; packs of 1 to 1024 documents, whose lengths are drawn as real text
has them; windows; sinks; MLA; dropout; grouped heads (`attention_kinds.KINDS`). --seq, --heads, --head-dim and
--documents replace the sizes of the chosen kinds, by default of the dense one.

Every mode gets the same tensors in the same run, bf16 (fp32 on CPU). A figure is the median over repeats of the slowest
rank, between CUDA events; what Transformer Engine or a kernel refuses is a row that says why.

    host        milliseconds until a call returns that finds the GPU idle: its kernels are queued, not done; forward +
                backward. `new documents`: the same with lengths that no call has seen
    MiB         the peak of allocated memory above the inputs, output and gradients included
    apart       how far O, dQ, dK, dV are from those of the first mode of the kind; with dropout, of our first mode
    predicted   the planner's time, for kinds that it models

All cases run in one process per rank, what matters more first; what the budget doesn't suffice for is printed as `not
run: out of time`. OUT/attention.json holds all rows, attention.md the tables for docs and README, attention.png speeds,
attention.log what ranks printed. With --nodes each rank poses as a host of its own: NCCL talks over loopback sockets.

With --faked one process is rank 0 of --ranks, and the others are faked (`faked_world`). Kernels, host time and memory
are those of a rank; messages take no time on a wire, and results are wrong, so that nothing is compared. `MiB received`
is what a call brings from other ranks: over a link's bandwidth it is the least that the messages would take.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from attention_kinds import FAMILIES, choose
from attention_modes import add_arguments, mode_names
from attention_section import GRACE_S, Section, gpus, run_section
from attention_table import draw, markdown

KERNEL_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
"""FlashAttention-4 compiles its kernels in every process anew, or keeps them on disk. Those that come from there start
slower: 16K tokens take 4.8 ms on two H100 instead of 3.8. So where host time is measured it compiles."""


def main() -> None:
    """Run the kinds and write what was found."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks are ended
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(KERNEL_CACHE, "0")
    begin = time.time()
    section = planned(args)
    section.deadline = begin + args.budget - GRACE_S
    found = run_section(section, args.out, args.case_timeout, begin + args.budget)
    found |= {"host": host(), "budget": args.budget, "title": title(section)}
    (args.out / "attention.json").write_text(json.dumps(found, indent=1))
    (args.out / "attention.md").write_text(markdown(found))
    draw(found, args.out / "attention.png")
    print(f"\n{time.time() - begin:.0f} s of {args.budget:.0f}; {args.out}/attention.json, .md, .png")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    add_arguments(parser)
    parser.add_argument("--faked", action="store_true", help="be rank 0 of --ranks, on one GPU, and fake the others")
    parser.add_argument("--kinds", nargs="+", choices=FAMILIES, help="default: all; with sizes, dense")
    parser.add_argument("--quick", action="store_true", help="three kinds, 100 s")
    parser.add_argument("--seq", nargs="+", type=int, help="tokens of the sequence or pack")
    parser.add_argument("--heads", nargs="+", help="query/key heads: 12/12 16/2")
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--documents", nargs="+", type=int, help="documents of a pack")
    parser.add_argument("--budget", type=float, help="seconds for all; default: 235, with --quick 100")
    parser.add_argument("--case-timeout", type=float, default=90, help="seconds after which a case counts as hung")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="calls before the first timed one")
    parser.add_argument("--seconds", type=float, default=0.3, help="fewer repeats of what takes longer; 0: never fewer")
    parser.add_argument("--inner", type=int, default=0, help="calls per repeat, back to back; 0: about 40 ms worth")
    parser.add_argument("--forward", action="store_true", help="forward only")
    parser.add_argument("--graphs", action="store_true", help="time each mode as a replayed CUDA graph")
    args = parser.parse_args()
    args.budget = args.budget or (100 if args.quick else 235)
    if args.faked and args.nodes:
        parser.error("--faked, --nodes: faked ranks send nothing; choose one of the two")
    sized = args.seq or args.heads or args.head_dim
    if args.kinds is None and args.documents:
        args.kinds = ["packed"]
    elif args.kinds is None and sized:
        args.kinds = ["dense"]
    try:
        args.chosen = choose(
            args.kinds,
            quick=args.quick,
            seq=args.seq,
            heads=args.heads,
            head_dim=args.head_dim,
            documents=args.documents,
        )
    except ValueError as error:
        parser.error(str(error))
    if args.device == "cpu" and not (sized or args.documents):  # one tiny size of each kind
        tiny = [kind.for_cpu(args.ranks) for kind in args.chosen]
        args.chosen = list({kind.label: kind for kind in tiny}.values())
        return args
    for kind in args.chosen:
        if kind.for_ranks(args.ranks) is None:
            print(f"not run: {kind.label}, {kind.sizes}: on {args.ranks} ranks a document has {2 * args.ranks} tokens")
    args.chosen = [fitting for kind in args.chosen if (fitting := kind.for_ranks(args.ranks))]
    return args


def planned(args: argparse.Namespace) -> Section:
    """The section with a case for each kind and mode."""
    section = Section(
        "attention",
        args.device,
        args.ranks,
        args.nodes,
        args.ranks_per_node,
        repeats=args.repeats,
        seconds=args.seconds,
        warmup=args.warmup,
        inner=args.inner or int(args.device == "cpu"),
        forward=args.forward,
        graphs=args.graphs,
        alone=True,
        faked=args.faked,
    )
    machines = None if args.nodes or args.device == "cpu" else gpus(args.ranks)
    for kind in args.chosen:
        section.add(kind, mode_names(args, kind.heads, kind.kv_heads), machines)
    return section


def title(section: Section) -> str:
    """Over tables and pictures."""
    count = 1 if section.faked else torch.cuda.device_count()
    where = f"{count} x {torch.cuda.get_device_name()}" if section.device == "cuda" else "CPU"
    passes = "forward" if section.forward else "forward + backward"
    return f"{section.title}, {where}: {passes}, ms" + (", CUDA graphs" if section.graphs else "")


def host() -> dict[str, Any]:
    """What the figures were measured on."""
    cuda, packages = torch.cuda.is_available(), {}
    for name in ("transformer-engine", "flash-attn-4"):
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "gpus": torch.cuda.device_count(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        **packages,
    }


if __name__ == "__main__":
    main()
