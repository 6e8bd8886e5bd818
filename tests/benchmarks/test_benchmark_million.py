"""The benchmark of long steps on CPU ranks: a layer in every mode, a whole step beside the plan, the extrapolation."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.test_benchmark_multi_gpu import ROOT, script


def test_measures_layers_and_steps(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/benchmark_million.py", "--out", str(tmp_path), "--device", "cpu"]
    command += ["--model", "tiny", "--seq", "64", "--steps-seq", "64", "--modes", "attention2d", "p2p"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "million.json").read_text())
    assert [(row["mode"], row["kept"]) for row in found["layers"]] == [
        ("attention2d", True),
        ("attention2d", False),
        ("p2p", False),
        ("loss", False),
    ]
    (step,) = found["steps"]
    assert step["steps"] == 2
    assert step["host_gib"] == pytest.approx(step["planned_host_gib"])  # 2 layers: input, output and log-sum-exp
    assert "one length only" in done.stdout


def test_extrapolates_squares_and_lines() -> None:
    benchmark = script("benchmark_million")
    sizes = {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 256}
    sizes["num_query_groups"] = 2
    args = argparse.Namespace(target=1000, target_ranks=8, ranks=2, peak_tflops=1.0, faked=False)

    def seconds(seq: int, ranks: int) -> float:
        return 3e-6 * seq**2 / ranks + 5e-3 * seq / ranks

    rows = [
        {"seq": seq, "mode": mode, "kept": False, "forward_s": 0.0, "backward_s": factor * seconds(seq, 2)}
        for seq in (100, 200)
        for mode, factor in (("attention2d", 1.0), ("p2p", 1.5))
    ]
    rows.append({"seq": 100, "mode": "loss", "kept": False, "total_s": 0.4})
    said = benchmark.extrapolation(rows, sizes, args)
    assert f"3 x {seconds(1000, 8):.2f} + 1.0 = {3 * seconds(1000, 8) + 1:.0f} s" in said
    assert "S=     200 over p2p, the best other mode: attention2d 1.500x" in said
