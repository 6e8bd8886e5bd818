#!/usr/bin/env python3
"""Time whole training steps under ring attention and attention2d, side by side, and compare their losses.

    python scripts/benchmark_training.py --ranks 2 --seq 65536 131072

Trains the GPT of benchmark_training.yaml from the same seed for some steps with each mode, all ranks as context ranks,
through `megatron-attn2d train`. Where Transformer Engine is installed, `ring` is its p2p and `all_gather` its own too.
Tokens/s are the median over the steps after the first five; the loss column is the largest relative difference of a
step's loss from the first mode's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_attn2d.metrics import read_steps

ROOT = Path(__file__).resolve().parents[1]
WARMUP = 5


def main() -> None:
    """Train every case and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="context-parallel ranks, a GPU each")
    parser.add_argument("--seq", nargs="+", type=int, default=[65536, 131072])
    parser.add_argument("--modes", nargs="+", default=["ring", "attention2d"])
    parser.add_argument("--grid", default="auto", help="of attention2d: auto or [R,C]")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a run")
    parser.add_argument("overrides", nargs="*", help="key=value of the YAML, for every run")
    args = parser.parse_args()
    for seq in args.seq:
        base: list[dict[str, Any]] = []
        for mode in args.modes:
            steps = train(args, seq, mode)
            base = base or steps
            show(seq, mode, steps, base)


def train(args: argparse.Namespace, seq: int, mode: str) -> list[dict[str, Any]]:
    """The recorded steps of one run."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)),
            *("-m", "megatron_attn2d.cli", "train", str(ROOT / "scripts/benchmark_training.yaml")),
            f"run.dir={directory}",
            f"training.seq_length={seq}",
            f"training.train_iters={args.steps}",
            f"context_parallel.size={args.ranks}",
            f"context_parallel.mode={mode}",
            *([f"context_parallel.grid={args.grid}"] if mode == "attention2d" else []),
            f"environment.gpus_per_node={args.ranks}",
            *args.overrides,
        ]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=args.timeout)
        if done.returncode:
            logs = [path.read_text()[-3000:] for path in Path(directory).glob("**/*.log")]
            sys.exit(
                f"{mode} at {seq} tokens failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}\n" + "\n".join(logs)
            )
        return list(read_steps(Path(directory)).values())


def show(seq: int, mode: str, steps: list[dict[str, Any]], base: list[dict[str, Any]]) -> None:
    """Print a row."""
    rate, base_rate = (statistics.median(s["tokens_per_s"] for s in run[WARMUP:]) for run in (steps, base))
    apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(steps, base, strict=True))
    memory = max((s.get("memory_gib") or 0.0) for s in steps)
    tflops = statistics.median(s.get("tflops") or 0.0 for s in steps[WARMUP:])
    print(
        f"S={seq:7d} {mode:12s} {rate:9.0f} tokens/s {rate / base_rate:6.3f}x  {tflops:6.1f} TFLOP/s a rank "
        f"{memory:6.2f} GiB  loss {base[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}, apart {apart:.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
