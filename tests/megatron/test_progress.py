"""What a run shows and records."""

import io
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_attn2d.megatron.progress import Reporter, quiet
from tests.megatron.runs import train
from tests.pool import RankPool

KEYS = ["step", "loss", "grad_norm", "lr", "tokens_per_s", "elapsed_s"]


def test_each_step_is_recorded_once_and_shown_in_a_line(pool: RankPool, text: Path, tmp_path: Path) -> None:
    steps = train(pool, 2, tmp_path, data_path=text, num_layers=1, train_iters=3, pipeline_model_parallel_size=1)
    assert [list(step) for step in steps] == [KEYS] * 3
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["tokens_per_s"] > 0 and step["lr"] == 1e-3 for step in steps)
    assert [step["elapsed_s"] for step in steps] == sorted(step["elapsed_s"] for step in steps)
    logs = [(tmp_path / "logs" / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert "iteration        3/       3" in logs[1], "upstream's own log is in the file"
    assert "derived --distributed-backend gloo: there is no CUDA device" in logs[0]
    upstream = [line for line in logs[1].splitlines() if "lm loss" in line]
    assert f"lm loss: {steps[0]['loss']:.6E}" in upstream[0]


def reporter(run_dir: Path | None, console: Any = None, **options: Any) -> Reporter:
    """A reporter of a run of 20 steps, whose steps take 2 s."""
    settings = {"rank": 1, "world_size": 2, "seq_length": 100, "train_iters": 20, "save": "there", "run_dir": run_dir}
    made = Reporter(Namespace(**{**settings, **options}), console or io.StringIO())
    made._step_seconds = 2.0
    return made


@pytest.fixture(autouse=True)
def _batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import num_microbatches_calculator

    monkeypatch.setattr(num_microbatches_calculator, "get_current_running_global_batch_size", lambda: 8)


def test_a_line_says_how_far_how_good_how_fast_and_how_long() -> None:
    console = io.StringIO()
    reporter(None, console)._report(8, 2.5, 1.25, 1e-3)
    assert console.getvalue().splitlines() == [
        "resumed after step 7",
        "step  8/20  loss 2.5000  grad norm 1.250  lr 1.00e-03  400 tokens/s  ETA 0:00:24",
    ]


def test_a_skipped_step_is_recorded_without_a_norm(tmp_path: Path) -> None:
    console = io.StringIO()
    reporter(tmp_path, console)._report(1, 2.5, None, None)
    assert "grad norm skipped" in console.getvalue()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["grad_norm"] is None


def test_a_resumed_run_repeats_no_step_and_goes_on_counting_seconds(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    first = reporter(tmp_path)
    for step in range(1, 6):
        first._report(step, float(step), 1.0, 1e-3)
    with metrics.open("a") as file:
        file.write('{"step": 6, "los')  # the process was killed while it wrote
    elapsed = json.loads(metrics.read_text().splitlines()[2])["elapsed_s"]
    reporter(tmp_path)._report(4, 40.0, 1.0, 1e-3)
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [(step["step"], step["loss"]) for step in steps] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert steps[-1]["elapsed_s"] == pytest.approx(elapsed + 2.0, abs=0.5)


def test_losses_are_recorded_exactly(tmp_path: Path) -> None:
    loss = 5.051658630371094 / 3
    reporter(tmp_path)._report(1, loss, 1.0, 1e-3)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == loss


PRINTS = """
import os, sys
from megatron_attn2d.megatron.progress import quiet
with quiet(sys.argv[1], rank=3) as console:
    print("upstream")
    print("a complaint", file=sys.stderr)
    os.write(1, b"native code\\n")
    print("ours", file=console)
print("afterwards")
"""


def test_output_goes_to_the_ranks_log_and_back(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PRINTS, tmp_path], capture_output=True, text=True, check=True)
    assert (done.stdout.splitlines(), done.stderr) == (["ours", "afterwards"], "")
    logged = (tmp_path / "logs" / "rank-3.log").read_text().splitlines()
    assert sorted(logged) == ["a complaint", "native code", "upstream"]


def test_without_a_directory_nothing_is_redirected_and_no_file_written(tmp_path: Path) -> None:
    with quiet(None, rank=0) as console:
        assert console is sys.stdout
    reporter(None)._report(1, 1.0, 1.0, 1e-3)
    assert not list(tmp_path.iterdir())
