"""The grid of a layer: which one was asked for, and how it is made from the process groups that Megatron hands over.

A grid can be said in the mode itself, which every launcher passes on unread (Megatron-LM's `--cp-comm-type`, the
`cp_comm_type` of a TransformerConfig or a Megatron-Bridge provider), for all layers or for each of them:

    attention2d            the grid with the fewest bytes (`planner.best_grid`), or that of the hierarchical sizes
    attention2d:4x4        R x C
    attention2d:2x4x4      U x R x C: heads are spread over U ranks first
    attention2d:8x8/4x2    blocks of 4 rows x 2 columns lie on a node each

Megatron's `--hierarchical-context-parallel-sizes` says the same with process groups that Megatron makes: [R, C] or
[U, R, C], and [r, c, R/r, C/c] or [U, r, c, R/r, C/c] with blocks of r x c. Where both are given they must agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_attn2d import Grid
from megatron_attn2d.planner import best_grid

ATTENTION2D = "attention2d"
_SHAPE = re.compile(r"(?:(\d+)x)?(\d+)x(\d+)(?:/(\d+)x(\d+))?")


class GridShape(NamedTuple):
    """U x R x C ranks, and the block of the grid that the ranks of a node fill, if any."""

    heads: int
    rows: int
    cols: int
    block: tuple[int, int] | None = None

    def __str__(self) -> str:
        heads = f"{self.heads}x" if self.heads > 1 else ""
        block = "" if self.block is None else f"/{self.block[0]}x{self.block[1]}"
        return f"{heads}{self.rows}x{self.cols}{block}"

    @property
    def size(self) -> int:
        """The number of context-parallel ranks."""
        return self.heads * self.rows * self.cols

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> GridShape:
        """The shape that hierarchical sizes say.

        Raises:
            ValueError: there are not two to five of them.
        """
        if len(sizes) not in (2, 3, 4, 5):
            raise ValueError(
                f"hierarchical_context_parallel_sizes {list(sizes)} are no grid: choose R C or U R C "
                f"(context_parallel.grid), or say the grid in the mode, {ATTENTION2D}:RxC"
            )
        if len(sizes) <= 3:
            heads, rows, cols = (1, *sizes) if len(sizes) == 2 else sizes
            return cls(heads, rows, cols)
        heads, down, across, blocks_down, blocks_across = (1, *sizes) if len(sizes) == 4 else sizes
        return cls(heads, down * blocks_down, across * blocks_across, (down, across))


def split_mode(mode: str | None) -> tuple[str | None, GridShape | None]:
    """The mode's name, and the grid that it says: `attention2d:4x4` is ("attention2d", 4 x 4).

    Raises:
        ValueError: what follows the colon is no grid, or the mode has none.
    """
    name, colon, text = (mode or "").partition(":")
    if not colon:
        return mode, None
    found = _SHAPE.fullmatch(text)
    if name != ATTENTION2D or found is None or "0" in found.groups():
        raise ValueError(
            f"cp_comm_type {mode!r} is no mode: choose {ATTENTION2D}, {ATTENTION2D}:RxC (say {ATTENTION2D}:4x4), "
            f"{ATTENTION2D}:UxRxC, or either with blocks per node, {ATTENTION2D}:8x8/4x2"
        )
    heads, rows, cols, down, across = (int(group or 0) for group in found.groups())
    return name, GridShape(heads or 1, rows, cols, (down, across) if down else None)


def layer_grid(
    groups: ProcessGroupCollection, asked: GridShape | None, sizes: Sequence[int] | None, queries_per_kv_head: int
) -> Grid:
    """The grid of a layer with attention2d; rank 0 says once which it is and where it comes from.

    Layers of one shape share a grid and its communicators. Every rank of the context-parallel group must call.

    Args:
        groups: of the model; `cp` is laid on the grid unless `hcp` has its rows and columns.
        asked: the grid that the mode says.
        sizes: the model's hierarchical_context_parallel_sizes.
        queries_per_kv_head: chooses the grid where nobody says one.

    Raises:
        ValueError: a grid does not cover the context-parallel ranks, or two that were given differ.
    """
    levels = getattr(groups, "hcp", None) or []
    said = tuple(level.size() for level in levels) or tuple(sizes or ())
    hierarchical = GridShape.of_sizes(said) if said else None
    if asked is not None and hierarchical is not None and asked != hierarchical:
        raise ValueError(
            f"cp_comm_type {ATTENTION2D}:{asked} and hierarchical_context_parallel_sizes {list(said)} "
            f"(a grid of {hierarchical}) differ: leave one of them out"
        )
    shape = asked or hierarchical
    if shape is None:
        shape = GridShape(1, *best_grid(groups.cp.size(), queries_per_kv_head))
        announce(f"{ATTENTION2D} on a grid of {shape}, the one with the fewest bytes; {ATTENTION2D}:RxC says another")
        return _laid_out(groups.cp, shape)
    if shape.size != groups.cp.size():
        raise ValueError(
            f"a grid of {shape} covers {shape.size} ranks and the context-parallel group has {groups.cp.size()}: "
            "choose U x R x C = context_parallel_size"
        )
    origin = "cp_comm_type" if asked is not None else "hierarchical_context_parallel_sizes"
    announce(f"{ATTENTION2D} on a grid of {shape}, from {origin}")
    if shape.block is None and levels:
        # Sizes [R, C] make a contiguous group of R, a column of the grid, and a strided group of C, a row.
        kv_group, q_group = levels[-2:]
        head_group = levels[0] if len(levels) == 3 else None
        return Grid.from_groups(kv_group=kv_group, q_group=q_group, head_group=head_group)
    return _laid_out(groups.cp, shape)


@lru_cache(maxsize=8)
def _laid_out(group: dist.ProcessGroup, shape: GridShape) -> Grid:
    return Grid.from_group(group, rows=shape.rows, cols=shape.cols, heads=shape.heads, tile=shape.block)


def announce_ring() -> None:
    """Says once that layers run a ring, which is Megatron's default mode and may not be what was meant."""
    announce(f"ring (p2p): --cp-comm-type {ATTENTION2D} was not given")


@cache
def announce(text: str) -> None:
    """Prints a line, once, on rank 0, among those that Megatron prints while it builds the model."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"context parallelism: {text}", flush=True)
