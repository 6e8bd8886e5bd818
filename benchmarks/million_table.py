"""What benchmark_million.py found, as tables for docs: `python benchmarks/million_table.py MILLION.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

type Row = dict[str, Any]


def markdown(found: dict[str, Any]) -> str:
    """A table of seconds and one of memory per layer, and one of whole steps beside the plan."""
    lines = [f"{found['where']}.", ""]
    layers = [row for row in found["layers"] if "failed" not in row]
    if layers:
        lines += _layers(layers, "one layer, s", lambda row: f"{_seconds(row):.2f}")
        lines += _layers(layers, "peak, GiB", lambda row: f"{row['peak_gib']:.1f}")
    if found["steps"]:
        lines += _steps(found["steps"])
    lines += [
        f"- {section}, {row['seq']:,} tokens, {row.get('mode', '')}: {row['failed']}"
        for section in ("layers", "steps")
        for row in found[section]
        if "failed" in row
    ]
    return "\n".join(lines).rstrip() + "\n"


def _layers(rows: list[Row], title: str, cell: Callable[[Row], str]) -> Iterator[str]:
    """A line per length, a column per mode."""
    names = list(dict.fromkeys(map(_name, rows)))
    yield from _heading([title, *names])
    for seq in dict.fromkeys(row["seq"] for row in rows):
        of_name = {_name(row): cell(row) for row in rows if row["seq"] == seq}
        yield _line([f"{seq:,}", *(of_name.get(name, "") for name in names)])
    yield ""


def _name(row: Row) -> str:
    return "loss in chunks" if row["mode"] == "loss" else row["mode"] + ", output kept" * row["kept"]


def _seconds(row: Row) -> float:
    return float(row.get("total_s") or row["forward_s"] + row["backward_s"])


def _steps(rows: list[Row]) -> Iterator[str]:
    """A line per length."""
    faked = any("parts" in row for row in rows)
    parts = ["forward, s", "backward, s", "between steps, GiB", "host process, GiB"] if faked else []
    yield from _heading(
        ["whole steps, tokens", "step, s", "tokens/s", "MFU", "peak, GiB", "planned", "host, GiB", "planned", *parts]
    )
    for row in (row for row in rows if "failed" not in row):
        host = [] if row["host_gib"] is None else [row["host_gib"], row["planned_host_gib"]]
        cells = [f"{row['seq']:,}", f"{row['step_s']:.1f}", f"{row['tokens_per_s']:,.0f}"]
        cells += ["" if row["mfu"] is None else f"{row['mfu']:.1%}"]
        cells += [f"{size:.1f}" for size in (row["peak_gib"], row["planned_gib"], *host)] + [""] * (2 - len(host))
        names = ("forward_s", "backward_s", "lasting_gib", "host_process_gib")
        cells += [f"{row['parts'][name]:.1f}" for name in names] if "parts" in row else [""] * len(parts)
        yield _line(cells)
    yield ""


def _heading(cells: list[str]) -> list[str]:
    return [_line(cells), "|" + " --- |" * len(cells)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")
