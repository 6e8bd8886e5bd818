"""The runs of whole training of benchmark_multi_gpu.py."""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmark_training import summary
from training_run import TrainingError, run


def train(args: argparse.Namespace, deadline: float, found: dict[str, Any]) -> None:
    """Train every layout of ranks with both modes while there is time."""
    n, took = args.ranks, 0.0
    print(f"\ntraining: {args.train_yaml.name}, S={args.train_seq}, {args.train_steps} steps", flush=True)
    layouts = [(1, n), *([(2, n // 2)] if n >= 4 and n % 2 == 0 else []), *([(1, n // 2)] if n >= 8 else [])]
    for tensor, context in layouts[: 1 if args.quick else None]:
        base: list[dict[str, Any]] = []
        for mode in ("ring", "attention2d"):
            row: dict[str, Any] = {"tensor": tensor, "context": context, "data": n // (tensor * context), "mode": mode}
            left, begin = deadline - time.time(), time.time()
            if left < max(10.0, took):
                row["failed"] = "not run: out of time"
            else:
                try:
                    steps = run(
                        args.train_yaml,
                        n,
                        training_overrides(args, tensor, context, mode),
                        left,
                        torchrun=args.device == "cuda",
                        enough=args.train_steps // 2 + 2,
                    )
                    base = base or (steps if mode == "ring" else [])
                    row |= summary(steps, base or steps) | {"steps": len(steps), "against_ring": bool(base)}
                    row["losses"] = [step["loss"] for step in steps]
                except TrainingError as error:
                    said = [line.strip() for line in str(error).splitlines() if line.strip()]
                    row["failed"] = f"{said[0]}: {([x for x in said if 'Error' in x] or said)[-1]}"[:200]
                    log = args.out / f"training-tp{tensor}-cp{context}-{mode}.log"
                    log.write_text(str(error))
                took = row["took_s"] = time.time() - begin
            found["training"].append(row)
            show_training(row, found["training"])


def training_overrides(args: argparse.Namespace, tensor: int, context: int, mode: str) -> list[str]:
    """What a run changes in the YAML."""
    gpus = [f"environment.gpus_per_node={args.ranks}"] if args.device == "cuda" else []
    return [
        f"training.seq_length={args.train_seq}",
        f"training.train_iters={args.train_steps}",
        f"optimizer.lr_warmup_iters={args.train_steps // 2}",
        "training.micro_batch_size=1",
        f"training.global_batch_size={args.ranks // (tensor * context)}",
        f"parallelism.tensor={tensor}",
        f"parallelism.sequence_parallel={str(tensor > 1).lower()}",
        f"context_parallel.size={context}",
        f"context_parallel.mode={mode}",
        *gpus,
        *args.overrides,
    ]


def show_training(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print a row, its speed against the ring on the same layout."""
    layout = f"TP{row['tensor']} CP{row['context']} DP{row['data']}"
    head = f"  {layout:12s} {row['mode']:12s}"
    if "failed" in row:
        print(f"{head} {row['failed']}", flush=True)
        return
    same = ("tensor", "context", "mode")
    ring = next(
        (r for r in rows if [r[k] for k in same] == [row["tensor"], row["context"], "ring"] and "failed" not in r), None
    )
    speed = f"{row['tokens_per_s'] / ring['tokens_per_s']:6.3f}x" if ring else "     -"
    apart = f"{row['apart']:.1e} apart from ring" if row["against_ring"] else "no ring to compare with"
    print(
        f"{head} {row['tokens_per_s']:9.0f} tokens/s {speed}  MFU {row['mfu']:6.1%}  {row['memory_gib']:6.2f} GiB  "
        f"loss {row['first_loss']:.4f} -> {row['last_loss']:.4f} in {row['steps']} steps, {apart}",
        flush=True,
    )
