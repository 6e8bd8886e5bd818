"""The planner against what two H200 measured over NVLink (docs/attention_gpu.md), with configs/clusters/h100.yaml."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_attn2d.attention.overlap import automatic_head_groups
from megatron_attn2d.config import load_run
from megatron_attn2d.config.schema import RunConfig
from megatron_attn2d.planner.cost import Candidate, predict
from megatron_attn2d.planner.run import cluster, workload

RING, ROWS, COLUMNS, HEADS = (None, (1, 2, 1), (1, 1, 2), (2, 1, 1))
MEASURED = [  # tokens, heads, axes, milliseconds forward and backward; the ring is Transformer Engine's p2p
    (32768, "12/12", RING, 11.488),
    (32768, "12/12", ROWS, 10.146),
    (65536, "12/12", RING, 43.672),
    (65536, "12/12", ROWS, 38.756),
    (65536, "12/12", COLUMNS, 38.964),
    (65536, "12/12", HEADS, 39.724),
    (131072, "12/12", RING, 173.035),
    (131072, "12/12", ROWS, 153.977),
    (131072, "12/12", COLUMNS, 154.646),
    (131072, "12/12", HEADS, 157.244),
    (65536, "16/2", RING, 57.778),
    (65536, "16/2", ROWS, 51.211),
    (131072, "16/2", RING, 227.041),
    (131072, "16/2", ROWS, 205.329),
    (262144, "12/12", ROWS, 599.580),
    (16384, "12/12", ROWS, 2.860),  # replayed as a CUDA graph: launches are what the planner leaves out
]


def two_gpus(seq: int, heads: str, *overrides: str) -> RunConfig:
    h, g = map(int, heads.split("/"))
    sizes = [f"training.seq_length={seq}", f"model.num_attention_heads={h}", f"model.num_query_groups={g}"]
    gpus = ["environment.gpus_per_node=2", "context_parallel.size=2", "model.kv_channels=128"]
    return load_run("scripts/benchmark_multi_gpu.yaml", [*sizes, *gpus, *overrides])


@pytest.mark.parametrize(("seq", "heads", "axes", "ms"), MEASURED)
def test_predictions_are_within_a_quarter(seq: int, heads: str, axes: tuple[int, int, int] | None, ms: float) -> None:
    run = two_gpus(seq, heads)
    candidate = Candidate("ring" if axes is None else "attention2d", axes, None)
    assert predict(candidate, 2, workload(run), cluster(run)).total_s * 1e3 == pytest.approx(ms, rel=0.25)


@pytest.mark.parametrize("seq", [16384, 32768, 65536, 131072])
@pytest.mark.parametrize("heads", ["12/12", "16/2"])
def test_auto_is_a_grid_as_fast_as_any_without_head_groups(seq: int, heads: str) -> None:
    run = two_gpus(seq, heads)
    assert (run.grid, run.head_groups) == ((1, 2, 1), 1)
    keys = torch.empty(seq // 2, 1, int(heads.split("/")[1]), 128, dtype=torch.bfloat16, device="meta")
    shape: Any = SimpleNamespace(rows=2, cols=1)
    assert automatic_head_groups(keys, shape) == run.head_groups  # what attention does where nobody plans


def test_a_written_grid_is_planned_for_its_head_groups() -> None:
    """64 H100 on 8 nodes, 256K tokens, 40 heads: groups hide what crosses the network."""
    overrides = ["environment.nodes=8", "context_parallel.grid=[8,8]", "context_parallel.size=64"]
    large = two_gpus(2**18, "40/40", *overrides, "environment.gpus_per_node=8", "model.hidden_size=5120")
    assert large.head_groups is not None
    assert large.head_groups > 1
    assert two_gpus(2**18, "40/40", "context_parallel.head_groups=5", "model.hidden_size=5120").head_groups == 5
