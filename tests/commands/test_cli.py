import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from megatron_attn2d import cli
from megatron_attn2d.config import ConfigError, load_run, resolved_yaml
from megatron_attn2d.errors import UsageError
from megatron_attn2d.launch import environment
from megatron_attn2d.preview.topology import context_group, picture
from megatron_attn2d.run import lock
from megatron_attn2d.run.curves import Curve, draw, read_curve, table

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "runs" / "quickstart.yaml")


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No launcher's environment, and a scratch directory to write to."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_")) or name in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


# --- as a user types it ---


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


# --- who starts the ranks ---


@pytest.fixture
def started(monkeypatch):
    """Records the launches instead of making them."""
    from megatron_attn2d.data import indexed
    from megatron_attn2d.launch import ranks
    from megatron_attn2d.training import pretrain_gpt

    calls = []
    monkeypatch.setattr(indexed, "build_default", lambda directory: calls.append(("data", directory)))
    monkeypatch.setattr(pretrain_gpt, "main", lambda arguments: calls.append(("rank", arguments)))
    monkeypatch.setattr(
        ranks,
        "run_local",
        lambda nprocs, target, args, device: calls.append(("local", nprocs, target, args, device)) or 3,
    )
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(environment.apply_variables, "__defaults__", (os.environ,))
    monkeypatch.setattr(environment.adopt_launcher, "__defaults__", (os.environ,))
    monkeypatch.setattr(environment.launched_world_size, "__defaults__", (os.environ,))
    monkeypatch.setattr(environment.local_rank, "__defaults__", (os.environ,))
    return calls


def test_alone_it_starts_the_ranks_and_returns_their_exit_code(started, tmp_path):
    from megatron_attn2d.training import pretrain_gpt

    assert cli.main(["train", QUICKSTART, "data.dir=there"]) == 3
    assert started[0] == ("data", "there")
    kind, nprocs, target, arguments, device = started[1]
    assert (kind, nprocs, target, device) == ("local", 8, pretrain_gpt.main, "cpu")
    assert arguments[arguments.index("--run-dir") + 1] == "runs/quickstart"
    assert load_run(tmp_path / "runs" / "quickstart" / "config.yaml", []).data.dir == "there"
    assert {path.name for path in (tmp_path / "runs" / "quickstart").iterdir()} == {"config.yaml", lock.NAME}
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_what_is_left_of_a_training_is_waited_for(tmp_path, capsys):
    """A process that loads data, say, which a killed rank leaves behind for some seconds."""
    with lock.held(tmp_path):
        left = os.fork()
        if not left:
            time.sleep(1)
            os._exit(0)
    with lock.held(tmp_path):
        assert os.waitpid(left, 0)[1] == 0
    assert f"another training writes there (process {os.getpid()} on " in capsys.readouterr().err


@pytest.mark.parametrize(
    "launched", [{}, {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}]
)
def test_a_second_training_in_a_directory_is_refused(started, launched, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_S", 0.5)
    run_dir = tmp_path / "runs" / "quickstart"
    run_dir.mkdir(parents=True)
    os.environ.update(launched)
    with lock.held(run_dir):
        assert cli.main(["train", QUICKSTART, "data.dir=there", "checkpoint.save=true"]) == 2
    assert f"another training writes there (process {os.getpid()} on " in capsys.readouterr().err
    assert not started
    assert not (run_dir / "config.yaml").exists()
    assert cli.main(["train", QUICKSTART, "data.dir=there"]) == (0 if launched else 3)


def test_under_torchrun_it_is_one_rank(started):
    os.environ.update(RANK="3", WORLD_SIZE="16", LOCAL_RANK="3", MASTER_ADDR="node07", MASTER_PORT="29500")
    assert cli.main(["train", QUICKSTART]) == 0
    assert [call[0] for call in started] == ["data", "rank"]
    assert not Path("runs/quickstart/config.yaml").exists()  # rank 0 writes it


def test_under_torchrun_the_world_must_fit(started, capsys):
    os.environ.update(RANK="0", WORLD_SIZE="12", LOCAL_RANK="0")
    assert cli.main(["train", QUICKSTART]) == 2
    assert "world size = 12: not a multiple of tensor * pipeline * context = 1 * 2 * 4" in capsys.readouterr().err
    assert started == []


def test_under_srun_it_is_one_rank_with_torchs_variables(started, tmp_path, monkeypatch):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[07-08]" ] && printf "node07\\nnode08\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    os.environ.update(
        SLURM_PROCID="5",
        SLURM_NTASKS="8",
        SLURM_LOCALID="1",
        SLURM_STEP_ID="0",
        SLURM_JOB_NODELIST="node[07-08]",
        SLURM_JOB_ID="1234567",
    )
    assert cli.main(["train", QUICKSTART]) == 0
    assert [call[0] for call in started] == ["data", "rank"]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["5", "8", "1", "node07", str(20000 + 1234567 % 20000)]


@pytest.fixture
def saved(tmp_path):
    """What a checkpoint of step 60, the quick start's last, leaves behind."""
    folder = tmp_path / "runs" / "quickstart" / "checkpoints" / "iter_0000060"
    folder.mkdir(parents=True)
    for name in ("metadata.json", ".metadata"):
        (folder / name).touch()
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("60")
    (folder / "config.yaml").write_text(resolved_yaml(load_run(QUICKSTART)))


def test_a_finished_run_says_so_and_starts_nothing(started, saved, capsys):
    assert cli.main(["train", QUICKSTART]) == 0
    assert [call[0] for call in started] == ["data"]
    assert capsys.readouterr().out == "step 60 of 60 is saved: nothing to do\n"
    for rank, told in (("0", "step 60 of 60 is saved: nothing to do\n"), ("3", "")):
        os.environ.update(RANK=rank, WORLD_SIZE="8", LOCAL_RANK=rank, MASTER_ADDR="node07", MASTER_PORT="29500")
        assert cli.main(["train", QUICKSTART]) == 0
        assert capsys.readouterr().out == told
    assert "rank" not in [call[0] for call in started]


def test_options_of_the_first_start_are_left_out_once_there_is_a_checkpoint(started, saved, capsys):
    more = ["checkpoint.load=theirs", "megatron_args.ckpt_step=3", "megatron_args.no_load_optim=true"]
    assert cli.main(["train", QUICKSTART, *more]) == 0
    assert capsys.readouterr().out == (
        "left out, as the run goes on from its own step 60, not from its first start: checkpoint.load, "
        "megatron_args.ckpt_step, megatron_args.no_load_optim\nstep 60 of 60 is saved: nothing to do\n"
    )
    assert cli.main(["train", QUICKSTART, *more, "megatron_args.skip_train=true"]) == 3
    arguments = started[-1][3]
    assert not {"--ckpt-step", "--no-load-optim", "theirs"} & set(arguments)


def test_a_change_that_is_allowed_is_told_with_what_repeats(started, saved, tmp_path, capsys, monkeypatch):
    from megatron_attn2d.data import order

    asked = []
    monkeypatch.setattr(order, "describe", lambda *given: asked.append(given) or "half of it repeats")
    more = ["training.seed=3", "model.hidden_dropout=0.1", "training.train_iters=61"]
    assert cli.main(["train", QUICKSTART, *more]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
    allowed = "checkpoint.may_change=[training.seed, model.hidden_dropout, training.train_iters]"
    assert cli.main(["train", QUICKSTART, *more, allowed]) == 3
    assert capsys.readouterr().out == (
        "changed, as checkpoint.may_change allows: model.hidden_dropout 0.0 -> 0.1, training.train_iters 60 -> 61, "
        "training.seed 1234 -> 3\nhalf of it repeats\n"
    )
    ((before, now, step),) = asked
    assert (before.training.seed, now.training.seed, step) == (1234, 3, 60)
    (config,) = (tmp_path / "runs/quickstart/checkpoints").glob("*/config.yaml")
    config.write_text("of: another version")
    assert cli.main(["train", QUICKSTART]) == 0
    assert "no config.yaml of this version, so that what has changed since is not looked" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    [
        ["training.train_iters=61", "checkpoint.may_change=[training.train_iters]"],
        ["megatron_args.skip_train=true"],
    ],
)
def test_with_something_left_to_do_a_run_starts(started, saved, more):
    assert cli.main(["train", QUICKSTART, *more]) == 3


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # the batch script itself
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, None),  # an interactive shell
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, 8),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, 4),
    ],
)
def test_who_has_started_ranks(environ, ranks):
    assert environment.launched_world_size(environ) == ranks


def test_more_ranks_than_devices_are_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    environment.check_devices("cpu", 8)
    environment.check_devices("cuda", 4)
    with pytest.raises(ConfigError, match=r"environment.device = 'cuda': 8 ranks on this machine, which has 4 CUDA"):
        environment.check_devices("cuda", 8)


# --- the picture ---


def test_ranks_of_the_picture_are_megatrons():
    """Megatron's own generator of rank groups is the reference."""
    from megatron.core.parallel_state import RankGenerator

    sizes = ["parallelism.tensor=2", "parallelism.data=2", "training.global_batch_size=16"]
    for order, extra in (("tp-cp-ep-dp-pp", []), ("tp-cp-ep-pp-dp", ["megatron_args.use_tp_pp_dp_mapping=true"])):
        run = load_run(QUICKSTART, [*sizes, *extra])
        groups = RankGenerator(tp=2, ep=1, dp=2, pp=2, cp=4, order=order).get_ranks("cp")
        ours = [context_group(run, stage, replica) for stage in range(2) for replica in range(2)]
        assert sorted(ours) == sorted(group for group in groups if group[0] % 2 == 0)


def test_rows_and_columns_of_the_picture_are_megatrons_hierarchical_groups(monkeypatch):
    from megatron.core import parallel_state

    groups = {"HIERARCHICAL_CP_L0": [], "HIERARCHICAL_CP_L1": []}
    monkeypatch.setattr(parallel_state, "create_group", lambda ranks, group_desc, **_: groups[group_desc].append(ranks))
    parallel_state.create_hierarchical_groups(-1, list(range(6)), [3, 2], group_desc="CP")
    run = load_run(QUICKSTART, ["context_parallel.size=6", "context_parallel.grid=[3, 2]", "training.seq_length=516"])
    lines = picture(run).splitlines()
    rows = [[int(cell) for cell in line.split()[2:]] for line in lines if line.startswith("    row")][:3]
    columns = [list(column) for column in zip(*rows, strict=True)]
    assert columns == groups["HIERARCHICAL_CP_L0"] == [[0, 1, 2], [3, 4, 5]]  # contiguous groups of R gather K/V
    assert rows == groups["HIERARCHICAL_CP_L1"] == [[0, 3], [1, 4], [2, 5]]  # strided groups of C gather Q


def test_large_pictures_are_cut_and_tensor_ranks_share_a_cell():
    text = picture(load_run(QUICKSTART, ["parallelism.data=4", "parallelism.tensor=2"]))
    assert "... and 4 more" in text
    assert text.count("pipeline stage") == 4
    assert "    row 0        0-1       4-5\n" in text


@pytest.mark.parametrize("mode", ["ring", "all_gather"])
def test_other_modes_are_lines(mode):
    assert "\n    0  1  2  3\n" in picture(load_run(QUICKSTART, [f"context_parallel.mode={mode}"]))


# --- plots ---


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
