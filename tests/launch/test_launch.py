"""The launcher: what ranks are told, and how they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_attn2d.launch import ranks
from tests.launch import targets
from tests.megatron import runs


def start(target: str, nprocs: int, *args: object, **environment: str) -> subprocess.Popen[str]:
    """Starts the launcher in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.launch.targets", target, str(nprocs), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def wait_for(directory: Path, names: list[str], timeout: float = 60) -> None:
    """Waits until the files are there."""
    deadline = time.monotonic() + timeout
    while not all((directory / name).exists() for name in names):
        assert time.monotonic() < deadline, f"{names} not in {list(directory.iterdir())}"
        time.sleep(0.02)


def assert_gone(directory: Path) -> None:
    """Asserts that the ranks that wrote their process ids into the directory have ended."""
    for file in directory.glob("[0-9]"):
        deadline = time.monotonic() + 10
        while Path("/proc", file.read_text()).exists():
            assert time.monotonic() < deadline, f"rank {file.name} still runs"
            time.sleep(0.02)


@pytest.mark.parametrize("limit", ["5", "5,2"])  # OpenMP's list: a number for each level of nesting
def test_ranks_get_torchruns_variables_and_a_share_of_the_cores(limit: str, tmp_path: Path) -> None:
    process = start("write_environment", 3, tmp_path, OMP_NUM_THREADS=limit)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    told = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [ranks[:5] for ranks in told] == [[str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)]
    assert len({port for *_, port, _ in told}) == 1
    assert {threads for *_, threads in told} == {limit}


@pytest.mark.parametrize(
    ("target", "code", "message"),
    [
        ("raise_in_rank_1", 1, "rank 1 of 4 failed; the other ranks were stopped\nTraceback"),
        ("misuse_in_rank_1", 1, "rank 1 of 4 failed; the other ranks were stopped\none message\n"),
        ("vanish_in_rank_1", 128 + 9, "rank 1 of 4 was ended by SIGKILL; the other ranks were stopped"),
        ("exit_in_rank_1", 7, "rank 1 of 4 exited with 7; the other ranks were stopped"),
    ],
)
def test_when_a_rank_fails_the_others_end_and_the_cause_is_shown(
    target: str, code: int, message: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    process = start(target, 4, tmp_path)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 30, "the others sleep for a minute"
    assert process.returncode == code
    assert err.startswith(message)
    assert "consequence" not in err
    assert ("KeyError: 'the cause'" in err) == (target == "raise_in_rank_1")
    assert_gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_ranks_save(number: signal.Signals, tmp_path: Path) -> None:
    process = start("save_on_sigterm", 3, tmp_path)
    wait_for(tmp_path, ["0", "1", "2"])
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(list(tmp_path.glob("saved-*"))) == 3


def test_a_signal_to_the_whole_group_lets_the_ranks_save(tmp_path: Path) -> None:
    process = start("save_on_sigterm", 3, tmp_path)
    wait_for(tmp_path, ["0", "1", "2"])
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(list(tmp_path.glob("saved-*"))) == 3


def test_ranks_that_save_nothing_end_at_the_first_signal(tmp_path: Path) -> None:
    process = start("sleep", 2, tmp_path)
    wait_for(tmp_path, ["0", "1"])
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 128 + 15
    assert_gone(tmp_path)


def test_a_gpu_rank_forks_its_data_loaders(tmp_path: Path) -> None:
    assert ranks.run_local(1, targets.write_start_method, [str(tmp_path / "method")], "cuda") == 0
    assert (tmp_path / "method").read_text() == "fork"


def test_a_second_signal_kills_ranks_that_take_too_long(tmp_path: Path) -> None:
    process = start("save_on_sigterm", 2, tmp_path)
    wait_for(tmp_path, ["0", "1"])
    process.terminate()
    time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 128 + 9
    assert not list(tmp_path.glob("saved-*"))


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    process = start("sleep", 2, tmp_path)
    wait_for(tmp_path, ["0", "1"])
    process.kill()
    process.wait(timeout=30)
    assert_gone(tmp_path)


def test_sigterm_during_training_saves_and_the_next_launch_resumes(tmp_path: Path) -> None:
    checkpoint, run = tmp_path / "checkpoint", tmp_path / "run"
    args = runs.arguments(
        run_dir=run,
        mock_data=True,
        num_layers=1,
        train_iters=100_000,
        exit_signal_handler=True,
        save=checkpoint,
        load=checkpoint,
        **runs.context_parallel("attention2d", 1, 2),
    )
    process = start("pretrain", 2, *args)
    wait_for(run, ["metrics.jsonl"], timeout=120)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    steps = len(runs.metrics(run))
    assert f"saved step {steps} to {checkpoint}" in out

    process = start("pretrain", 2, *args, "--exit-interval", steps + 1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"resumed after step {steps}" in out
    assert [step["step"] for step in runs.metrics(run)] == list(range(1, steps + 2))
