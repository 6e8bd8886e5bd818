"""What benchmark_multi_gpu.py runs, in which order, and what the planner predicts for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from attention_modes import Shape, a2a_ranks, parse_grid

from megatron_attn2d.config import load_run
from megatron_attn2d.planner.cost import Candidate, Cluster, plan, predict
from megatron_attn2d.planner.run import cluster
from megatron_attn2d.planner.traffic import Workload

LONG = 2**17
"""Tokens from which only few grids are run, and what matters less at the end: a case takes seconds at last."""
_CALLS = 5
"""How often a case is called at least: to warm up, for memory, to see how long it takes, timed."""
_SLOW_LINKS = {"intra_bytes_per_s": 5e9, "nic_bytes_per_s": 1e9, "rank_nic_bytes_per_s": 1e9, "nic_latency_s": 1e-4}
"""Loopback sockets, roughly; only to choose which grids to run: predictions use what was measured."""


@dataclass
class Section:
    """Cases that share ranks.

    Attributes:
        name: in figures and logs.
        nodes, ranks_per_node: as `attention_modes.add_arguments` says.
        cases: seq, heads, mode and expected_s, what it will take at least.
        deadline: no case begins later, by time.time().
        repeats, seconds, warmup, inner, forward: see `benchmark_attention.measure`.
    """

    name: str
    device: str
    ranks: int
    nodes: bool
    ranks_per_node: int
    head_dim: int
    cases: list[dict[str, Any]] = field(default_factory=list)
    deadline: float = 0.0
    repeats: int = 5
    seconds: float = 0.5
    warmup: int = 1
    inner: int = 0
    forward: bool = False

    @property
    def title(self) -> str:
        """For people."""
        where = f"{self.ranks // self.ranks_per_node} nodes of {self.ranks_per_node}" if self.nodes else "one node"
        return f"{self.ranks} ranks, {where}"

    def described(self) -> dict[str, Any]:
        """As the ranks read it."""
        return asdict(self)


def attention_section(section: Section, sequences: list[int], heads: list[str], machines: Cluster) -> Section:
    """The section with its cases: short sequences first, in each Transformer Engine first.

    Args:
        machines: to choose grids by where not all are run: at LONG, and on nodes with more than 12/12 heads.
    """
    if section.nodes:
        machines = replace(machines, **_SLOW_LINKS)
    for seq in sequences:
        for pair in heads:
            h, g = map(int, pair.split("/"))
            work = Workload(seq, h, g, section.head_dim)
            few = seq >= LONG or (section.nodes and (section.ranks > 8 or pair != heads[0]))
            modes = [*_transformer_engine(section, h, g)] if section.device == "cuda" else ["ring"]
            modes += grids(section, work, machines, few)
            if seq >= LONG:  # the figures that matter first, as time may run out: the ring and the best of our grids
                best = next(mode for mode in modes if mode.startswith("attention2d"))
                modes.sort(key=lambda mode: (mode not in ("te:p2p", "ring", best), mode == "te:all_gather"))
            for mode in modes:
                predicted = 0.0 if section.nodes else predicted_s(mode, section, work, machines) or 0.0
                section.cases.append({"seq": seq, "heads": pair, "mode": mode, "expected_s": _CALLS * predicted})
    return section


def _transformer_engine(section: Section, h: int, g: int) -> Iterator[str]:
    yield from ("te:p2p", "te:all_gather", "te:a2a")
    if section.nodes and section.ranks_per_node > 1:
        over_heads = section.ranks_per_node
    else:  # as many as the heads divide by
        able = [n for n in range(2, section.ranks // 2 + 1) if section.ranks % n == h % n == g % n == 0]
        over_heads = max(able, default=2)
    yield f"te:a2a+p2p:{over_heads}"


def grids(section: Section, work: Workload, machines: Cluster, few: bool) -> list[str]:
    """attention2d, the fastest predicted first: each U x R x C whose heads divide, in its best tile and head groups.

    Few: the best two, and the best R x C.
    """
    node = section.ranks_per_node if section.nodes else section.ranks
    found: dict[tuple[int, int, int], str] = {}
    for prediction in plan(section.ranks, work, replace(machines, ranks_per_node=node)):
        axes, tile = prediction.candidate.axes, prediction.candidate.tile
        if axes is not None and axes not in found and (section.nodes or tile is None):
            groups = f" G{prediction.head_groups}" if prediction.head_groups > 1 else ""
            found[axes] = f"attention2d {Shape(axes, tile)}{groups}"
    chosen = list(found)
    if few:
        plain = next((axes for axes in chosen[2:] if axes[0] == 1), None)
        alone = any(axes[0] == 1 for axes in chosen[:2])
        chosen = chosen[:2] + ([plain] if plain and not alone else [])
    return [found[axes] for axes in chosen]


def gpus(yaml: str, gpus_per_node: int) -> Cluster:
    """The cluster that a YAML describes."""
    sizes = [f"environment.gpus_per_node={gpus_per_node}", f"context_parallel.size={gpus_per_node}"]
    return cluster(load_run(yaml, sizes))


def measured_cluster(section: Section, links: dict[str, float], machines: Cluster, sharing: int) -> Cluster:
    """The cluster of emulated nodes, or of CPU ranks: links as measured, kernels as given or measured.

    Args:
        machines: what GPUs do, and NVLink between those of a node.
        sharing: ranks that share a GPU.
    """
    if not section.nodes and section.device == "cuda":
        return replace(machines, ranks_per_node=section.ranks)
    node = section.ranks_per_node if section.nodes else section.ranks
    between = "between" if node < section.ranks else "within"
    alone = "alone" if "alone_bytes_per_s" in links else between
    gpu = section.device == "cuda"
    within = "within" if "within_bytes_per_s" in links else between  # nobody is within a node of one
    return Cluster(
        ranks_per_node=node,
        intra_bytes_per_s=machines.intra_bytes_per_s if gpu else links[f"{within}_bytes_per_s"],
        nic_bytes_per_s=links[f"{between}_bytes_per_s"],
        rank_nic_bytes_per_s=links[f"{alone}_bytes_per_s"],
        intra_latency_s=machines.intra_latency_s if gpu else links[f"{within}_latency_s"],
        nic_latency_s=links[f"{between}_latency_s"],
        message_s=links[f"{between}_message_s"],
        forward_flops=links.get("forward_flops", machines.forward_flops / sharing),
        backward_flops=links.get("backward_flops", machines.backward_flops / sharing),
        launch_s=machines.launch_s if gpu else 0.0,
    )


def predicted_s(mode: str, section: Section, work: Workload, machines: Cluster) -> float | None:
    """The planner's forward and backward; None for what it does not model."""
    candidate = _candidate(mode, section.ranks)
    h, g = work.heads, work.kv_heads
    if candidate is None or (mode.startswith("te:") and (h % (u := a2a_ranks(mode[3:], section.ranks)) or g % u)):
        return None
    work = replace(work, element_bytes=2 if section.device == "cuda" else 4)
    machines = replace(machines, ranks_per_node=section.ranks_per_node if section.nodes else section.ranks)
    groups = parse_grid(mode)[1] if mode.startswith("attention2d") else 1
    return predict(candidate, section.ranks, work, machines, (groups,)).total_s


def _candidate(mode: str, ranks: int) -> Candidate | None:
    if mode in ("ring", "te:p2p"):
        return Candidate("ring", None, None)
    if mode == "te:all_gather":
        return Candidate("all_gather", (1, ranks, 1), None)
    if mode == "te:a2a":
        return Candidate("ulysses", (ranks, 1, 1), None)
    if mode.startswith("te:"):
        return None
    shape, _ = parse_grid(mode)
    return Candidate("attention2d", shape.axes, shape.tile)
