"""The benchmark of host time, run with empty kernels: what it prints and writes, and the launches of one call."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCHES = {
    "4x1": 12,
    "2x2": 34,
    "4x4": 34,
    "8x8": 34,
    "16x16": 34,
    "32x32": 34,
    "64x1": 12,
    "4x1x1": 28,
    "8x4x2": 62,
    "8x8:2x4": 66,
    "32x32:2x4": 66,
}
"""By grid, what one call launches forward and backward besides attention kernels, merges and sums: one more small
operation shows here, and each of them costs the CPU microseconds whatever the number of ranks."""


def test_host_time_is_told_of_faked_ranks(tmp_path: Path) -> None:
    written = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "rows.png")]
    command = [sys.executable, str(ROOT / "benchmarks/benchmark_host.py"), "--device", "cpu", "--calls", "1", *written]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(run.stdout.splitlines()) == len(rows)
    assert {row["ranks"] for row in rows} == {4, 16, 64, 256, 1024}
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 for row in rows)
    found = {(row["ranks"], row["mode"].removeprefix("attention2d ")): row["launches"] for row in rows}
    assert found | {(ranks, grid): LAUNCHES[grid] for ranks, grid in found if grid in LAUNCHES} == found
    assert {grid for _, grid in found} > LAUNCHES.keys()
    assert (tmp_path / "rows.png").stat().st_size > 1000
