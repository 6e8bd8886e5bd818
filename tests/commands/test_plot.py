"""`plot`: curves and tables of runs."""

import json
import re
from pathlib import Path

import pytest

from megatron_attn2d import cli
from megatron_attn2d.errors import UsageError
from megatron_attn2d.run.curves import Curve, draw, read_curve, table

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "runs" / "quickstart.yaml")


def write_metrics(run_dir, losses, tail=""):
    run_dir.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in losses]
    (run_dir / "metrics.jsonl").write_text("".join(lines) + tail)
    return run_dir


def test_plot_draws_a_picture_and_prints_a_table(tmp_path, capsys):
    write_metrics(tmp_path / "attention2d", [(step, 6 / step) for step in range(1, 41)])
    write_metrics(tmp_path / "ring", [(step, 6 / step + 1e-6) for step in range(1, 11)])
    assert cli.main(["plot", "attention2d", "ring", "-o", "out/loss.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "attention2d", "ring", "difference"]
    assert lines[1].split() == ["1", "6.000000", "6.000001", "-1.0e-06"]
    assert lines[11].split() == ["40", "0.150000", "-", "-"]
    png = (tmp_path / "out" / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000


def test_an_output_that_cannot_be_written_is_named(tmp_path, capsys, monkeypatch):
    write_metrics(tmp_path / "run", [(1, 3.0)])
    (tmp_path / "a.txt").write_text("text")
    planned = str(Path(QUICKSTART).with_name("gpt3_2.7b_16gpus.yaml"))
    for words in (["plot", "run"], ["report", "run"], ["plan", planned], ["data", "build", "a.txt"]):
        assert cli.main([*words, "-o", "a.txt/there/out"]) == 2
        assert capsys.readouterr().err == "megatron-attn2d: a.txt/there: Not a directory\n"
    with pytest.raises(NotADirectoryError):
        cli.main(["plot", "run", "-o", "a.txt/there/out", "--debug"])
    monkeypatch.setenv("RANK", "0")  # a rank's traceback tells where training was
    with pytest.raises(NotADirectoryError):
        cli.main(["plot", "run", "-o", "a.txt/there/out"])


def test_table_of_more_runs_has_no_difference():
    curves = [Curve(name, {1: 2.0, 2: 1.0}) for name in "abc"]
    assert table(curves).splitlines()[0].split() == ["step", "a", "b", "c"]


def test_curves_of_a_run_that_was_resumed_or_killed(tmp_path):
    run_dir = write_metrics(tmp_path / "run", [(1, 3.0), (2, 2.0), (2, 2.5)], tail='{"step": 3, "lo')
    assert read_curve(run_dir) == Curve("run", {1: 3.0, 2: 2.5})
    draw([read_curve(run_dir)], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "metrics.jsonl: No such file or directory; give the directory of a run that has made a step"),
        ("", "metrics.jsonl: no step in it yet"),
        ('{"step": 1}\n{"step": 2, "loss": 1}\n', "metrics.jsonl, line 1: not a step ('loss')"),
    ],
)
def test_plot_refuses_what_is_no_run(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UsageError, match=re.escape(message)):
        read_curve(tmp_path)
