"""`train`: who starts the ranks, and what a run that has begun does."""

import os
import time
from pathlib import Path

import pytest

from megatron_attn2d import cli
from megatron_attn2d.config import ConfigError, load_run, resolved_yaml
from megatron_attn2d.launch import environment
from megatron_attn2d.run import lock

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "runs" / "quickstart.yaml")


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
