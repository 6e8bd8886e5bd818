"""Benchmarks whose process is one rank of many and fakes the others: what it receives, and what they print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.planner.traffic import Workload, attention2d_traffic, ring_traffic
from tests.benchmarks.test_benchmark_multi_gpu import ROOT, script

RANKS, TOKENS, HEADS, KV_HEADS, DIM = 8, 16, 4, 2, 8


@pytest.mark.parametrize("axes", [None, (1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_what_a_rank_receives_is_finite_and_as_the_planner_counts_it(axes: tuple[int, int, int] | None) -> None:
    faked = script("faked_world")
    work = Workload(RANKS * TOKENS, HEADS, KV_HEADS, DIM, element_bytes=4)
    q, k, v = (torch.randn(TOKENS, 1, n, DIM, requires_grad=True) for n in (HEADS, KV_HEADS, KV_HEADS))
    found: list[torch.Tensor] = []
    with faked.faked_world(RANKS, refilled=True):
        group = dist.group.WORLD
        assert group is not None

        def call() -> None:
            if axes is None:
                out = ring_attention(q, k, v, group)
            else:
                u, rows, cols = axes
                out = attention2d(q, k, v, Grid.from_group(group, rows=rows, cols=cols, ulysses_size=u))
            found[:] = out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

        received = faked.received_bytes(call)
    assert all(x.isfinite().all() for x in found)
    traffic = ring_traffic(RANKS, work) if axes is None else attention2d_traffic(axes, work)
    mean = traffic.total / RANKS  # ranks of a grid don't all receive as much
    assert received == mean if axes is None else 0.5 * mean < received < 1.5 * mean


def test_groups_of_any_backend_and_objects_are_faked_until_the_world_ends() -> None:
    with script("faked_world").faked_world(RANKS):
        assert dist.get_backend(dist.new_group([0, 3], backend="gloo")) == "fake"
        said: list[Any] = [None] * RANKS
        dist.all_gather_object(said, "here")
        assert said == ["here"] * RANKS
    assert not dist.is_initialized()
    assert dist.new_group.__module__ == "torch.distributed.distributed_c10d"


def test_attention_of_one_rank_is_timed_and_not_compared(tmp_path: Path) -> None:
    sizes = ["--device", "cpu", "--ranks", "8", "--seq", "128", "--heads", "2/2", "--head-dim", "8"]
    command = [sys.executable, "benchmarks/benchmark_attention.py", "--out", str(tmp_path), "--faked", *sizes]
    command += ["--repeats", "1", "--warmup", "1", "--grids", "4x2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    ring, grid = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert ring["received_mib"] * 2**20 == 7 * 3 * (2 * 16 * 2 * 8 * 4)  # k, v forward; k, v, dk, dv backward
    assert grid["ms"] > 0
    assert not {"apart", "predicted_ms"} & (ring.keys() | grid.keys())
    table = (tmp_path / "attention.md").read_text()
    assert table.startswith("rank 0 of 8, the other 7 faked, without the time of messages, CPU")
    assert "| MiB received |" in table


def test_a_step_of_one_rank_is_timed_by_parts_beside_the_plan(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/benchmark_million.py", "--out", str(tmp_path), "--faked", "--device", "cpu"]
    command += ["--model", "tiny", "--ranks", "4", "--tensor", "2", "--iterations", "1", "--sections", "steps"]
    done = subprocess.run([*command, "--steps-seq", "64"], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    (step,) = json.loads((tmp_path / "million.json").read_text())["steps"]
    parts = step["parts"]
    assert 0 < parts["forward_s"] + parts["backward_s"] < parts["step_s"] <= step["step_s"] * 1.5
    assert step["host_gib"] == pytest.approx(step["planned_host_gib"])
    assert parts["host_process_gib"] > 0.1
    assert "tensor 2 x context 2, rank 0 of 4, the other 3 faked" in done.stdout
