"""Compares runs: loss and throughput in one PNG, and a table with a row per run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from megatron_attn2d.pictures import COLOURS, STYLES, blank, ruled, save
from megatron_attn2d.run.metrics import Steps, read_steps, read_validation

_SETTLED = 5
"""First steps of a run that medians leave out, as compilation and first allocations make them slower."""
_WINDOW = 15
"""Steps of the running median by which the throughput is drawn."""


@dataclass(frozen=True)
class Run:
    """A run: its name, the records of its steps, and its validation losses by step, in nats per token."""

    name: str
    steps: Steps
    validation: dict[int, float] = field(default_factory=dict)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """The numbers of the steps that have `key`, and its values."""
        present = {number: step[key] for number, step in self.steps.items() if key in step}
        return list(present), list(present.values())

    def typical(self, key: str) -> float | None:
        """The median of `key` without the first steps; None where it was never recorded."""
        values = self.series(key)[1]
        return median(values[_SETTLED:] or values) if values else None


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs in `directories`, each named by the shortest end of its path that differs from those of the others.

    Raises:
        UsageError: one of them holds no run.
    """
    paths = [directory.resolve() for directory in directories]
    parts = next(n for n in range(1, 100) if len({path.parts[-n:] for path in paths}) == len(set(paths)))
    return [
        Run("/".join(path.parts[-parts:]), read_steps(path), read_validation(path)) for path in dict.fromkeys(paths)
    ]


def table(runs: Sequence[Run]) -> str:
    """A table with a row per run: its last losses, and medians of its throughput. A dash stands for no record."""
    rows = [
        (
            "run",
            "steps",
            "loss",
            "validation",
            "tokens/s",
            "TFLOP/s per rank",
            "MFU",
            "memory GiB",
            "attention waits",
            "time",
        )
    ]
    for run in runs:
        last = run.steps[max(run.steps)]
        tflops, mfu, waits = (run.typical(key) for key in ("tflops", "mfu", "attention_wait"))
        memory, tokens = run.series("memory_gib")[1], run.typical("tokens_per_s")
        rows.append(
            (
                run.name,
                f"{max(run.steps):,}",
                f"{last['loss']:.4f}",
                f"{run.validation[max(run.validation)]:.4f}" if run.validation else "-",
                "-" if tokens is None else f"{tokens:,.0f}",
                "-" if tflops is None else f"{tflops:.3g}",
                "-" if mfu is None else f"{mfu:.1%}",
                f"{max(memory):.2f}" if memory else "-",
                "-" if waits is None else f"{waits:.1%}",
                str(timedelta(seconds=round(last["elapsed_s"]))) if "elapsed_s" in last else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def draw(runs: Sequence[Run], output: Path) -> None:
    """Draw loss and throughput of the runs into the PNG `output`."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = blank(11, 4.4)
    loss, speed = figure.subplots(1, 2)
    for order, (run, colour, style) in enumerate(zip(runs, cycle(COLOURS), cycle(STYLES), strict=False)):
        line: dict[str, Any] = {"color": colour, "linestyle": style, "linewidth": 2.0, "zorder": 3 + order}
        line |= {"marker": "o"} if len(run.steps) == 1 else {}
        steps, losses = run.series("loss")
        loss.plot(steps, losses, label=f"{run.name}: {losses[-1]:.3f}", **line)
        if run.validation:
            label = f"{run.name}, validation: {run.validation[max(run.validation)]:.3f}"
            loss.plot(
                *zip(*run.validation.items(), strict=True),
                "D",
                color=colour,
                markersize=5,
                label=label,
                zorder=3 + order,
            )
        steps, rates = run.series("tokens_per_s")
        if rates:
            speed.plot(steps, rates, color=colour, linewidth=0.7, alpha=0.25, zorder=2)
            label = f"{run.name}: {run.typical('tokens_per_s'):,.0f}"
            speed.plot(steps, _running_median(rates), label=label, **line)
    loss.set_title("Loss", loc="left", fontweight="bold")
    loss.set_ylabel("nats per token")
    speed.set_title("Throughput", loc="left", fontweight="bold")
    speed.set_ylabel("tokens per second, running median")
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    for axes in (loss, speed):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        ruled(axes)
        axes.margins(x=0.02)
        axes.legend(frameon=False, fontsize="small", loc="best" if axes is loss else "lower right")
    save(figure, output)


def _running_median(values: Sequence[float]) -> list[float]:
    half = _WINDOW // 2
    return [median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
