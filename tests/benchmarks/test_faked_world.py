"""Benchmarks whose process is one rank of many and fakes the others: what it receives, and what they print."""

from __future__ import annotations

import json
import math
import os
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.planner.traffic import Workload, attention2d_traffic, ring_traffic
from tests.benchmarks.test_benchmark_multi_gpu import script

RANKS, TOKENS, HEADS, KV_HEADS, DIM = 8, 16, 4, 2, 8
WORK = Workload(RANKS * TOKENS, HEADS, KV_HEADS, DIM, element_bytes=4)


@pytest.mark.parametrize("axes", [None, (1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_what_a_rank_receives_is_finite_and_as_the_planner_counts_it(axes: tuple[int, int, int] | None) -> None:
    faked = script("faked_world")
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
    traffic = ring_traffic(RANKS, WORK) if axes is None else attention2d_traffic(axes, WORK)
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
    kinds, table = script("attention_kinds"), script("attention_table")
    section = script("attention_section").Section("attention", "cpu", RANKS, faked=True, alone=True, repeats=1, inner=1)
    kind = kinds.Kind("dense", RANKS * TOKENS, HEADS, KV_HEADS, DIM, DIM)
    section.add(kind, ["ring", "attention2d 4x2"])
    section.deadline = math.inf
    rows = tmp_path / "rows.jsonl"
    with mock.patch.dict(os.environ):
        script("faked_world").as_first_rank(
            script("attention_ranks").run_rank, Namespace(**asdict(section), rows=rows, first=0)
        )
    ends = [said for text in rows.read_text().splitlines() if "end" in (said := json.loads(text))]
    found = [{"kind": asdict(kind), "mode": case["mode"]} | end for case, end in zip(section.cases, ends, strict=True)]
    ring, grid = found
    assert ring["received_mib"] * 2**20 == ring_traffic(RANKS, WORK).total / RANKS
    assert 0 < grid["received_mib"] < ring["received_mib"]
    assert grid["ms"] > 0
    assert "apart" not in grid
    text = table.markdown({"rows": found, "host": {}, "title": section.title, "faked": True})
    assert text.startswith("rank 0 of 8, the other 7 faked, without the time of messages")
    assert "| MiB received |" in text


def test_a_step_of_one_rank_is_timed_by_parts_beside_the_plan(tmp_path: Path) -> None:
    given = {"faked": True, "ranks": 4, "tensor": 2, "iterations": 1, "num_layers": None, "model": "tiny"}
    args = Namespace(**given, device="cpu", out=tmp_path, overrides=[], peak_tflops=989.0)
    steps = script("million_steps")
    row = steps.train(64, [], args, time.time() + 300)
    assert "failed" not in row, row
    parts = row["parts"]
    assert 0 < parts["forward_s"] + parts["backward_s"] < parts["step_s"] <= row["step_s"] * 1.5
    assert row["host_gib"] == pytest.approx(row["planned_host_gib"])
    assert parts["host_process_gib"] > 0.1
    assert f"forward {parts['forward_s']:.1f}" in steps.step_line(row)
