"""Scores by context as a picture: the needle by depth and length, other tasks by length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_attn2d import pictures
from megatron_attn2d.inference.tasks.catalogue import RULER


def draw(result: dict[str, Any], output: Path) -> None:
    """Draws `result`, of `long_context.summary`, into the PNG `output`; nothing where it has no scores."""
    columns = [_tokens(context) for context in result["contexts"]]
    panels = []
    if needle := result["needle"]:
        panels.append(("Needle", "depth", [f"{depth:.0%}" for depth in needle["depths"]], needle["scores"]))
    if others := {name: of for name, of in result["scores"].items() if name in RULER}:
        panels.append(("RULER", "", list(others), [list(of.values()) for of in others.values()]))
    if not panels:
        return
    width = max(3.4, 1.6 + 0.75 * len(columns))
    height = 1.6 + 0.36 * max(len(rows) for _, _, rows, _ in panels)
    figure = pictures.blank(width * len(panels) + 0.8, height)
    image = None
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, label, rows, scores) in zip(places, panels, strict=True):
        image = axes.imshow(scores, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(label)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for y, row in enumerate(scores):
            for x, score in enumerate(row):  # the number too: not everyone tells red from green
                axes.text(x, y, f"{100 * score:.0f}", ha="center", va="center", fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=figure.axes, format=lambda score, _: f"{score:.0%}", shrink=0.9)
    figure.suptitle(f"{Path(result['run']).name}, step {result['step']:,}", x=0.01, ha="left", fontsize=9)
    pictures.save(figure, output)


def _tokens(number: int) -> str:
    """1,000; 4K; 128K; 1M: powers of two short, others in full."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if number % unit == 0:
            return f"{number // unit}{letter}"
    return f"{number:,}"
