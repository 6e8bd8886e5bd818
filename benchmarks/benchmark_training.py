#!/usr/bin/env python3
"""Time whole training steps under ring attention and attention2d, side by side, and compare their losses.

    python benchmarks/benchmark_training.py --ranks 2 --seq 65536 131072
    python benchmarks/benchmark_training.py --ranks 2 --per-rank 4096 --steps 15 --graphs none layer attention
    python benchmarks/benchmark_training.py --ranks 2 --seq 16384 --fp8 none delayed tensorwise blockwise
    python benchmarks/benchmark_training.py --ranks 2 --seq 8192 --modes ring ulysses data.document_masking=true --nodes

Trains the GPT of benchmark_training.yaml from the same seed for some steps with each mode, all ranks as context ranks,
through `megatron-attn2d train`; with each of `--graphs` (training.cuda_graphs) and of `--fp8` (training.fp8). Where
Transformer Engine is installed, `ring` is its p2p and `all_gather` its own too. Tokens/s are the median over the steps
after the first five. Factors are over the mode's own first row (`own`), and over the first mode under the same graphs
and FP8. The loss column is the largest relative difference of a step's loss from the first row's.

With --nodes each rank poses as a host of one GPU, and ranks may share GPUs: NCCL talks over loopback sockets, and the
times are theirs. It serves to compare losses where there are fewer GPUs than ranks.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import statistics
import sys
from typing import Any, NamedTuple

from training_run import ROOT, TrainingError, machines, run
from watched import brief

WARMUP = 5


class Case(NamedTuple):
    """What a run trains with, besides the length."""

    mode: str
    graphs: str
    fp8: str

    @property
    def label(self) -> str:
        """As the table says it."""
        return (
            self.mode
            + (f", graphs {self.graphs}" * (self.graphs != "none"))
            + (f", FP8 {self.fp8}" * (self.fp8 != "none"))
        )


def main() -> None:
    """Train every case and print a row for each."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks are ended
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="context-parallel ranks, one GPU each")
    parser.add_argument("--nodes", action="store_true", help="each rank poses as a host; they may share GPUs")
    parser.add_argument("--seq", nargs="+", type=int, default=[65536, 131072])
    parser.add_argument("--per-rank", type=int, help="tokens per rank, instead of --seq")
    parser.add_argument("--modes", nargs="+", default=["ring", "attention2d"])
    parser.add_argument("--graphs", nargs="+", default=["none"], help="none, attention, layer, iteration")
    parser.add_argument("--fp8", nargs="+", default=["none"], help="none, delayed, tensorwise, blockwise")
    parser.add_argument("--grid", default="auto", help="of attention2d: auto or [R,C]")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a run")
    parser.add_argument("overrides", nargs="*", help="key=value of the YAML, for every run")
    words = sys.argv[1:]
    overrides = [word for word in words if "=" in word and not word.startswith("-")]  # else --modes would take them
    args = parser.parse_args([word for word in words if word not in overrides])
    args.overrides += overrides
    cases = [Case(*case) for case in itertools.product(args.modes, args.graphs, args.fp8)]
    failed = False
    for seq in [args.per_rank * args.ranks] if args.per_rank else args.seq:
        found: dict[Case, list[dict[str, Any]]] = {}
        for case in cases:
            try:
                found[case] = train(args, seq, case)
            except TrainingError as error:
                failed = True
                print(f"S={seq:7d} {case.label:32s} FAILED  {brief(str(error))}", flush=True)
            else:
                print(row(seq, case, found, cases), flush=True)
    sys.exit(failed)


def train(args: argparse.Namespace, seq: int, case: Case) -> list[dict[str, Any]]:
    """The recorded steps of one run; raises TrainingError."""
    overrides = [
        f"training.seq_length={seq}",
        f"training.train_iters={args.steps}",
        f"training.cuda_graphs={case.graphs}",
        f"training.fp8={case.fp8}",
        f"context_parallel.size={args.ranks}",
        f"context_parallel.mode={case.mode}",
        *([f"context_parallel.grid={args.grid}"] if case.mode == "attention2d" else []),
        *machines(args.ranks, args.nodes),
        *args.overrides,
    ]
    yaml = ROOT / "benchmarks/benchmark_training.yaml"
    return run(yaml, args.ranks, overrides, args.timeout, torchrun=False, nodes=args.nodes)


def summary(steps: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, float]:
    """What is said of a run: medians after the warm-up, and how far its losses are from those of the first mode."""
    warm = steps[min(WARMUP, len(steps) // 2) :]
    return {
        "tokens_per_s": statistics.median(s["tokens_per_s"] for s in warm),
        "tflops": statistics.median(s.get("tflops") or 0.0 for s in warm),
        "mfu": statistics.median(s.get("mfu") or 0.0 for s in warm),
        "memory_gib": max((s.get("memory_gib") or 0.0) for s in steps),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "apart": max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(steps, base, strict=False)),
    }


def row(seq: int, case: Case, found: dict[Case, list[dict[str, Any]]], cases: list[Case]) -> str:
    """A line on the latest of the runs that are found; `cases` are all that were asked for."""
    said = summary(found[case], next(iter(found.values())))
    rate, factors = said["tokens_per_s"], []
    for name, other in (
        ("own", case._replace(graphs=cases[0].graphs, fp8=cases[0].fp8)),
        (cases[0].mode, case._replace(mode=cases[0].mode)),
    ):
        of = rate / summary(found[other], found[other])["tokens_per_s"] if other in found else float("nan")
        factors.append(f"{of:6.3f}x {name}")
    return (
        f"S={seq:7d} {case.label:32s} {rate:9.0f} tokens/s {'  '.join(factors)} {said['tflops']:6.1f} TFLOP/s per rank "
        f"{said['memory_gib']:6.2f} GiB  loss {said['first_loss']:.4f} -> {said['last_loss']:.4f}, "
        f"apart {said['apart']:.1e}"
    )


if __name__ == "__main__":
    main()
