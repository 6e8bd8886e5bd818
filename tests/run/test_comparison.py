"""Runs compared."""

import json
import re
from pathlib import Path

import pytest

from megatron_attn2d import cli
from megatron_attn2d.errors import UsageError
from megatron_attn2d.run.comparison import Run, _running_median, read_runs, table
from megatron_attn2d.run.metrics import read_steps, read_validation


def write(run_dir: Path, steps: int = 30, **more: float) -> Path:
    run_dir.mkdir(parents=True)
    lines = [
        json.dumps({"step": n, "loss": 6 / n, "tokens_per_s": 1000.0 if n > 5 else 10.0, "elapsed_s": n * 61.0, **more})
        for n in range(1, steps + 1)
    ]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run_dir


def test_a_picture_and_a_row_for_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", tflops=400.0, mfu=0.4, memory_gib=61.5, attention_wait=0.031)
    validations = [{"step": n, "set": "validation", "loss": 8 / n} for n in (10, 20)]
    validations += [{"step": 30, "set": "test", "loss": 9}]
    (tmp_path / "a" / "validation.jsonl").write_text("".join(json.dumps(one) + "\n" for one in validations) + '{"st')
    write(tmp_path / "b", steps=1)
    output = tmp_path / "out" / "report.png"
    assert cli.main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(output)]) == 0
    header, first, second, _ = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert dict(zip(header, first, strict=True)) == {
        "run": "a",
        "steps": "30",
        "loss": "0.2000",
        "validation": "0.4000",
        "tokens/s": "1,000",
        "TFLOP/s per rank": "400",
        "MFU": "40.0%",
        "memory GiB": "61.50",
        "attention waits": "3.1%",
        "time": "0:30:30",
    }
    assert second == ["b", "1", "6.0000", "-", "10", "-", "-", "-", "-", "0:01:01"]
    assert output.read_bytes().startswith(b"\x89PNG")
    assert output.stat().st_size > 20_000


def test_runs_of_one_name_are_told_apart_and_named_once(tmp_path: Path) -> None:
    a, b = write(tmp_path / "ring" / "run"), write(tmp_path / "attention2d" / "run")
    assert [run.name for run in read_runs([a, b, a])] == ["ring/run", "attention2d/run"]
    assert [run.name for run in read_runs([a])] == ["run"]


def test_the_start_of_a_run_is_left_out_of_medians(tmp_path: Path) -> None:
    run = Run("run", read_steps(write(tmp_path / "run", steps=8)))
    assert run.typical("tokens_per_s") == 1000.0
    assert run.typical("mfu") is None


def test_a_step_without_all_values_is_no_obstacle(tmp_path: Path) -> None:
    path = write(tmp_path / "run", steps=3) / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "loss": 1.5, "grad_norm": null, "mfu": 0.5}\n{"step": 5, "lo')
    run = Run("run", read_steps(tmp_path / "run"))
    assert run.series("mfu") == ([4], [0.5])
    assert "1.5000" in table([run])


@pytest.mark.parametrize("line", ["no JSON", '{"step": 1, "loss": 2.0}', "[]"])
def test_a_file_of_something_else_than_validations_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_text(f"{line}\n{{}}\n")
    with pytest.raises(UsageError, match=r"validation\.jsonl, line 1: not a validation"):
        read_validation(tmp_path)


def test_running_median() -> None:
    assert _running_median([5.0] * 10 + [500.0] + [5.0] * 10) == [5.0] * 21


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"metrics\.jsonl: No such file or directory"):
        read_runs([tmp_path])
