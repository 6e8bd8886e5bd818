"""Shows the planner's predictions for a run: a table, a verdict in words, and a picture of speed-ups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_attn2d.config.auto import cluster, missing_rates, predictions, require_cluster, workload
from megatron_attn2d.pictures import blank, ruled, save
from megatron_attn2d.planner.cost import CLOSE, Candidate, Cluster, Prediction, predict
from megatron_attn2d.planner.traffic import Workload

if TYPE_CHECKING:
    from megatron_attn2d.config.schema import RunConfig

_SHOWN = 12


def report(run: RunConfig) -> str:
    """The table and the verdict.

    Raises:
        ConfigError: the YAML does not describe the cluster, or has one context rank.
    """
    from megatron_attn2d.errors import ConfigError

    require_cluster(run)
    if run.context_parallel.size == 1:
        raise ConfigError("context_parallel.size", 1, "one rank needs no plan", "choose 2 or more")
    work, machines = workload(run), cluster(run)
    found = with_recomputation(predictions(run.context_parallel.size, work, machines), run)
    shown = _selection(found)
    ring = next(p for p in found if p.candidate.mode == "ring")
    unit = work.shard_bytes(run.context_parallel.size)
    lines = [
        f"{run.context_parallel.size} context ranks, {machines.ranks_per_node} per node; a layer on one tensor rank: "
        f"{work.seq} tokens, {work.heads}/{work.kv_heads} heads of {work.head_dim}; u = {unit / 2**20:.2f} MiB",
        f"{'mode':32s}{'groups':>7s}{'forward':>13s}{'backward':>13s}{'speed':>8s}{'NVLink':>10s}{'NIC':>10s}{'memory':>11s}",
    ]
    for p in shown:
        lines.append(
            f"{p.candidate.label:32s}{p.head_groups:7d}{p.forward_s * 1e3:10.3f} ms{p.backward_s * 1e3:10.3f} ms"
            f"{ring.total_s / p.total_s:7.2f}x{p.intra_bytes / unit:8.1f} u{p.nic_bytes / unit:8.1f} u"
            f"{p.transient_bytes / 2**20:7.0f} MiB"
        )
    if run.training.recompute_granularity == "full":
        once = ", attention2d's once (training.keep_attention_outputs)" if run.training.keep_attention_outputs else ""
        lines += ["", f"Full recomputation runs the forward pass twice{once}: that is what stands under forward."]
    if run.megatron_args.get("window_size"):
        lines += ["", "megatron_args.window_size is not counted: these are predictions for full causal attention"]
    return "\n".join([*lines, "", verdict(found), *waiting_for_the_cpu(run)])


def with_recomputation(found: Sequence[Prediction], run: RunConfig) -> list[Prediction]:
    """`found` with the forward passes that full recomputation makes, the fastest first again."""
    if run.training.recompute_granularity != "full":
        return list(found)

    def counted(p: Prediction) -> Prediction:
        if run.training.keep_attention_outputs and not p.candidate.stock:
            return p
        return replace(p, forward_s=2 * p.forward_s, device_s=p.device_s + p.forward_s)

    return sorted(map(counted, found), key=lambda p: (p.total_s, p.device_s, p.transient_bytes))


def verdict(found: Sequence[Prediction]) -> str:
    """The recommended mode and the reason, in a sentence; `found` is sorted, the fastest first."""
    best, ring = found[0], next(p for p in found if p.candidate.mode == "ring")
    hides = ring.messages_s < ring.kernels_s
    bound = f"its messages take {ring.messages_s * 1e3:.3f} ms where kernels take {ring.kernels_s * 1e3:.3f}"
    if best.total_s * CLOSE > ring.total_s:
        return f"Take the ring: {bound}{', so it hides them,' if hides else ''} and nothing is faster by more than 3%."
    name = best.candidate.label
    if best.candidate.mode == "ulysses":
        name += f" (attention2d {'x'.join(map(str, best.candidate.axes or ()))})"
    return f"Take {name}: {ring.total_s / best.total_s:.2f}x as fast as a ring; there, {bound}."


def waiting_for_the_cpu(run: RunConfig) -> list[str]:
    """One sentence if the CPU takes longer to start a layer's attention than the GPU to run it, else none.

    The prediction is for the run's own mode and grid. Where the YAML does not describe the cluster, or CUDA graphs
    start all kernels at once, there is none.
    """
    size, mode = run.context_parallel.size, run.context_parallel.mode
    if size == 1 or missing_rates(run):
        return []
    axes = {"attention2d": run.grid, "all_gather": (1, size, 1), "ulysses": (size, 1, 1)}.get(mode)
    tile = run.tile if mode == "attention2d" and run.tile != (run.grid[1], 1) else None
    groups = [run.head_groups]
    found = predict(Candidate(mode, axes, tile), size, workload(run), cluster(run), groups)
    if found.total_s <= CLOSE * found.device_s:
        return []
    return [
        f"The CPU decides: it takes {found.total_s * 1e3:.2f} ms to start the attention of a layer "
        f"({found.candidate.label}), whose kernels and messages take {found.device_s * 1e3:.2f} ms. With CUDA graphs "
        f"(training.cuda_graphs=layer) attention is up to {found.total_s / found.device_s:.1f}x as fast."
    ]


def draw(run: RunConfig, path: Path) -> None:
    """Draw the speed-up over the ring against the sequence length, a line per number of ranks, into the PNG `path`."""

    work, machines, size = workload(run), cluster(run), run.context_parallel.size
    lengths = [work.seq // 4 * 2**k for k in range(6)]
    figure = blank(7.5, 4.5, dpi=150)
    axes = figure.subplots()
    for ranks in sorted({max(2, size // 4), size, size * 2}):
        axes.plot(lengths, [_speed(ranks, work, machines, seq) for seq in lengths], marker="o", label=f"{ranks} ranks")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sequence length, tokens")
    axes.set_ylabel("predicted speed-up over a ring")
    axes.set_title(f"{run.run.name}: attention of a layer, forward + backward, best mode", fontsize=11)
    ruled(axes)
    axes.legend(frameon=False)
    save(figure, path)


def _speed(ranks: int, work: Workload, machines: Cluster, seq: int) -> float:
    found = predictions(ranks, replace(work, seq=seq), machines)
    return next(p for p in found if p.candidate.mode == "ring").total_s / found[0].total_s


def _selection(found: Sequence[Prediction]) -> list[Prediction]:
    """The fastest predictions, and those of the other modes among the rest."""
    return [p for i, p in enumerate(found) if i < _SHOWN or p.candidate.mode != "attention2d"]
