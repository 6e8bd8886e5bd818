"""Numbers in the place of `auto`: the planner sees the run, and chooses a grid once, when the run is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

from megatron_attn2d.config.schema import RunConfig
from megatron_attn2d.errors import ConfigError
from megatron_attn2d.planner import best_grid
from megatron_attn2d.planner.cost import Candidate, Cluster, Prediction, plan, predict
from megatron_attn2d.planner.traffic import Workload

_RATES = (
    "attention_forward_tflops",
    "attention_backward_tflops",
    "intra_node_gb_per_s",
    "intra_node_latency_us",
    "nic_gb_per_s",
    "nic_latency_us",
)

LATENT_DIMS = {"qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}
"""Head dims of multi-latent attention where Megatron's arguments leave them out."""

_MESSAGE_S = 2e-6
"""Seconds that NCCL's proxy spends on a message: an order of magnitude, used for every cluster."""


def workload(run: RunConfig) -> Workload:
    """One layer's attention on one tensor-parallel rank."""
    model, tensor = run.model, run.parallelism.tensor
    kv_heads, head_dim = model.num_query_groups, model.kv_channels or model.hidden_size // model.num_attention_heads
    if run.megatron_args.get("multi_latent_attention"):
        # Each query head has keys of its own. Keys and values differ in head dim; the planner takes the mean.
        given = {name: run.megatron_args.get(name) for name in LATENT_DIMS}
        dims = [value if isinstance(value, int) else LATENT_DIMS[name] for name, value in given.items()]
        kv_heads, head_dim = None, sum(dims) // 2
    return Workload(
        seq=run.training.seq_length,
        heads=max(1, model.num_attention_heads // tensor),
        kv_heads=max(1, (kv_heads or model.num_attention_heads) // tensor),
        head_dim=head_dim,
        batch=run.training.micro_batch_size,
        element_bytes=4 if run.training.precision == "fp32" else 2,
    )


def missing_rates(run: RunConfig) -> list[str]:
    """The keys, "section.name", that a prediction needs and the YAML leaves out."""
    missing = [f"cluster.{name}" for name in _RATES if getattr(run.cluster, name) is None]
    return missing + (["environment.gpus_per_node"] if run.environment.gpus_per_node is None else [])


def require_cluster(run: RunConfig) -> None:
    """Check that the YAML describes the cluster.

    Raises:
        ConfigError: a key is missing; names the first.
    """
    if missing := missing_rates(run):
        raise ConfigError(missing[0], None, "the planner needs it", "extend one of configs/clusters")


def cluster(run: RunConfig) -> Cluster:
    """The rates of a context-parallel rank, by the YAML's cluster section; `missing_rates` must be empty.

    Under CUDA graphs starting a kernel costs nothing, as one launch starts all of a graph.
    """
    rates = {name: getattr(run.cluster, name) for name in _RATES}
    nic = rates["nic_gb_per_s"] * 1e9
    return Cluster(
        ranks_per_node=max(1, (run.environment.gpus_per_node or 1) // run.parallelism.tensor),
        intra_bytes_per_s=rates["intra_node_gb_per_s"] * 1e9,
        nic_bytes_per_s=nic,
        rank_nic_bytes_per_s=nic,
        intra_latency_s=rates["intra_node_latency_us"] * 1e-6,
        nic_latency_s=rates["nic_latency_us"] * 1e-6,
        message_s=_MESSAGE_S,
        forward_flops=rates["attention_forward_tflops"] * 1e12,
        backward_flops=rates["attention_backward_tflops"] * 1e12,
        stock_speed=run.cluster.stock_attention_speed or 1.0,
        launch_s=(run.cluster.launch_us or 0.0) * 1e-6 if run.graph_implementation == "none" else 0.0,
    )


@lru_cache(maxsize=64)
def predictions(ranks: int, work: Workload, machines: Cluster) -> tuple[Prediction, ...]:
    """`cost.plan`, computed once for equal arguments."""
    return tuple(plan(ranks, work, machines))


def with_grid(run: RunConfig) -> RunConfig:
    """`run` with numbers for grid, tile and head groups of attention2d: the written ones, or the planner's for `auto`.

    Where the YAML does not describe the cluster, the choice is the R x C with the fewest bytes (`best_grid`), in one
    head group. A run without a grid stays as it is. `check` says whether written numbers fit the ranks.
    """
    context = run.context_parallel
    if context.mode != "attention2d" or context.size == 1:
        return run
    axes, tile = _chosen_axes(run)
    groups = context.head_groups
    if groups == "auto":
        fits = prod(axes) == context.size and not (axes[1] % tile[0] or axes[2] % tile[1])
        candidate = Candidate("attention2d", axes, tile)
        known = fits and not missing_rates(run)
        groups = _head_groups(candidate, context.size, workload(run), cluster(run)) if known else 1
    chosen = None if tile == (axes[1], 1) else list(tile)  # a tile of one whole column is the default
    numbers = {"grid": list(axes if axes[0] > 1 else axes[1:]), "tile": context.tile or chosen, "head_groups": groups}
    return run.model_copy(update={"context_parallel": context.model_copy(update=numbers)})


def _chosen_axes(run: RunConfig) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """The grid's axes U, R and C, and the rows and columns of the tile."""
    context = run.context_parallel
    tile = (context.tile[0], context.tile[1]) if context.tile else None
    if context.grid != "auto":
        heads, rows, columns = run.grid
    elif missing_rates(run):
        work = workload(run)
        heads, (rows, columns) = 1, best_grid(context.size, work.heads // work.kv_heads, tile or (1, 1))
    else:
        found: Sequence[Prediction] = predictions(context.size, workload(run), cluster(run))
        if tile:
            found = _in_tiles(found, tile, context.size, workload(run), cluster(run)) or found
        best = next(p.candidate for p in found if not p.candidate.stock)
        assert best.axes is not None
        heads, rows, columns = best.axes
        tile = tile or best.tile
    return (heads, rows, columns), tile or (rows, 1)


def _in_tiles(
    found: Sequence[Prediction], tile: tuple[int, int], ranks: int, work: Workload, machines: Cluster
) -> list[Prediction]:
    """Predictions for the grids among `found` that `tile` fills, the fastest first."""
    grids = dict.fromkeys(p.candidate.axes for p in found if p.candidate.mode == "attention2d")
    filled = [axes for axes in grids if axes and not (axes[1] % tile[0] or axes[2] % tile[1])]
    predicted = [predict(Candidate("attention2d", axes, tile), ranks, work, machines) for axes in filled]
    return sorted(predicted, key=lambda p: p.total_s)


@lru_cache(maxsize=64)
def _head_groups(candidate: Candidate, ranks: int, work: Workload, machines: Cluster) -> int:
    return predict(candidate, ranks, work, machines).head_groups
