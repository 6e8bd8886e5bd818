"""The benchmark of attention, run on CPU ranks: what it prints and writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_mode_is_timed(tmp_path: Path) -> None:
    sizes = ["--device", "cpu", "--ranks", "2", "--seq", "256", "--heads", "4/2", "--head-dim", "16", "--repeats", "2"]
    written = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "rows.png")]
    command = [sys.executable, str(ROOT / "scripts/benchmark_attention.py"), *sizes, *written]
    run = subprocess.run(
        [*command, "--modes", "ring", "attention2d", "--groups", "0", "3", "--alone"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["mode"] for row in rows] == ["ring", "attention2d 1x2", "attention2d 2x1"]  # no 3 groups of 2 heads
    for row in rows:
        assert 0 < row["cpu_forward_ms"] < row["alone_ms"]
        assert 0 < row["cpu_backward_ms"] < row["alone_ms"]
        assert row["ms"] > 0
    lines = run.stdout.splitlines()
    assert [line.split()[-1] for line in lines if "S=" in line] == ["ring"] * 3  # what speeds are relative to
    assert sum("a call alone" in line for line in lines) == 3
    assert (tmp_path / "rows.png").stat().st_size > 1000
