"""Draws the loss curves of runs into a PNG, and makes a table of them."""

from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from megatron_attn2d.pictures import COLOURS, STYLES, blank, ruled, save
from megatron_attn2d.run.metrics import read_steps


@dataclass(frozen=True)
class Curve:
    """The losses of one run, in nats per token, by step."""

    name: str
    losses: dict[int, float]


def read_curve(run_dir: Path) -> Curve:
    """The curve in RUN_DIR/metrics.jsonl; of a step that was recorded twice the last record counts.

    Raises:
        UsageError: there is no such file, or it can't be read.
    """
    steps = read_steps(run_dir)
    return Curve(run_dir.resolve().name, {number: step["loss"] for number, step in steps.items()})


def table(curves: list[Curve], first: int = 10) -> str:
    """A table of the losses of the first `first` steps and of the last, one column per run.

    For two runs a third column has their difference.
    """
    steps = sorted(set.union(*(set(curve.losses) for curve in curves)))
    shown = steps[:first] + steps[first:][-1:]
    names = [curve.name for curve in curves] + (["difference"] if len(curves) == 2 else [])
    width = max(10, *map(len, names))
    lines = ["  step  " + "  ".join(name.rjust(width) for name in names)]
    for step in shown:
        losses = [curve.losses.get(step) for curve in curves]
        cells = ["-" if loss is None else f"{loss:.6f}" for loss in losses]
        if len(curves) == 2:
            both = losses[0] is not None and losses[1] is not None
            cells.append(f"{losses[0] - losses[1]:+.1e}" if both else "-")  # type: ignore[operator]
        lines.append(f"{step:6d}  " + "  ".join(cell.rjust(width) for cell in cells))
    return "\n".join(lines)


def draw(curves: list[Curve], output: Path, title: str = "Training loss") -> None:
    """Draw the curves into the PNG `output`."""

    figure = blank(8, 4.5)
    axes = figure.subplots()
    for order, (curve, colour, style) in enumerate(zip(curves, cycle(COLOURS), cycle(STYLES), strict=False)):
        steps = sorted(curve.losses)
        axes.plot(
            steps,
            [curve.losses[step] for step in steps],
            label=f"{curve.name}  ({curve.losses[steps[-1]]:.3f} at step {steps[-1]})",
            color=colour,
            linestyle=style,
            linewidth=2.2,
            marker="o" if len(steps) == 1 else None,
            zorder=3 + order,
        )
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    ruled(axes)
    axes.margins(x=0.02)
    axes.legend(frameon=False)
    save(figure, output)
