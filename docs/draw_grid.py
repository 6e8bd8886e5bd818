#!/usr/bin/env python3
"""Draws docs/grid.png: six ranks on a grid of 2 x 3, what each gathers, and what one row and one column exchange.

python docs/draw_grid.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, Rectangle

ROWS, COLUMNS = 2, 3
QUERIES, KEYS, OUTPUTS = "#3b6fb6", "#c8553d", "#4b8b5a"
PALE = {QUERIES: "#dbe6f4", KEYS: "#f6dfd9"}


def main() -> None:
    """Draw the scores on the left and the order of one call on the right."""
    figure, (scores, order) = pyplot.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1.05, 1])
    draw_scores(scores)
    draw_order(order)
    figure.tight_layout()
    path = Path(__file__).with_name("grid.png")
    figure.savefig(path, dpi=150)
    print(path)


def draw_scores(axes: pyplot.Axes) -> None:
    """The score matrix as the grid cuts it: rank (r, c) attends the queries of row r to the keys of column c."""
    for row in range(ROWS):
        for column in range(COLUMNS):
            chosen = (row, column) == (0, 1)
            face = "#fff3c4" if chosen else PALE[QUERIES] if row == 0 else PALE[KEYS] if column == 1 else "white"
            axes.add_patch(Rectangle((column, ROWS - 1 - row), 1, 1, facecolor=face, edgecolor="#444444"))
            axes.text(
                column + 0.5, ROWS - 0.5 - row, f"rank {column * ROWS + row}", ha="center", va="center", fontsize=11
            )
    arrow(axes, (0.1, ROWS - 0.2), (COLUMNS - 0.1, ROWS - 0.2), QUERIES)
    arrow(axes, (1.2, 0.1), (1.2, ROWS - 0.1), KEYS)
    arrow(axes, (0.1, ROWS - 0.82), (COLUMNS - 0.1, ROWS - 0.82), OUTPUTS)
    axes.text(COLUMNS + 0.08, ROWS - 0.2, "Q of the row:\ngathered by its C ranks", color=QUERIES, va="center")
    axes.text(COLUMNS + 0.08, ROWS - 0.82, "partial O, LSE:\nreturned in the row, merged", color=OUTPUTS, va="center")
    axes.text(1.5, -0.12, "K, V of the column:\ngathered by its R ranks", color=KEYS, ha="center", va="top")
    axes.set_xlim(-0.1, COLUMNS + 2.0)
    axes.set_ylim(-0.65, ROWS + 0.35)
    axes.set_title(f"P = {ROWS * COLUMNS} ranks as R x C = {ROWS} x {COLUMNS}", loc="left")
    axes.set_axis_off()


def arrow(axes: pyplot.Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """Chunks that travel both ways."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="<->", mutation_scale=14, color=color, linewidth=2))


def draw_order(axes: pyplot.Axes) -> None:
    """When messages travel and when kernels run, forward and backward, in no scale."""
    passes = {
        "forward": [
            ("messages", [(0.0, 1.6, "gather Q; K, V", KEYS), (3.3, 1.1, "return O, LSE", OUTPUTS)]),
            (
                "kernels",
                [(0.0, 1.6, "own chunks", "#888888"), (1.6, 1.7, "tile", "#555555"), (4.4, 0.5, "merge", OUTPUTS)],
            ),
        ],
        "backward": [
            ("messages", [(0.0, 1.6, "Q, dO, LSE, delta; K, V", KEYS), (3.3, 1.1, "dQ; dK, dV", OUTPUTS)]),
            (
                "kernels",
                [
                    (0.0, 1.6, "own, half the heads", "#888888"),
                    (1.6, 1.7, "tile", "#555555"),
                    (3.3, 1.1, "own, other half", "#888888"),
                    (4.4, 0.5, "sum", OUTPUTS),
                ],
            ),
        ],
    }
    y = 3.6
    for name, lanes in passes.items():
        axes.text(-0.05, y + 0.75, name, fontsize=11, fontweight="bold")
        for lane, pieces in lanes:
            axes.text(-0.1, y + 0.25, lane, ha="right", va="center", fontsize=9)
            for start, length, what, color in pieces:
                axes.add_patch(Rectangle((start, y), length - 0.03, 0.5, facecolor=color, alpha=0.85))
                axes.text(
                    start + length / 2, y + 0.25, what, ha="center", va="center", fontsize=7, color="white", wrap=True
                )
            y -= 0.65
        y -= 0.95
    axes.annotate("", (4.9, y + 0.75), (0, y + 0.75), arrowprops={"arrowstyle": "->", "color": "#444444"})
    axes.text(4.9, y + 0.55, "time", ha="right", va="top", fontsize=9)
    axes.set_xlim(-0.9, 5)
    axes.set_ylim(y + 0.2, 4.8)
    axes.set_axis_off()


if __name__ == "__main__":
    main()
