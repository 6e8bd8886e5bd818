"""How pictures look: colours that everyone tells apart, light lines, one way to be written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # drawing takes half a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe's and Ito's."""
STYLES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))
"""Equal curves cover each other: gaps show the lower."""


def blank(width: float, height: float, dpi: int = 160) -> Figure:
    """A picture of so many inches, made without pyplot: no window system, no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def ruled(axes: Axes) -> Axes:
    """`axes` with light horizontal lines, and without a frame at the top and the right."""
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def save(figure: Figure, output: Path) -> None:
    """Writes the PNG `output`, in a folder that is made where it is missing."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="png")
