"""Draws what benchmark_multi_gpu.py found: `python benchmarks/multi_gpu_plot.py multi_gpu.json multi_gpu.png`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from attention_kinds import tokens
from attention_modes import GridMode
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS = {
    "te:p2p": "#6B6B6B",
    "ring": "#6B6B6B",
    "te:all_gather": "#B08BC9",
    "te:a2a": "#E39A3B",
    "te:a2a+p2p": "#4C9F70",
    "attention2d": "#2464B4",
    "attention2d over heads": "#7FB2E5",
}
_BASE = ("te:p2p", "ring")
type _Case = tuple[str, int]
"""Heads and tokens."""


def draw(found: dict[str, Any], path: Path) -> None:
    """Speeds of attention on emulated nodes, by section; training; the plan. As a PNG."""
    panels: list[Callable[[Axes], None]] = [partial(_bars, section=section) for section in found["sections"]]
    panels += [partial(_training, rows=found["training"]), partial(_predictions, sections=found["sections"])]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * lines), dpi=130, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, place in zip(panels, axes, strict=False):
        panel(place)
        place.spines[["top", "right"]].set_visible(False)
    for spare in axes[len(panels) :]:
        spare.set_visible(False)
    gpu = found["host"]["gpu"]
    figure.suptitle(f"{found['host']['gpus']} x {gpu}" if gpu else "CPU ranks", fontsize=11)
    figure.savefig(path, format="png")


def _kind(mode: str) -> str:
    if mode.startswith("attention2d"):
        return "attention2d over heads" if GridMode.parse(mode).shape.axes[0] > 1 else "attention2d"
    return ":".join(mode.split(":")[:2])


def _fastest(rows: list[dict[str, Any]]) -> dict[str, dict[_Case, dict[str, Any]]]:
    """By kind of mode and case its fastest row."""
    best: dict[str, dict[_Case, dict[str, Any]]] = {}
    for row in rows:
        if "ms" in row:
            of_kind = best.setdefault(_kind(row["mode"]), {})
            case = row["heads"], row["seq"]
            if case not in of_kind or row["ms"] < of_kind[case]["ms"]:
                of_kind[case] = row
    return best


def _speeds(best: dict[str, dict[_Case, dict[str, Any]]]) -> dict[str, dict[_Case, tuple[float, str]]]:
    """By kind and case the speed over the ring, and which grid of attention2d that was."""
    base = next((best[mode] for mode in _BASE if mode in best), {})
    return {
        kind: {
            case: (base[case]["ms"] / row["ms"], row["mode"].removeprefix("attention2d "))
            for case, row in rows.items()
            if case in base
        }
        for kind, rows in best.items()
    }


def _bars(axes: Axes, section: dict[str, Any]) -> None:
    speeds = _speeds(_fastest(section["rows"]))
    cases = list(dict.fromkeys(case for of_kind in speeds.values() for case in of_kind))
    width = 0.8 / max(1, len(speeds))
    for i, (kind, of_kind) in enumerate(speeds.items()):
        shift = (i - (len(speeds) - 1) / 2) * width
        places = [at for at, case in enumerate(cases) if case in of_kind]
        heights = [of_kind[cases[at]][0] for at in places]
        axes.bar([at + shift for at in places], heights, width, color=_COLOURS[kind], label=kind)
        for at in places if kind.startswith("attention2d") else []:
            _name_grid(axes, at + shift, *of_kind[cases[at]])
    names = [f"{heads}\n{tokens(seq)}" for heads, seq in cases]
    _finish(axes, speeds, names, f"Attention, {section['title']}")


def _name_grid(axes: Axes, at: float, speed: float, name: str) -> None:
    axes.annotate(
        name,
        (at, speed),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=6,
        rotation=90,
    )


def _finish(axes: Axes, speeds: dict[str, Any], ticks: list[str], title: str) -> None:
    axes.axhline(1.0, color="#CCCCCC", linewidth=0.8, zorder=0)
    axes.set_ylim(0, 1.35 * max([1.0, *(speed for of_kind in speeds.values() for speed, _ in of_kind.values())]))
    axes.set_xticks(range(len(ticks)), ticks, fontsize=8)
    axes.set_ylabel(f"speed over {next((mode for mode in _BASE if mode in speeds), 'ring')}", fontsize=8)
    axes.set_title(title + ("" if ticks else ": nothing measured"), fontsize=9)
    if speeds:
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
