"""Predicts a layer's attention on 16 to 4,096 ranks, and where each mode stops scaling: a table and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_attn2d.config.auto import cluster, predictions, require_cluster, workload
from megatron_attn2d.pictures import blank, ruled, save
from megatron_attn2d.planner.cost import Candidate, Prediction

if TYPE_CHECKING:
    from megatron_attn2d.config.schema import RunConfig

RANKS = tuple(2**n for n in range(4, 13))
MODES: dict[str, Callable[[Candidate], bool]] = {
    "ring": lambda c: c.mode == "ring",
    "all_gather": lambda c: c.mode == "all_gather",
    "R x C": lambda c: c.mode == "attention2d" and c.axes is not None and c.axes[0] == 1,
    "U x R x C": lambda c: c.mode == "attention2d" and c.axes is not None and c.axes[0] > 1,
}
"""The modes that are compared; each of the last two by its fastest grid at each number of ranks."""

WORTH = 1.25
"""A mode ends at the number of ranks of which twice as many are less than this many times as fast."""

_COLOURS = dict(zip(MODES, ("#6B6B6B", "#B08BC9", "#2464B4", "#E39A3B"), strict=True))

type Growth = dict[str, list[Prediction]]
"""For each mode its predictions, one per number of ranks."""


def growth(run: RunConfig, ranks: Sequence[int] = RANKS) -> Growth:
    """The fastest prediction of each mode at each number of context ranks, for the run's sequence and cluster.

    Raises:
        ConfigError: the YAML does not describe the cluster.
    """
    require_cluster(run)
    found: Growth = {}
    for count in ranks:
        of_count = predictions(count, workload(run), cluster(run))
        for mode, wanted in MODES.items():
            best = next((p for p in of_count if wanted(p.candidate)), None)
            if best is not None:
                found.setdefault(mode, []).append(best)
    return {mode: line for mode, line in found.items() if len(line) == len(ranks)}


def bound(prediction: Prediction) -> str:
    """What takes most of the time: host, messages or kernels."""
    if prediction.total_s > prediction.device_s:
        return "host"
    return "messages" if prediction.device_s > 2 * prediction.kernels_s else "kernels"


def end(line: Sequence[Prediction]) -> int | None:
    """The index in `line` after which twice the ranks are not WORTH it; None if they always are."""
    return next((i for i, (p, q) in enumerate(pairwise(line)) if p.total_s < WORTH * q.total_s), None)


def table(found: Growth, run: RunConfig, ranks: Sequence[int] = RANKS) -> str:
    """A table of milliseconds and MiB by mode and ranks, and a line per mode on where it ends."""
    work = workload(run)
    lines = [
        f"A layer's attention on one tensor rank, {work.seq} tokens, {work.heads}/{work.kv_heads} heads of "
        f"{work.head_dim}, {cluster(run).ranks_per_node} context ranks per node: forward + backward, received per rank;"
        " h: the host decides",
        "  ranks" + "".join(f"{mode:>30s}" for mode in found),
    ]
    for i, count in enumerate(ranks):
        cells = []
        for line in found.values():
            p = line[i]
            grid = p.candidate.label.removeprefix("attention2d ").split(",")[0] if p.candidate.axes else ""
            grid = "" if p.candidate.mode == "all_gather" else f"{grid} "
            mib = (p.intra_bytes + p.nic_bytes) / 2**20
            cells.append(f"{grid}{p.total_s * 1e3:.2f} ms{'h' if bound(p) == 'host' else ' '}{mib:6.0f} MiB".rjust(30))
        lines.append(f"{count:7d}" + "".join(cells))
    for mode, line in found.items():
        last = end(line)
        if last is None:
            lines.append(f"{mode}: does not end by {ranks[-1]} ranks")
            continue
        p, q = line[last], line[last + 1]
        lines.append(
            f"{mode}: ends at {ranks[last]} ranks, {p.total_s * 1e3:.2f} ms; with twice as many it is "
            f"{p.total_s / q.total_s:.2f}x as fast, and most of its time is {bound(q)}"
        )
    return "\n".join(lines)


def draw(found: Growth, run: RunConfig, path: Path, ranks: Sequence[int] = RANKS) -> None:
    """Draw time, and bytes that a rank receives, against the number of ranks, into the PNG `path`."""

    figure = blank(11, 4.6, dpi=150)
    times, volumes = figure.subplots(1, 2)
    kernels = [min(p.kernels_s for p in at) * 1e3 for at in zip(*found.values(), strict=True)]
    times.plot(ranks, kernels, color="#BBBBBB", linewidth=3, label="kernels alone", zorder=1)
    for mode, line in found.items():
        colour = _COLOURS[mode]
        times.plot(ranks, [p.device_s * 1e3 for p in line], color=colour, linestyle=":", linewidth=1.2)
        times.plot(ranks, [p.total_s * 1e3 for p in line], color=colour, marker="o", markersize=4, label=mode)
        if (last := end(line)) is not None:
            times.plot(ranks[last], line[last].total_s * 1e3, marker="o", markersize=11, fillstyle="none", color=colour)
        received = [(p.intra_bytes + p.nic_bytes) / 2**20 for p in line]
        volumes.plot(ranks, received, color=colour, marker="o", markersize=4, label=mode)
        volumes.plot(ranks, [p.nic_bytes / 2**20 for p in line], color=colour, linestyle=":", linewidth=1.2)
    times.set_ylabel("ms of a layer, forward + backward")
    times.set_title(f"Time; dotted: without the host; ringed: twice the ranks gain less than {WORTH}x", fontsize=9)
    volumes.set_ylabel("MiB that a rank receives")
    volumes.set_title("Bytes; dotted: those that cross nodes", fontsize=9)
    for axes in (times, volumes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ranks, [f"{n:,}" for n in ranks], fontsize=8)
        axes.set_xlabel("context ranks")
        ruled(axes)
    times.legend(frameon=False, fontsize=8)
    work = workload(run)
    figure.suptitle(
        f"{run.run.name}: {work.seq:,} tokens, {work.heads}/{work.kv_heads} heads of {work.head_dim}", fontsize=11
    )
    save(figure, path)
