#!/usr/bin/env python3
"""Draw what a million tokens take of a GPU, part by part, with every lever and without each of them.

    python benchmarks/plot_million.py --out docs/one_million_tokens.png
    python benchmarks/plot_million.py --out docs/one_million_tokens.png --measured million/million.json

Each bar is the plan (`megatron-attn2d train RUN.yaml --dry-run`) of configs/runs/llama_8b_1m.yaml with one change; the
same numbers are printed as a table. `--measured` adds the steps of benchmark_million.py: plan and measured peak.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_attn2d.config import RunConfig, load_run
from megatron_attn2d.pictures import COLOURS
from megatron_attn2d.preview import memory

ROOT = Path(__file__).resolve().parents[1]
YAML = ROOT / "configs/runs/llama_8b_1m.yaml"
_ALL_KEPT = [f"training.recompute_{key}=null" for key in ("granularity", "method", "num_layers")]
_ALL_KEPT += ["training.keep_attention_outputs=false", "training.offload_activations=false"]
_ONE_TENSOR_RANK = ["parallelism.tensor=1", "parallelism.sequence_parallel=false", "context_parallel.size=8"]
CASES: dict[str, list[str]] = {
    "as shipped": [],
    "attention computed twice": ["training.keep_attention_outputs=false"],
    "no offload": ["training.offload_activations=false"],
    "no offload, attention twice": ["training.offload_activations=false", "training.keep_attention_outputs=false"],
    "loss in one piece": ["training.loss_chunk_tokens=null"],
    "no recomputation": _ALL_KEPT,
    "tensor 1, context 8": _ONE_TENSOR_RANK,
    "tensor 1, gradients in bf16": [*_ONE_TENSOR_RANK, "optimizer.grad_reduce_in_bf16=true"],
}
"""What each bar changes in the YAML."""
CARDS = 2.2
"""Of how many cards' memory the axis shows."""
_LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 1}
"""Behind words that may lie on the card's line."""


def main() -> None:
    """Print the table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--measured", type=Path, help="million.json of benchmark_million.py")
    args = parser.parse_args()
    runs = {name: load_run(YAML, overrides) for name, overrides in CASES.items()}
    print(table(runs))
    found = json.loads(args.measured.read_text()) if args.measured else {"ranks": 0, "steps": []}
    draw(runs, [row for row in found["steps"] if "failed" not in row], found["ranks"], args.out)


def table(runs: dict[str, RunConfig]) -> str:
    """The plan of each run in GiB, in Markdown."""
    parts = list(memory.Memory.__dataclass_fields__)
    lines = [f"| | {' | '.join(parts)} | **peak** | host, per node |", f"|{' --- |' * (len(parts) + 3)}"]
    for name, run in runs.items():
        plan, host = memory.estimate(run), memory.estimate_host(run).activations
        cells = [f"{size / memory.GIB:,.1f}" for size in vars(plan).values()]
        total = f"{plan.total / memory.GIB:,.1f}"
        lines.append(f"| {name} | {' | '.join(cells)} | **{total}** | {host / memory.GIB:,.0f} |")
    return "\n".join(lines)


def at_peak(plan: dict[str, float]) -> dict[str, float]:
    """The parts that exist at the peak: a layer's MLP or its attention, or the loss."""
    lasting = {name: plan[name] for name in ("weights", "gradients", "optimizer", "activations")}
    inner = max(("mlp", "attention"), key=lambda name: plan[name])
    layer = {"layer": plan["layer"], inner: plan[inner]}
    worst = layer if sum(layer.values()) > plan["logits"] else {"logits": plan["logits"]}
    return {**lasting, **worst, "reserved": plan["reserved"]}


def draw(runs: dict[str, RunConfig], measured: list[dict[str, Any]], ranks: int, output: Path) -> None:
    """A stacked bar per run, and for each step measured on `ranks` GPUs its plan beside its peak."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    parts = list(memory.Memory.__dataclass_fields__)
    colours = dict(zip(parts, (*COLOURS, "#F0E442", "#882255", "#999999"), strict=True))
    bars = {
        name: {part: size / memory.GIB for part, size in at_peak(vars(memory.estimate(run))).items()}
        for name, run in runs.items()
    }
    bars |= {f"{row['seq'] // 1024}K tokens, {ranks} GPUs; line: measured": at_peak(row["plan"]) for row in measured}
    figure = Figure(figsize=(11, 0.5 * len(bars) + 1.6), dpi=160, layout="constrained")
    axes = figure.subplots()
    room = next(iter(runs.values())).cluster.memory_gib or 0.0
    most = CARDS * room
    for place, plan in enumerate(bars.values()):
        left = 0.0
        for part, size in plan.items():
            axes.barh(place, min(size, max(0.0, most - left)), left=left, color=colours[part], edgecolor="white")
            left += size
        axes.text(min(left, most) + 1, place, f"{left:,.0f} GiB", va="center", fontsize="small", bbox=_LABEL)
    for row, place in zip(measured, range(len(runs), len(bars)), strict=True):
        axes.plot([row["peak_gib"] + row["plan"]["reserved"]] * 2, [place - 0.4, place + 0.4], "k", linewidth=2)
    axes.axvline(room, color="black", linestyle="--", linewidth=1)
    axes.text(room, -0.75, f"{room:g} GiB of an H100", ha="center", fontsize="small", bbox=_LABEL)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.1)
    axes.set_xlabel("GiB per GPU, 1,048,576 tokens on 8 GPUs where not said; bars end where the axis does")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        axes.barh(0, 0, color=colours[part], label=part)
        for part in parts
        if any(part in plan for plan in bars.values())
    ]
    figure.legend(handles=handles, frameon=False, fontsize="small", loc="outside right center")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="png")


if __name__ == "__main__":
    main()
