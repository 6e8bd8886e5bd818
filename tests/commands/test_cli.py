"""The command as a user types it."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_attn2d import cli
from megatron_attn2d.config import load_run

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "runs" / "quickstart.yaml")


def command(*args, **environ):
    return subprocess.run(
        [sys.executable, "-m", "megatron_attn2d.cli", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environ,
    )


def test_dry_run_prints_yaml_arguments_and_grid_and_starts_nothing(tmp_path):
    result = command("train", QUICKSTART, "training.train_iters=7", "--dry-run", "run.name=mine")
    assert (result.returncode, result.stderr) == (0, "")
    run, arguments, grid, memory, stock = re.split(r"^# .*\n", result.stdout, flags=re.M)[1:]
    assert "  train_iters: 7\n" in run
    assert "  name: mine\n" in run
    assert "--train-iters 7\n" in arguments
    assert "--cp-comm-type attention2d\n--hierarchical-context-parallel-sizes 2 2\n" in arguments
    assert (
        grid
        == """\
8 ranks = pipeline 2 x data 1 x context 4 x tensor 1
attention2d on 2 rows x 2 columns: a row gathers its queries, a column its keys and values

pipeline stage 0, replica 0:
            column 0  column 1
    row 0          0         2
    row 1          1         3

pipeline stage 1, replica 0:
            column 0  column 1
    row 0          4         6
    row 1          5         7

"""
    )
    assert memory.startswith("0.869 M parameters; the fullest rank, estimated:\n       weights ")
    assert memory.count(" MiB\n") == 10  # a part per line, and their sum
    assert stock == "none: Megatron-LM needs GPUs (environment.device=cuda)\n"
    assert not list(tmp_path.iterdir())


def test_the_resolved_yaml_of_a_dry_run_is_a_run(tmp_path):
    printed = command("train", QUICKSTART, "--dry-run").stdout
    (tmp_path / "resolved.yaml").write_text(printed.partition("# Megatron")[0])
    assert load_run(tmp_path / "resolved.yaml") == load_run(QUICKSTART)


def test_a_mistake_is_one_message_without_a_traceback(tmp_path):
    result = command("train", QUICKSTART, "context_parallel.grid=[3, 2]")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "megatron-attn2d: context_parallel.grid = [3, 2]: 6 ranks, but context_parallel.size is 4; "
        "choose auto or one of [4, 1], [2, 2], [1, 4]\n"
    )
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback():
    result = command("train", QUICKSTART, "model.num_layers=x", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_versions_are_those_of_the_package_and_of_what_it_rests_on(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"megatron-attn2d {project['version']}"
    assert f"megatron-core {importlib.metadata.version('megatron-core')}" in lines


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["train"], "the following arguments are required: RUN.yaml"),
        (["tarin", "x"], "invalid choice: 'tarin'"),
        (["train", QUICKSTART, "--dryrun"], "unrecognized arguments: --dryrun"),
        (["plot", "a", "--dry-run"], "unrecognized arguments: --dry-run"),
    ],
)
def test_wrong_usage(args, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_names_its_neighbours(capsys):
    assert cli.main(["train", str(Path(QUICKSTART).with_name("quick.yaml"))]) == 2
    error = capsys.readouterr().err
    assert "quick.yaml: No such file or directory; there are " in error
    assert "quickstart.yaml" in error
