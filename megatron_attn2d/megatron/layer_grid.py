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
from functools import lru_cache
from typing import NamedTuple

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

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


def queries_per_kv_head(config: TransformerConfig) -> int:
    """Query heads that share a key/value head in attention; latent attention expands its keys to one for each."""
    if config.multi_latent_attention:
        return 1
    tensor = config.tensor_model_parallel_size
    return (config.num_attention_heads // tensor) // max(1, config.num_query_groups // tensor)


def hierarchical_sizes(groups: ProcessGroupCollection | None, config: TransformerConfig) -> tuple[int, ...]:
    """The sizes of the hierarchical context-parallel groups, those of the configuration where there are no groups."""
    levels = getattr(groups, "hcp", None) or []
    return tuple(level.size() for level in levels) or tuple(config.hierarchical_context_parallel_sizes or ())


def choose_shape(
    asked: GridShape | None, sizes: Sequence[int], ranks: int, queries_per_kv_head: int
) -> tuple[GridShape, str]:
    """The shape of a layer's grid, and where it comes from in words.

    Args:
        asked: the grid that the mode says.
        sizes: of the hierarchical groups; empty where there are none.
        ranks: of the context-parallel group.
        queries_per_kv_head: chooses the grid where nobody says one.

    Raises:
        ValueError: a grid does not cover the context-parallel ranks, or two that were given differ.
    """
    hierarchical = GridShape.of_sizes(sizes) if sizes else None
    if asked is not None and hierarchical is not None and asked != hierarchical:
        raise ValueError(
            f"cp_comm_type {ATTENTION2D}:{asked} and hierarchical_context_parallel_sizes {list(sizes)} "
            f"(a grid of {hierarchical}) differ: leave one of them out"
        )
    shape = asked or hierarchical
    if shape is None:
        best = GridShape(1, *best_grid(ranks, queries_per_kv_head))
        return best, f"the one with the fewest bytes; {ATTENTION2D}:RxC says another"
    if shape.size != ranks:
        raise ValueError(
            f"a grid of {shape} covers {shape.size} ranks and the context-parallel group has {ranks}: "
            "choose U x R x C = context_parallel_size"
        )
    return shape, "cp_comm_type" if asked is not None else "hierarchical_context_parallel_sizes"


def layer_grid(groups: ProcessGroupCollection, asked: GridShape | None, config: TransformerConfig) -> Grid:
    """The grid of a layer with attention2d; `asked` is what its mode says.

    Layers of one shape share a grid and its communicators. Every rank of the context-parallel group must call.

    Raises:
        ValueError: a grid does not cover the context-parallel ranks, or two that were given differ.
    """
    sizes = hierarchical_sizes(groups, config)
    shape, _ = choose_shape(asked, sizes, groups.cp.size(), queries_per_kv_head(config))
    levels = getattr(groups, "hcp", None)
    if shape.block is None and levels:
        # Sizes [R, C] make a contiguous group of R, a column of the grid, and a strided group of C, a row.
        kv_group, q_group = levels[-2:]
        head_group = levels[0] if len(levels) == 3 else None
        return Grid.from_groups(kv_group=kv_group, q_group=q_group, ulysses_group=head_group)
    return _laid_out(groups.cp, shape)


@lru_cache(maxsize=8)
def _laid_out(group: dist.ProcessGroup, shape: GridShape) -> Grid:
    return Grid.from_group(group, rows=shape.rows, cols=shape.cols, ulysses_size=shape.heads, node_block=shape.block)
