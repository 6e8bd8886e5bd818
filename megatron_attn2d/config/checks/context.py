"""Checks that the context ranks, their grid and each layer's mode fit the model and the sequence."""

import importlib.util
from collections.abc import Iterator
from math import prod

from megatron_attn2d.config.checks.refusal import Refusal, divisors
from megatron_attn2d.config.schema import RunConfig
from megatron_attn2d.planner import factorisations


def check_context(run: RunConfig) -> Iterator[Refusal]:
    """Refuse context ranks that do not share the sequence or the heads, and a grid that does not hold the ranks.

    Args:
        run: with numbers in the place of `auto`.
    """
    yield from _check_sequence(run)
    yield from _check_grid(run)
    yield from _check_heads(run)
    context = run.context_parallel
    if run.logging.attention_communication and context.mode != "attention2d" and _has_transformer_engine(run):
        yield (
            "logging.attention_communication",
            f"context_parallel.mode = {context.mode} is Transformer Engine's, whose messages are not followed",
            "choose false, or context_parallel.mode=attention2d",
        )


def check_layer_modes(run: RunConfig) -> Iterator[Refusal]:
    """Refuse `layer_modes` of another number of layers, or without the mode of the run."""
    context, modes = run.context_parallel, run.context_parallel.layer_modes
    if modes is None:
        return
    if len(modes) != run.model.num_layers:
        yield (
            "context_parallel.layer_modes",
            f"names {len(modes)} layers, but model.num_layers is {run.model.num_layers}",
            "name the mode of each layer, or null for context_parallel.mode in all",
        )
    if "attention2d" in modes and context.mode != "attention2d":
        yield "context_parallel.mode", "context_parallel.layer_modes has attention2d", "choose attention2d"
    elif context.mode not in modes:
        yield (
            "context_parallel.mode",
            "is the mode of no layer in context_parallel.layer_modes",
            f"choose one of {', '.join(sorted(set(modes)))}",
        )


def _check_sequence(run: RunConfig) -> Iterator[Refusal]:
    context, length = run.context_parallel, run.training.seq_length
    chunks = 2 * context.size
    if context.size > 1 and length % chunks:
        yield (
            "training.seq_length",
            f"not a multiple of 2 * context_parallel.size = {chunks}, the chunks of the zigzag",
            f"choose {' or '.join(str(n) for n in (length // chunks * chunks, -(-length // chunks) * chunks) if n)}",
        )


def _check_grid(run: RunConfig) -> Iterator[Refusal]:
    context = run.context_parallel
    if context.grid != "auto":
        grids = ", ".join(f"[{rows}, {columns}]" for rows, columns in factorisations(context.size))
        if context.mode != "attention2d":
            yield "context_parallel.grid", f"context_parallel.mode = {context.mode} has no grid", "choose auto"
        if prod(context.grid) != context.size:
            yield (
                "context_parallel.grid",
                f"{prod(context.grid)} ranks, but context_parallel.size is {context.size}",
                f"choose auto or one of {grids}",
            )
    if context.tile is not None:
        (_, rows, columns), (tile_rows, tile_columns) = run.grid, run.tile
        if context.mode != "attention2d":
            yield "context_parallel.tile", f"context_parallel.mode = {context.mode} has no grid", "choose null"
        elif rows % tile_rows or columns % tile_columns:
            yield (
                "context_parallel.tile",
                f"does not fill the grid of {rows} rows x {columns} columns",
                f"rows: one of {divisors(rows)}; columns: one of {divisors(columns)}",
            )


def _check_heads(run: RunConfig) -> Iterator[Refusal]:
    context, model, tensor = run.context_parallel, run.model, run.parallelism.tensor
    heads = max(model.num_attention_heads // tensor, 1)
    kv_heads = max((model.num_query_groups or model.num_attention_heads) // tensor, 1)
    if kv_heads % run.head_groups:
        yield (
            "context_parallel.head_groups",
            f"does not divide the {kv_heads} key/value heads of a tensor rank",
            f"choose auto or one of {divisors(kv_heads)}",
        )
    head_ranks = {
        "ulysses": ("context_parallel.size", context.size),
        "attention2d": ("context_parallel.grid", run.grid[0]),
    }
    for mode in sorted(head_ranks.keys() & {context.mode, *(context.layer_modes or [])}):
        key, ranks = head_ranks[mode]
        # Transformer Engine does not repeat key/value heads where there are more ranks than heads.
        repeats = mode == "attention2d" or not _has_transformer_engine(run)
        if heads % ranks or (kv_heads % ranks and not (repeats and ranks % kv_heads == 0)):
            yield (
                key,
                f"{heads} query and {kv_heads} key/value heads per tensor rank do not spread over {ranks} ranks",
                f"spread them over one of {divisors(kv_heads)}",
            )


def _has_transformer_engine(run: RunConfig) -> bool:
    """Whether the modes other than attention2d are those of Transformer Engine."""
    return run.environment.device == "cuda" and importlib.util.find_spec("transformer_engine") is not None
