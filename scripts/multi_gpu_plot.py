"""Draws what benchmark_multi_gpu.py found: `python scripts/multi_gpu_plot.py multi_gpu.json multi_gpu.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS = {
    "te:p2p": "#6B6B6B",
    "ring": "#6B6B6B",
    "te:all_gather": "#B08BC9",
    "te:a2a": "#E39A3B",
    "te:a2a+p2p": "#4C9F70",
    "attention2d": "#2464B4",
}
_BASE = ("te:p2p", "ring")


def draw(found: dict[str, Any], path: Path) -> None:
    """One panel a section of attention and number of heads, one for training, one for the plan, as a PNG."""
    panels = [
        (section, heads)
        for section in found["sections"]
        for heads in dict.fromkeys(row["heads"] for row in section["rows"] if "ms" in row)
    ]
    count = len(panels) + 2
    columns = min(3, count)
    figure = Figure(figsize=(5.2 * columns, 3.6 * -(-count // columns)), dpi=130, layout="constrained")
    axes = list(figure.subplots(-(-count // columns), columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    for place, (section, heads) in zip(axes, panels, strict=False):
        _attention(place, section, heads)
    _training(axes[len(panels)], found["training"])
    _predictions(axes[len(panels) + 1], found["sections"])
    for place in axes[:count]:
        place.spines[["top", "right"]].set_visible(False)
    gpu = found["host"]["gpu"]
    figure.suptitle(f"{found['host']['gpus']} x {gpu}" if gpu else "CPU ranks", fontsize=11)
    figure.savefig(path, format="png")


def _kind(mode: str) -> str:
    return "attention2d" if mode.startswith("attention2d") else ":".join(mode.split(":")[:2])


def _attention(axes: Axes, section: dict[str, Any], heads: str) -> None:
    """Speed over the ring by sequence length; of attention2d the fastest grid, which is named."""
    best: dict[str, dict[int, dict[str, Any]]] = {}
    for row in section["rows"]:
        if "ms" in row and row["heads"] == heads:
            of_kind = best.setdefault(_kind(row["mode"]), {})
            if row["seq"] not in of_kind or row["ms"] < of_kind[row["seq"]]["ms"]:
                of_kind[row["seq"]] = row
    base = next((best[mode] for mode in _BASE if mode in best), {})
    lengths = sorted({seq for rows in best.values() for seq in rows})
    for kind, rows in best.items():
        shared = [seq for seq in lengths if seq in rows and seq in base]
        speeds = [base[seq]["ms"] / rows[seq]["ms"] for seq in shared]
        places = [lengths.index(seq) for seq in shared]
        axes.plot(places, speeds, marker="o", markersize=4, color=_COLOURS[kind], label=kind)
        if kind == "attention2d":
            for at, speed, seq in zip(places, speeds, shared, strict=True):
                name = rows[seq]["mode"].removeprefix("attention2d ")
                axes.annotate(name, (at, speed), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7)
    axes.axhline(1.0, color="#CCCCCC", linewidth=0.8, zorder=0)
    axes.set_ylim(0, 1.3 * max(axes.dataLim.y1, 1.0))
    axes.set_xticks(range(len(lengths)), [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths])
    axes.set_ylabel(f"speed over {next((m for m in _BASE if m in best), 'ring')}", fontsize=8)
    axes.set_title(f"Attention, {heads} heads, {section['title']}", fontsize=9)
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="upper center")


def _training(axes: Axes, rows: list[dict[str, Any]]) -> None:
    done = [row for row in rows if "failed" not in row]
    for at, row in enumerate(done):
        axes.bar(at, row["tokens_per_s"], color=_COLOURS["attention2d" if row["mode"] == "attention2d" else "ring"])
        note = f"{row['memory_gib']:.1f} GiB" + (f"\nMFU {row['mfu']:.0%}" if row["mfu"] else "")
        axes.annotate(note, (at, row["tokens_per_s"]), ha="center", va="bottom", fontsize=7)
    names = [f"TP{row['tensor']} CP{row['context']}\n{row['mode']}" for row in done]
    axes.set_xticks(range(len(done)), names, fontsize=7)
    axes.set_ylim(0, 1.25 * max([row["tokens_per_s"] for row in done], default=1.0))
    axes.set_ylabel("tokens/s", fontsize=8)
    axes.set_title("Whole training" + ("" if done else ": not run"), fontsize=9)


def _predictions(axes: Axes, sections: list[dict[str, Any]]) -> None:
    limits = []
    for section, marker in zip(sections, "osD^v<>P*", strict=False):
        pairs = [(r["predicted_ms"], r["ms"]) for r in section["rows"] if "ms" in r and r.get("predicted_ms")]
        if pairs:
            axes.scatter(*zip(*pairs, strict=True), s=12, marker=marker, alpha=0.6, label=section["name"])
            limits += [value for pair in pairs for value in pair]
    if limits:
        ends = [min(limits), max(limits)]
        axes.plot(ends, ends, color="#888888", linewidth=0.8)
        axes.fill_between(ends, [0.75 * e for e in ends], [1.25 * e for e in ends], color="#EEEEEE", zorder=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=7)
    axes.set_xlabel("predicted, ms (band: 25%)", fontsize=8)
    axes.set_ylabel("measured, ms", fontsize=8)
    axes.set_title("The planner", fontsize=9)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
