#!/usr/bin/env python3
"""Speed-ups that benchmark_emulated_cluster.py measured, against the sequence length: a PNG and a table in Markdown.

    python benchmarks/plot_emulated_cluster.py ROWS.json ... -o docs/emulated_cluster.png > docs/emulated_cluster.md

A panel for each number of ranks, a colour for each shape of heads, a style of line for each mode; dotted, what the
planner predicts.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron_attn2d.pictures import COLOURS, blank, ruled, save

NAMES = {"16/16x96": "760M: 16 heads of 96", "32/32x80": "2.7B: 32 heads of 80", "40/40x128": "13B: 40 heads of 128"}
STYLES = ("-", (0, (5, 2)), (0, (6, 2, 1, 2)))


def main() -> None:
    """Read the rows, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path, help="what --json wrote")
    parser.add_argument("-o", "--output", required=True, type=Path, help="PNG")
    args = parser.parse_args()
    rows = with_speed_ups([row for path in args.rows for row in json.loads(path.read_text())])
    print(table(rows))
    draw(rows, args.output)


def with_speed_ups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows but the rings', with the measured and the predicted speed-up over the ring of the same workload."""
    rings = {_workload(row): row for row in rows if row["mode"] == "ring"}
    return [
        row
        | {
            "ring_s": rings[_workload(row)]["total_s"],
            "ring_predicted_s": rings[_workload(row)]["predicted_s"],
            "measured": rings[_workload(row)]["total_s"] / row["total_s"],
            "predicted": rings[_workload(row)]["predicted_s"] / row["predicted_s"],
        }
        for row in rows
        if row["mode"] != "ring"
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line for each workload and mode."""
    lines = [
        "| hosts | cards | model | tokens | ring, predicted | mode | seconds, predicted | speed-up, predicted |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['hosts']} x {row['ranks_per_host']} | {row['nic']} | {NAMES.get(row['shape'], row['shape'])} "
            f"| {row['seq']} | {row['ring_s']:.2f}, {row['ring_predicted_s']:.2f} | {row['mode']} "
            f"| {row['total_s']:.2f}, {row['predicted_s']:.2f} | {row['measured']:.2f}, {row['predicted']:.2f} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], output: Path) -> None:
    """A panel for each number of ranks."""

    panels: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        panels[row["hosts"] * row["ranks_per_host"]].append(row)
    figure = blank(5 * len(panels), 4.4, dpi=110)
    for axes, (ranks, shown) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        modes, shapes = (list(dict.fromkeys(row[key] for row in shown)) for key in ("mode", "shape"))
        for mode, style in zip(modes, STYLES, strict=False):
            for shape, colour in zip(shapes, COLOURS, strict=False):
                line = [row for row in shown if row["mode"] == mode and row["shape"] == shape]
                lengths = [row["seq"] for row in line]
                label = f"{NAMES.get(shape, shape)}, {mode}"
                axes.plot(lengths, [row["measured"] for row in line], "o", linestyle=style, color=colour, label=label)
                axes.plot(lengths, [row["predicted"] for row in line], ":", color=colour, linewidth=1)
        lengths = sorted({row["seq"] for row in shown})
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.set_ylim(0, 1.4 * max(max(row["measured"], row["predicted"]) for row in shown))
        axes.set_xlabel("sequence length, tokens")
        axes.set_ylabel("speed-up over a ring, forward + backward")
        axes.set_title(f"{ranks} ranks on {shown[0]['hosts']} emulated hosts, {shown[0]['nic']}/s", fontsize=11)
        ruled(axes)
        axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=len(modes))
    save(figure, output)


def _workload(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("hosts", "ranks_per_host", "nic", "shape", "seq"))


if __name__ == "__main__":
    main()
