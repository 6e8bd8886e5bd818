"""The planner against what the paper measured (arXiv 2503.15758): attention's speed-up over a ring on A100.

The paper names GPUs and nodes, not the network's rates: 64 A100 in 16 nodes. Predictions are for nodes of 4 A100 with
the rates of configs/clusters/a100.yaml, for the square grid as the paper runs it: no chunk carried for a neighbour, no
overlap by head groups. Published speed-ups are read off its figure.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_attn2d.config import load_run
from megatron_attn2d.config.auto import cluster, workload
from megatron_attn2d.planner.cost import Candidate, predict

PUBLISHED = {16: (2.4, 3.3), 64: (3.85, 5.0)}


def speed_up(model: str, gpus: int, seq: int) -> float:
    run = load_run(
        f"configs/runs/gpt3_{model}_16gpus.yaml",
        [
            f"training.seq_length={seq}",
            f"context_parallel.size={gpus}",
            f"environment.nodes={gpus // 4}",
            "environment.gpus_per_node=4",
            "parallelism.tensor=1",
            "parallelism.sequence_parallel=false",
        ],
    )
    side = round(gpus**0.5)
    grid = Candidate("attention2d", (1, side, side), None)
    work, machines = workload(run), cluster(run)
    ring, square = (
        predict(candidate, gpus, work, machines, head_groups=(1,))
        for candidate in (Candidate("ring", None, None), grid)
    )
    return ring.total_s / square.total_s


def test_the_prediction_is_too_high_where_kernels_are_short() -> None:
    """At 8K tokens it leaves out what it does not know: launches, synchronisation, copies. docs/planner.md says so."""
    assert speed_up("13b", 16, 8192) > 1.3 * PUBLISHED[16][1]


@pytest.mark.parametrize("model", ["760m", "2.7b", "13b"])
@pytest.mark.parametrize("gpus", [16, 64])
def test_published_speed_ups_at_32k(model: str, gpus: int) -> None:
    low, high = PUBLISHED[gpus]
    assert low <= speed_up(model, gpus, 32768) <= 1.05 * high


def test_the_largest_published_speed_up() -> None:
    """64 A100, 13B, 32K tokens: 5.0."""
    assert speed_up("13b", 64, 32768) == pytest.approx(5.0, rel=0.1)


def test_one_gpu_a_node() -> None:
    """64 H100, one per node: 9.4 published. Bytes allow 378 / 74.5; a ring's starts, as measured, hide behind them."""
    run = load_run("configs/runs/gpt3_175b_32k.yaml", [])
    machines, work = replace(cluster(run), ranks_per_node=1), replace(workload(run), heads=40, kv_heads=40)
    modes = Candidate("ring", None, None), Candidate("attention2d", (1, 8, 8), None)
    ring, square = (predict(candidate, 64, work, machines, head_groups=(1,)) for candidate in modes)
    assert ring.messages_s / square.messages_s == pytest.approx(378 / 74.5, rel=0.05)
    assert ring.device_s / square.device_s < 378 / 74.5
    assert ring.total_s / square.total_s == pytest.approx(4.4, rel=0.05)
