"""Draws the process grids of a run as text, by Megatron's order of global ranks."""

from collections.abc import Iterator

from megatron_attn2d.attention.layout import place_ranks
from megatron_attn2d.config.schema import RunConfig

_SHOWN = 4


def context_group(run: RunConfig, stage: int, replica: int) -> list[int]:
    """The global rank of the first tensor rank of each context rank, in one pipeline stage of one replica."""
    tensor, context, pipeline = run.parallelism.tensor, run.context_parallel.size, run.parallelism.pipeline
    if run.megatron_args.get("use_tp_pp_dp_mapping"):
        outer = stage + pipeline * replica
    else:
        outer = replica + run.data_parallel_size * stage
    return [tensor * (rank + context * outer) for rank in range(context)]


def picture(run: RunConfig) -> str:
    """The process grids of `run`, as text; a cell holds the global ranks of one place of the grid."""
    parallel, context = run.parallelism, run.context_parallel
    replicas, stages = run.data_parallel_size, parallel.pipeline
    sizes = f"pipeline {stages} x data {replicas} x context {context.size} x tensor {parallel.tensor}"
    groups = [(stage, replica) for replica in range(replicas) for stage in range(stages)]
    lines = [f"{run.world_size} ranks = {sizes}", *_legend(run)]
    for stage, replica in groups[:_SHOWN]:
        lines += ["", f"pipeline stage {stage}, replica {replica}:"]
        lines += _grid(run, [_cell(rank, parallel.tensor) for rank in context_group(run, stage, replica)])
    if len(groups) > _SHOWN:
        lines += ["", f"... and {len(groups) - _SHOWN} more"]
    return "\n".join(lines)


def _legend(run: RunConfig) -> Iterator[str]:
    context = run.context_parallel
    if context.size == 1:
        yield "one context rank: attention stays on the rank"
    elif context.mode == "attention2d":
        heads, rows, columns = run.grid
        yield f"attention2d on {rows} rows x {columns} columns: a row gathers its queries, a column its keys and values"
        if heads > 1:
            yield f"a+b: {heads} context ranks that exchange sequence for heads"
    else:
        yield f"{context.mode}: each line is one context-parallel group"
    if run.parallelism.tensor > 1:
        yield "a-b: tensor-parallel ranks, which hold different heads of the same tokens"


def _cell(rank: int, tensor: int) -> str:
    return str(rank) if tensor == 1 else f"{rank}-{rank + tensor - 1}"


def _grid(run: RunConfig, cells: list[str]) -> Iterator[str]:
    if run.context_parallel.mode != "attention2d":
        yield "    " + "  ".join(cells)
        return
    heads, rows, columns = run.grid
    ranks = place_ranks(rows, columns, *run.tile)
    cells = ["+".join(cells[place : place + heads]) for place in range(0, len(cells), heads)]
    width = max(len(f"column {columns - 1}"), *map(len, cells))
    yield " " * 12 + "  ".join(f"column {column}".rjust(width) for column in range(columns))
    for row in range(rows):
        yield f"    row {row}".ljust(12) + "  ".join(
            cells[ranks[row][column]].rjust(width) for column in range(columns)
        )
