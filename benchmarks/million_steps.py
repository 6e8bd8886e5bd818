"""Whole steps of benchmark_million.py: a run of the YAML with its overrides, and what it took beside the plan."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from training_run import TrainingError, run
from watched import brief

from megatron_attn2d.config import RunConfig, load_run
from megatron_attn2d.preview import memory

ROOT = Path(__file__).resolve().parents[1]
YAML = ROOT / "configs/runs/llama_8b_1m.yaml"
TINY = {"hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 128}


def train(seq: int, overrides: list[str], args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """A row on two steps of `seq` tokens."""
    overrides = [*step_overrides(seq, args), *args.overrides, *overrides]
    planned = load_run(YAML, overrides)
    left = deadline - time.time()
    try:
        if left < _LEAST_S:
            raise TrainingError("not run: out of time")
        if not args.faked:
            recorded = run(YAML, args.ranks, overrides, left, torchrun=False, enough=1)
            return {"seq": seq, **measured_steps(recorded, planned)}
        directory = args.out / f"steps-{seq}-tensor-{args.tensor}"
        program = [str(ROOT / "benchmarks/faked_training.py"), str(args.ranks)]
        recorded = run(YAML, 1, overrides, left, torchrun=False, enough=1, directory=str(directory), program=program)
    except TrainingError as error:
        return {"seq": seq, "failed": brief(str(error))}
    parts = [json.loads(line) for line in (directory / "parts.jsonl").read_text().splitlines()]
    return {"seq": seq, **measured_steps(recorded, planned), "parts": parts[-1]}


_LEAST_S = 30
"""Of a training: less than that, and it would not get to its first step."""


def step_overrides(seq: int, args: argparse.Namespace) -> list[str]:
    """What a run changes in the YAML."""
    small = [f"model.{name}={value}" for name, value in TINY.items() if name != "vocab_size"] + ["model.num_layers=2"]
    small += ["data.vocab_size=128", "data.null_tokenizer_eod_id=0", "training.loss_chunk_tokens=8"]
    on_cpu = ["environment.device=cpu", "environment.gpus_per_node=null", "training.precision=fp32"]
    on_cpu += ["environment.variables={OMP_NUM_THREADS: 1}", "environment.nodes=null"]
    memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if args.device == "cuda" else 1.0
    return [
        f"training.seq_length={seq}",
        f"training.train_iters={args.iterations}",
        "training.global_batch_size=1",
        f"optimizer.lr_warmup_iters={min(1, args.iterations - 1)}",
        f"parallelism.tensor={args.tensor}",
        f"parallelism.sequence_parallel={str(args.tensor > 1).lower()}",
        f"context_parallel.size={args.ranks // args.tensor}",
        "checkpoint.save=false",
        "checkpoint.save_interval=null",
        f"cluster.peak_tflops={args.peak_tflops}",
        f"cluster.memory_gib={memory_gib:.1f}",
        f"environment.gpus_per_node={args.ranks}",
        *([] if args.num_layers is None else [f"model.num_layers={args.num_layers}"]),
        *(small if args.model == "tiny" else []),
        *(on_cpu if args.device == "cpu" else []),
    ]


def measured_steps(recorded: list[dict[str, Any]], planned: RunConfig) -> dict[str, Any]:
    """Of the last step, and the memory beside the plan's."""
    last, plan = recorded[-1], memory.estimate(planned)
    return {
        "steps": len(recorded),
        "first_step_s": planned.training.seq_length / recorded[0]["tokens_per_s"],
        "step_s": planned.training.seq_length / last["tokens_per_s"],
        "tokens_per_s": last["tokens_per_s"],
        "tflops": last["tflops"],
        "mfu": last.get("mfu"),
        "peak_gib": last["memory_gib"],
        "planned_gib": (plan.total - plan.reserved) / 2**30,
        "host_gib": last.get("offloaded_gib"),
        "planned_host_gib": memory.estimate_host(planned).activations / planned.world_size / 2**30,
        "plan": {name: size / 2**30 for name, size in vars(plan).items()},
        "loss": last["loss"],
        "grad_norm": last["grad_norm"],
    }


def step_line(row: dict[str, Any]) -> str:
    """A row for people."""
    if "failed" in row:
        return f"S={row['seq']:8,} FAILED  {row['failed']}"
    mfu = "" if row["mfu"] is None else f"MFU {row['mfu']:.1%}, "
    host = "" if row["host_gib"] is None else f"; host {row['host_gib']:.1f}, planned {row['planned_host_gib']:.1f}"
    parts = row.get("parts")
    found = parts_line(parts) if parts else f"loss {row['loss']:.4f}, grad norm {row['grad_norm']:.3f}"
    return (
        f"S={row['seq']:8,} step {row['step_s']:.1f} s (the first {row['first_step_s']:.1f}), "
        f"{row['tokens_per_s']:,.0f} tokens/s, {row['tflops']:.0f} TFLOP/s per rank, {mfu}{found}; "
        f"GiB: GPU {row['peak_gib']:.1f}, planned {row['planned_gib']:.1f}"
        f" ({row['planned_gib'] / row['peak_gib'] - 1:+.1%}){host}"
    )


def parts_line(parts: dict[str, float]) -> str:
    """The last step of a faked rank by parts."""
    rest = parts["step_s"] - parts["forward_s"] - parts["backward_s"]
    return (
        f"forward {parts['forward_s']:.1f}, backward {parts['backward_s']:.1f}, rest {rest:.1f} s; GiB: between steps "
        f"{parts['lasting_gib']:.1f}, torch holds {parts['reserved_gib']:.1f}, GPU in use {parts['taken_gib']:.1f}, "
        f"host process {parts['host_process_gib']:.1f}"
    )
