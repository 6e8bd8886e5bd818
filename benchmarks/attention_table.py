"""What benchmark_attention.py found, as Markdown and a picture: `python benchmarks/attention_table.py FOUND.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attention_kinds import Kind
from attention_modes import GridMode

type Row = dict[str, Any]

_BASELINES = ("te:p2p", "te:all_gather", "te:a2a", "ring")
_OURS = {
    "R x C": lambda mode: _axes(mode)[0] == 1,
    "U x R x C": lambda mode: _axes(mode)[0] > 1,
}
_COLOURS = {"te:p2p": "#6B6B6B", "ring": "#6B6B6B", "te:all_gather": "#B08BC9", "te:a2a": "#E39A3B"}
_OUR_COLOURS = {"R x C": "#2464B4", "U x R x C": "#7FB2E5"}


_FAKED = [
    "One GPU ran all kernels of rank 0; the other ranks were faked. A message cost its copy within the GPU's memory",
    "and no time on a wire. `MiB received` is what a call brings from other ranks, forward and backward.",
]


def _axes(mode: str) -> tuple[int, int, int]:
    return GridMode.parse(mode).shape.axes if mode.startswith("attention2d") else (0, 0, 0)


def by_kind(rows: list[Row]) -> dict[Kind, list[Row]]:
    """The rows of each kind, in the order in which they were run."""
    found: dict[Kind, list[Row]] = {}
    for row in rows:
        found.setdefault(Kind.read(row["kind"]), []).append(row)
    return found


def fastest(rows: list[Row], wanted: Callable[[str], bool]) -> Row | None:
    """The fastest row of the wanted modes."""
    done = [row for row in rows if "ms" in row and wanted(row["mode"])]
    return min(done, key=lambda row: row["ms"], default=None)


def theirs(rows: list[Row]) -> Row | None:
    """The fastest of the other modes, Transformer Engine's where it runs."""
    return fastest(rows, lambda mode: not mode.startswith("attention2d"))


def markdown(found: dict[str, Any]) -> str:
    """The body of a docs page: a line for each kind, then why modes are missing, then README's column."""
    rows = found["rows"]
    kinds = by_kind(rows)
    baselines = [mode for mode in _BASELINES if any(row["mode"] == mode and "ms" in row for row in rows)]
    heads = ["kind", "sizes", *(mode.replace("te:", "TE ") for mode in baselines), *_OURS]
    faked = found.get("faked", False)
    heads += ["beside their best", "host ms", "host ms, new documents", "MiB", "MiB received" if faked else "apart"]
    versions = ", ".join(
        f"{name} {version}" for name, version in found["host"].items() if version and "gpu" not in name
    )
    lines = [f"{found['title']}. {versions}.", "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for kind, of_kind in kinds.items():
        cells = [kind.label, kind.sizes]
        cells += [_ms(fastest(of_kind, mode.__eq__)) for mode in baselines]
        cells += [_named(fastest(of_kind, wanted)) for wanted in _OURS.values()]
        other, ours = theirs(of_kind), fastest(of_kind, lambda mode: mode.startswith("attention2d"))
        speed = "" if other is None or ours is None else f"{other['ms'] / ours['ms']:.2f}x"
        cells += [speed, _pair(other, ours, _host), _pair(other, ours, lambda row: _number(row.get("host_new_ms")))]
        cells.append(_pair(other, ours, lambda row: f"{row['mib']:.0f}"))
        cells.append(_pair(other, ours, _received) if faked else "" if ours is None else _apart(ours))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Host time and memory: of their fastest mode / of ours.", *(_FAKED if faked else [])]
    lines += ["What did not run:", "", *_refusals(kinds)]
    lines += ["", "| Attention | Beside Transformer Engine's best |", "| --- | --- |"]
    for kind, of_kind in kinds.items():
        other, ours = theirs(of_kind), fastest(of_kind, lambda mode: mode.startswith("attention2d"))
        if other is not None and ours is not None:
            mode = other["mode"].removeprefix("te:")
            said = f"{other['ms'] / ours['ms']:.2f}x {mode} ({_grid(ours)})"
            lines.append(f"| {kind.label}, {kind.sizes} | {said} |")
    return "\n".join(lines) + "\n"


def _refusals(kinds: dict[Kind, list[Row]]) -> list[str]:
    """Which modes did not run, and why, the kinds of one reason together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for kind, rows in kinds.items():
        for row in rows:
            if "failed" in row:
                reasons.setdefault((row["mode"], row["failed"]), []).append(f"{kind.label} ({kind.sizes})")
    return [f"- {mode}, {'; '.join(of_kinds)}: {reason}" for (mode, reason), of_kinds in reasons.items()]


def _ms(row: Row | None) -> str:
    return "" if row is None else _number(row["ms"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _named(row: Row | None) -> str:
    return "" if row is None else f"{_grid(row)}: {_ms(row)}"


def _grid(row: Row) -> str:
    return str(row["mode"]).removeprefix("attention2d ")


def _host(row: Row) -> str:
    return _number(row["host_forward_ms"] + row["host_backward_ms"]) if "host_forward_ms" in row else ""


def _apart(row: Row) -> str:
    return f"{row['apart']:.1e}" if "apart" in row else ""


def _received(row: Row) -> str:
    return f"{row['received_mib']:.0f}" if "received_mib" in row else ""


def _pair(other: Row | None, ours: Row | None, text: Callable[[Row], str]) -> str:
    both = ["" if row is None else text(row) for row in (other, ours)]
    return " / ".join(part or "-" for part in both) if any(both) else ""


def draw(found: dict[str, Any], path: Path) -> None:
    """Speed over the fastest of the other modes, by kind, as a PNG."""
    from matplotlib.figure import Figure

    kinds = by_kind(found["rows"])
    compared = [(kind, rows, base) for kind, rows in kinds.items() if (base := theirs(rows)) is not None]
    series: dict[str, tuple[str, Callable[[str], bool]]] = {
        mode: (_COLOURS[mode], mode.__eq__) for mode in _BASELINES if any(row["mode"] == mode for row in found["rows"])
    }
    series |= {name: (_OUR_COLOURS[name], wanted) for name, wanted in _OURS.items()}
    figure = Figure(figsize=(max(7.0, 0.75 * len(compared) + 2), 5.0), dpi=130, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    highest = 1.0
    for i, (name, (colour, wanted)) in enumerate(series.items()):
        bars = [(at, fastest(rows, wanted), base) for at, (_, rows, base) in enumerate(compared)]
        done = [(at + (i - (len(series) - 1) / 2) * width, base["ms"] / row["ms"]) for at, row, base in bars if row]
        if done:
            axes.bar(*zip(*done, strict=True), width, color=colour, label=name.replace("te:", "TE "))
            highest = max(highest, *(speed for _, speed in done))
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylim(0, 1.25 * highest)
    names = [f"{kind.label}, {kind.sizes}" for kind, _, _ in compared]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_ylabel("speed over the fastest other mode")
    axes.set_title(found["title"], fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    if compared:
        axes.legend(frameon=False, fontsize=8, ncols=len(series), loc="upper center")
    figure.savefig(path, format="png")


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")
