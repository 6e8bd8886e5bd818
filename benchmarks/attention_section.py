"""Cases of attention that share ranks: which modes and grids to run, what the planner predicts, and running them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from attention_kinds import Kind
from attention_modes import TRANSFORMER_ENGINE, GridMode, Shape, a2a_ranks
from watched import Watched, python

from megatron_attn2d.config import load_run
from megatron_attn2d.config.auto import cluster
from megatron_attn2d.planner.cost import Candidate, Cluster, plan, predict
from megatron_attn2d.planner.traffic import Workload

ROOT = Path(__file__).resolve().parents[1]
YAML = ROOT / "benchmarks/benchmark_multi_gpu.yaml"
GRACE_S = 10.0
"""For a case that has begun when its section's time is up."""
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
        cases: kind (`attention_kinds.Kind`), mode and expected_s, what it will take at least.
        deadline: no case begins later, by time.time().
        repeats, seconds, warmup, inner, forward, graphs, alone: see `attention_timing.measure`.
        faked: one process is rank 0, and nobody the others: see `faked_world`.
    """

    name: str
    device: str
    ranks: int
    nodes: bool = False
    ranks_per_node: int = 1
    cases: list[dict[str, Any]] = field(default_factory=list)
    deadline: float = 0.0
    repeats: int = 5
    seconds: float = 0.5
    warmup: int = 1
    inner: int = 0
    forward: bool = False
    graphs: bool = False
    alone: bool = False
    faked: bool = False

    @property
    def title(self) -> str:
        """For people."""
        if self.faked:
            return f"rank 0 of {self.ranks}, the other {self.ranks - 1} faked, without the time of messages"
        where = f"{self.ranks // self.ranks_per_node} nodes of {self.ranks_per_node}" if self.nodes else "one node"
        return f"{self.ranks} ranks, {where}"

    def add(self, kind: Kind, modes: Iterable[str], machines: Cluster | None = None) -> None:
        """Add a kind in some modes; `machines` says how long its calls take, where links are as the planner knows."""
        for mode in modes:
            seconds = None if machines is None else predicted_s(mode, self, kind, machines)
            self.cases.append({"kind": asdict(kind), "mode": mode, "expected_s": _CALLS * (seconds or 0.0)})


def run_section(section: Section, out: Path, case_timeout: float, end: float) -> dict[str, Any]:
    """Measure a section's cases, printing each as it is done; all of its ranks are gone at `end`.

    Args:
        out: directory of the section's files: NAME.json says what, NAME.jsonl holds rows, NAME.log what ranks print.
        case_timeout: seconds after which a case counts as hung.

    Returns:
        name, title, nodes, links where they were measured, and rows: of a row's kind, mode, what was measured or
        `failed`, and predicted_ms where the planner models the kind.
    """
    rows: list[dict[str, Any]] = []
    known: dict[str, Any] = {"name": section.name, "title": section.title, "nodes": section.nodes, "rows": rows}
    known["faked"] = section.faked
    print(f"\n{section.name}: {section.title}, {len(section.cases)} cases", flush=True)
    machines = gpus(section.ranks)
    sharing = -(-section.ranks // max(1, torch.cuda.device_count()))

    def tell(line: dict[str, Any]) -> None:
        if "links" in line:
            known["links"] = line["links"]
            print("  links: " + ", ".join(f"{k} {v:.3g}" for k, v in line["links"].items()), flush=True)
        if "end" not in line:
            return
        case = section.cases[line["end"]]
        kind = Kind.read(case["kind"])
        described = {"kind": case["kind"], "seq": kind.seq, "heads": f"{kind.heads}/{kind.kv_heads}"}
        row = described | {"mode": case["mode"]} | {k: v for k, v in line.items() if k != "end"}
        measured_links = known.get("links")
        # The prediction is of a call with its messages.
        if measured_links or not (section.nodes or section.faked or section.device == "cpu"):
            with_links = measured_cluster(section, measured_links or {}, machines, sharing)
            seconds = predicted_s(case["mode"], section, kind, with_links)
            row["predicted_ms"] = None if seconds is None else seconds * 1e3
        rows.append(row)
        show(row, rows)

    spec, log = out / f"{section.name}.json", out / f"{section.name}.log"
    spec.write_text(json.dumps(asdict(section)))
    log.unlink(missing_ok=True)
    command = python(ROOT / "benchmarks/attention_ranks.py", str(spec), str(out / f"{section.name}.jsonl"))
    watched = Watched(command, out / f"{section.name}.jsonl", log, 3 * case_timeout, case_timeout, end)
    begin = time.time()
    watched.run(len(section.cases), tell)
    known["took_s"] = time.time() - begin
    return known


def show(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print a row, its speed against Transformer Engine's best mode so far, or against the ring."""
    kind = Kind.read(row["kind"])
    head = f"  {kind.sizes:19s} {kind.label:28s} {row['mode']:20s}"
    predicted = row.get("predicted_ms")
    if "ms" not in row:
        foreseen = "" if predicted is None else f", predicted {predicted:.3f} ms"
        print(f"{head} {row['failed']}{foreseen}", flush=True)
        return
    same = [r for r in rows if r["kind"] == row["kind"] and "ms" in r]
    theirs = [r["ms"] for r in same if not r["mode"].startswith("attention2d")]
    said = [f"{row['ms']:9.3f} ms (+-{row['spread'] * 50:4.1f}%)"]
    said += [f"{min(theirs) / row['ms']:5.2f}x" if theirs else "     -"]
    if "host_forward_ms" in row:
        said.append(f"host {row['host_forward_ms']:.2f} + {row['host_backward_ms']:.2f} ms")
    if "host_new_ms" in row:
        said.append(f"(new documents {row['host_new_ms']:.2f})")
    said.append(f"{row['mib']:6.0f} MiB")
    if predicted is not None:
        said.append(f"predicted {predicted:.3f} ms {predicted / row['ms'] - 1:+4.0%}")
    if "received_mib" in row:
        said.append(f"receives {row['received_mib']:.0f} MiB")
    if "apart" in row:
        said.append(f"apart {row['apart']:.1e}")
    if row["first_s"] > 2:
        said.append(f"first call {row['first_s']:.0f} s")
    print(f"{head} {'  '.join(said)}", flush=True)


def node_modes(section: Section, kind: Kind, machines: Cluster, few: bool) -> list[str]:
    """Transformer Engine's modes, or the ring, and our grids in the planner's order, for emulated nodes."""
    theirs = [*TRANSFORMER_ENGINE, f"te:a2a+p2p:{_a2a_p2p(section, kind)}"] if section.device == "cuda" else ["ring"]
    return theirs + planned_grids(section, kind, replace(machines, **_SLOW_LINKS), few)


def _a2a_p2p(section: Section, kind: Kind) -> int:
    if section.ranks_per_node > 1:
        return section.ranks_per_node
    h, g = kind.heads, kind.kv_heads
    able = [n for n in range(2, section.ranks // 2 + 1) if section.ranks % n == h % n == g % n == 0]
    return max(able, default=2)  # as many as the heads divide by


def planned_grids(section: Section, kind: Kind, machines: Cluster, few: bool) -> list[str]:
    """attention2d, the fastest predicted first: each U x R x C whose heads divide, in its best tile and head groups.

    Few: the best two, and the best R x C.
    """
    node = section.ranks_per_node if section.nodes else section.ranks
    found: dict[tuple[int, int, int], str] = {}
    for prediction in plan(section.ranks, work_of(section, kind), replace(machines, ranks_per_node=node)):
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


def gpus(gpus_per_node: int) -> Cluster:
    """The cluster that benchmark_multi_gpu.yaml describes, with nodes of so many GPUs."""
    sizes = [f"environment.gpus_per_node={gpus_per_node}", f"context_parallel.size={gpus_per_node}"]
    return cluster(load_run(str(YAML), [*sizes, f"training.seq_length={1024 * gpus_per_node}"]))


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
        stock_speed=machines.stock_speed if gpu else 1.0,
    )


def work_of(section: Section, kind: Kind) -> Workload:
    """As the planner sees it."""
    elements = 2 if section.device == "cuda" else 4
    return Workload(kind.seq, kind.heads, kind.kv_heads, kind.head_dim, element_bytes=elements, causal=kind.causal)


def predicted_s(mode: str, section: Section, kind: Kind, machines: Cluster) -> float | None:
    """The planner's forward and backward; None for what it does not model."""
    candidate = _candidate(mode, section.ranks)
    h, g = kind.heads, kind.kv_heads
    if candidate is None or kind.documents or kind.window or kind.dropout or kind.head_dim != kind.value_dim:
        return None
    if mode.startswith("te:") and (h % (u := a2a_ranks(mode[3:], section.ranks)) or g % u):
        return None
    machines = replace(machines, ranks_per_node=section.ranks_per_node if section.nodes else section.ranks)
    groups = GridMode.parse(mode).groups if mode.startswith("attention2d") else 1
    return predict(candidate, section.ranks, work_of(section, kind), machines, (groups,)).total_s


def _candidate(mode: str, ranks: int) -> Candidate | None:
    name = mode.split()[0]
    if name in ("ring", "te:p2p"):
        return Candidate("ring", None, None)
    if name == "te:all_gather":
        return Candidate("all_gather", (1, ranks, 1), None)
    if name == "te:a2a":
        return Candidate("ulysses", (ranks, 1, 1), None)
    if name.startswith("te:"):
        return None
    shape = GridMode.parse(mode).shape
    return Candidate("attention2d", shape.axes, shape.tile)
