#!/usr/bin/env python3
"""What a layer of an 8B model costs at lengths up to a million tokens, in every mode; and whole steps beside the plan.

    python benchmarks/benchmark_million.py --ranks 2 --out million --budget 480
    python benchmarks/benchmark_million.py --ranks 2 --out million --quick --budget 240
    python benchmarks/benchmark_million.py --ranks 2 --out million --sections steps --steps-seq 262144 524288
    python benchmarks/benchmark_million.py --ranks 2 --out million --device cpu --model tiny --seq 64 128
    python benchmarks/benchmark_million.py --ranks 8 --faked --out million --sections layers --seq 524288 1048576
    python benchmarks/benchmark_million.py --ranks 8 --faked --out million --sections steps --steps-seq 1048576 \
        --tensor 2 --iterations 1

Sections, in this order; `--sections` picks some:
    layers  one layer of the model, all recomputed, forward and backward: attention2d (its output kept on the host, and
            recomputed), Transformer Engine's p2p, a2a and all_gather where it is installed, ours of these names
            elsewhere; and the output layer with the loss in chunks
    steps   whole steps of configs/runs/llama_8b_1m.yaml (--tensor of the ranks share a layer's weights, the rest are
            context ranks): tokens/s, MFU, memory of GPU and host beside the plan
    norms   two steps of the same at --norms-seq tokens under attention2d and under ring attention: how far losses and
            gradient norms are apart

Overrides of the YAML (`training.keep_attention_outputs=false`) are for steps and norms.

From two lengths S on P ranks follow the two numbers of a layer's seconds A * S^2 / P + B * S / P, and with them a step
of --target tokens on --target-ranks; the arithmetic is printed.

With --faked one process on one GPU is rank 0 of --ranks, and the others are faked (`faked_world`): kernels and memory
are those of a rank, messages take no time on a wire, losses are wrong. What time doesn't suffice for is printed as `not
run`. OUT/million.json holds all rows, OUT/million.md tables for docs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from million_steps import ROOT, TINY, YAML, step_line, train
from million_table import markdown
from watched import Watched, python

from megatron_attn2d.config import load_run
from megatron_attn2d.preview import parameters

ANCHOR_S = 380.0
"""Published for Qwen3-8B, 1,048,576 tokens per step on 8 x H100, with Ulysses or ring attention."""
START_S = 240.0
"""How long the ranks may take until the first layer: they import Megatron and Transformer Engine."""
SECTIONS = ("layers", "steps", "norms")
MODES = ("attention2d", "p2p", "a2a", "all_gather")


def main() -> None:
    """Run the sections and write what they found."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + args.budget
    found: dict[str, Any] = {"ranks": args.ranks, "where": f"{args.model}, {where(args)}", "model": model(args)}
    found |= {section: [] for section in SECTIONS}
    for i, section in enumerate(args.sections):
        last = i + 1 == len(args.sections)
        until = deadline if last else min(deadline, time.time() + _SHARE * args.budget)
        {"layers": layers, "steps": steps, "norms": norms}[section](args, found, until)
        (args.out / "million.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.out / "million.md").write_text(markdown(found))
    if "layers" in args.sections:
        print(extrapolation(found["layers"], found["model"], args))
    rows = [row for section in args.sections for row in found[section]]
    sys.exit(all("failed" in row for row in rows))


_SHARE = 0.6
"""Of the budget, what a section may take that is not the last."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2, help="context-parallel ranks, one GPU each")
    parser.add_argument("--faked", action="store_true", help="be rank 0 of --ranks, on one GPU, and fake the others")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=("8b", "tiny"), default="8b")
    parser.add_argument("--seq", nargs="+", type=int, help="of layers; default: 131072 262144 524288, two if --quick")
    parser.add_argument("--steps-seq", nargs="+", type=int, help="of steps; default: 131072 262144, one if --quick")
    parser.add_argument("--grids", nargs="*", default=[], help="RxC or UxRxC, besides the automatic one")
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=["layers", "steps"])
    parser.add_argument("--tensor", type=int, default=1, help="tensor ranks of steps and norms")
    parser.add_argument("--num-layers", type=int, help="of the model of steps and norms; default: all")
    parser.add_argument("--iterations", type=int, default=2, help="of steps and norms; the first one compiles too")
    parser.add_argument("--norms-seq", type=int, default=65536)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens whose logits exist at a time")
    parser.add_argument("--repeats", type=int, default=1, help="of a layer, after the first call")
    parser.add_argument("--target", type=int, default=2**20)
    parser.add_argument("--target-ranks", type=int, default=8)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--case-timeout", type=float, default=150.0)
    parser.add_argument("--quick", action="store_true", help="fewer lengths")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the YAML, in steps and norms")
    args = parser.parse_intermixed_args()
    if args.ranks % args.tensor:
        parser.error(f"--tensor {args.tensor}: no divisor of --ranks {args.ranks}")
    if args.faked and "norms" in args.sections:
        parser.error("--faked, --sections norms: losses of faked ranks are wrong; choose layers, steps")
    args.seq = args.seq or [131072, 524288] if args.quick else args.seq or [131072, 262144, 524288]
    args.steps_seq = args.steps_seq or ([131072] if args.quick else [131072, 262144])
    return args


def model(args: argparse.Namespace) -> dict[str, Any]:
    """The sizes of the model."""
    if args.model == "tiny":
        return {**TINY, "num_layers": 2, "qk_layernorm": False, "rotary_base": 10000}
    sizes, data = load_run(YAML).model, load_run(YAML).data
    names = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "qk_layernorm", "rotary_base")
    read = {name: getattr(sizes, name) for name in names}
    return {**read, "ffn_hidden_size": parameters.ffn_width(sizes), "vocab_size": data.vocab_size}


def layers(args: argparse.Namespace, found: dict[str, Any], deadline: float) -> None:
    """Every length and mode, the short lengths first; prints a line for each."""
    cases = [
        {"seq": seq, "mode": mode, "kept": kept, "expected_s": expected_seconds(seq, args)}
        for seq in args.seq
        for mode, kept in variants(args)
    ]
    cases.insert(len(variants(args)), {"seq": args.seq[0], "mode": "loss", "kept": False, "expected_s": 5.0})
    given = {"cases": cases, "deadline": deadline, "model": found["model"]}
    given |= {name: getattr(args, name) for name in ("ranks", "device", "repeats", "chunk", "faked")}
    (args.out / "layers.json").write_text(json.dumps(given))
    print(f"one layer, {where(args)}; TFLOP/s per rank of the model's arithmetic, without what is recomputed")

    def tell(said: dict[str, Any]) -> None:
        if "end" in said:
            row = {**cases[said["end"]], **said}
            found["layers"].append(row)
            print(line(row, found["layers"], found["model"], args), flush=True)

    rows = args.out / "layers.jsonl"
    command = python(ROOT / "benchmarks/million_layers.py", str(args.out / "layers.json"), str(rows))
    Watched(command, rows, args.out / "layers.log", START_S, args.case_timeout, deadline).run(len(cases), tell)


def variants(args: argparse.Namespace) -> list[tuple[str, bool]]:
    """The modes, and whether attention's output is kept."""
    found = []
    for mode in args.modes:
        if mode == "attention2d":
            found += [(mode, True), (mode, False), *((f"{mode}:{grid}", True) for grid in args.grids)]
        else:
            found.append((mode, False))
    return found


def expected_seconds(seq: int, args: argparse.Namespace) -> float:
    """What all calls of a case take if kernels reach half of a card's peak."""
    if args.device == "cpu":
        return 0.0
    sizes = model(args)
    return (1 + args.repeats) * 4 * layer_flops(sizes, seq) / args.ranks / (0.5 * args.peak_tflops * 1e12) + 2


def layer_flops(sizes: dict[str, Any], seq: int) -> float:
    """Of a layer's forward pass, over all ranks; attention is causal."""
    hidden, ffn, heads, groups = (
        sizes[name] for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    )
    weights = hidden * (2 * hidden + 2 * hidden * groups // heads + 3 * ffn)
    return float(2 * seq * weights + 2 * seq**2 * hidden)


def total(row: dict[str, Any]) -> float:
    """Seconds of a row, forward and backward."""
    return float(row.get("total_s") or row["forward_s"] + row["backward_s"])


def line(row: dict[str, Any], rows: list[dict[str, Any]], sizes: dict[str, Any], args: argparse.Namespace) -> str:
    """A row for people."""
    name = label(row)
    if "failed" in row:
        return f"S={row['seq']:8,} {name:32s} FAILED  {row['failed']}"
    if row["mode"] == "loss":
        return f"S={row['seq']:8,} {name:32s} {total(row):8.3f} s in all, peak {row['peak_gib']:.1f} GiB"
    tflops = 3 * layer_flops(sizes, row["seq"]) / args.ranks / total(row) / 1e12
    return (
        f"S={row['seq']:8,} {name:32s} forward {row['forward_s']:8.3f}  backward {row['backward_s']:8.3f}  "
        f"in all {total(row):8.3f} s  {tflops:6.1f} TFLOP/s ({tflops / args.peak_tflops:.1%})  "
        f"first call {row['first_s']:.1f} s  peak {row['peak_gib']:.1f} GiB"
    )


def label(row: dict[str, Any]) -> str:
    """What a row measures."""
    if row["mode"] == "loss":
        return "output layer and loss, in chunks"
    return row["mode"] + (", output kept on host" if row["kept"] else "")


def extrapolation(rows: list[dict[str, Any]], sizes: dict[str, Any], args: argparse.Namespace) -> str:
    """A step of the target's length on its ranks, from the two longest lengths of each mode."""
    good = [row for row in rows if "failed" not in row]
    seq, ranks, count = args.target, args.target_ranks, sizes["num_layers"]
    head = next((total(row) * args.ranks / row["seq"] for row in good if row["mode"] == "loss"), 0.0) * seq / ranks
    flops = 3 * (count * layer_flops(sizes, seq) + 2 * seq * sizes["hidden_size"] * sizes["vocab_size"])
    lines = ["", *speed_ups(good)]
    lines += [
        f"\nextrapolated: {seq:,} tokens on {ranks} ranks = {count} layers x (A S^2 / P + B S / P) + the loss's "
        f"{head:.1f} s; without the optimizer and without " + ("messages" if args.faked else "links between nodes")
    ]
    for name in dict.fromkeys(label(row) for row in good if row["mode"] != "loss"):
        measured = sorted((row["seq"], total(row)) for row in good if label(row) == name)[-2:]
        if len(measured) < 2:
            lines.append(f"  {name:32s} one length only")
            continue
        (s1, t1), (s2, t2) = measured
        a = (t2 / s2 - t1 / s1) * args.ranks / (s2 - s1)
        b = t1 / s1 * args.ranks - a * s1
        layer = a * seq**2 / ranks + b * seq / ranks
        step = count * layer + head
        lines.append(
            f"  {name:32s} A {a:.3e}  B {b:.3e}: {count} x {layer:.2f} + {head:.1f} = {step:.0f} s, "
            f"{seq / step:,.0f} tokens/s, MFU {flops / step / ranks / args.peak_tflops / 1e12:.1%}, "
            f"{ANCHOR_S / step:.2f}x of the published {ANCHOR_S:.0f} s"
        )
    return "\n".join(lines)


def speed_ups(rows: list[dict[str, Any]]) -> list[str]:
    """attention2d over the best of the other modes, a line per length."""
    lines = []
    for seq in dict.fromkeys(row["seq"] for row in rows):
        here = [row for row in rows if row["seq"] == seq and row["mode"] != "loss"]
        others = [row for row in here if not row["mode"].startswith("attention2d")]
        if others:
            best = min(others, key=total)
            ours = [row for row in here if row not in others]
            said = ", ".join(f"{label(row)} {total(best) / total(row):.3f}x" for row in ours)
            lines.append(f"S={seq:8,} over {best['mode']}, the best other mode: {said}")
    return lines


def steps(args: argparse.Namespace, found: dict[str, Any], deadline: float) -> None:
    """Whole steps beside the plan; prints a line for each length."""
    context = args.ranks // args.tensor
    print(f"\nwhole steps of {YAML.stem}, tensor {args.tensor} x context {context}, {where(args)}", flush=True)
    for seq in args.steps_seq:
        found["steps"].append(train(seq, [], args, deadline))
        print(step_line(found["steps"][-1]), flush=True)


def norms(args: argparse.Namespace, found: dict[str, Any], deadline: float) -> None:
    """Losses and gradient norms of attention2d and of the ring, from the same weights and data."""
    rows = [
        train(args.norms_seq, [f"context_parallel.mode={mode}"], args, deadline) for mode in ("attention2d", "ring")
    ]
    found["norms"] = rows
    print(f"\nattention2d, then ring, {args.ranks} context ranks")
    print(*map(step_line, rows), sep="\n")
    if not any("failed" in row for row in rows):
        ours, rings = rows
        apart = {name: abs(ours[name] / rings[name] - 1) for name in ("loss", "grad_norm")}
        print(f"apart: loss {apart['loss']:.1e}, gradient norm {apart['grad_norm']:.1e}", flush=True)


def where(args: argparse.Namespace) -> str:
    """The ranks, for people."""
    others = f"rank 0 of {args.ranks}, the other {args.ranks - 1} faked, without the time of messages"
    return others if args.faked else f"{args.ranks} ranks"


if __name__ == "__main__":
    main()
