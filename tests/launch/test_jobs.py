"""Jobs as Slurm would run them, on stubs of its commands: the batch file is the real one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.cluster import submit, wait_until, with_ranks

ROOT = Path(__file__).parents[2]


def losses(directory):
    return [(s["step"], s["loss"]) for s in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())]


def steps_in(metrics):
    return metrics.read_text().count("\n") if metrics.exists() else 0


def test_a_job_preempted_twice_ends_with_the_losses_of_an_undisturbed_run(cluster, capsys):
    assert submit(cluster, "--nodes", "2") == 0
    directory = Path("runs/job").absolute()
    log = directory / f"slurm-{cluster.job_id}.log"
    assert capsys.readouterr().out == f"job {cluster.job_id}: {directory}/jobs/001/job.sbatch\nlog: {log}\n"
    stopped_at = []

    def preempt(attempt, batch):
        metrics = directory / "metrics.jsonl"
        done = steps_in(metrics)
        if attempt < 2:
            wait_until(lambda: batch.poll() is not None or steps_in(metrics) >= done + 3, "no steps")
            batch.terminate()
            batch.wait(timeout=240)
            stopped_at.append(losses(directory)[-1][0])

    assert cluster.run(preempt) == 0
    text = log.read_text()
    assert 0 < stopped_at[0] < stopped_at[1] < 60, text
    assert [int(step) for step in re.findall(r"nodes from step (\d+) of 60", text)] == [0, *stopped_at]
    assert [int(step) for step in re.findall(r"resumed after step (\d+)", text)] == stopped_at
    assert text.count("asked to stop: ranks save and exit") == 2
    assert "finished: step 60 of 60" in text
    assert (directory / "finished").exists()

    environ = {name: value for name, value in os.environ.items() if name != "PATH"} | {"PATH": os.defpath}
    command = [sys.executable, "-m", "megatron_attn2d.cli", "train", "run.yaml", "run.dir=undisturbed"]
    subprocess.run(command, check=True, env=environ | {"PYTHONPATH": str(ROOT)}, timeout=240, capture_output=True)
    assert losses(directory) == losses(Path("undisturbed"))
    assert len(losses(directory)) == 60

    assert cluster.run() == 0  # Slurm may start a job once more
    assert "nothing to do" in log.read_text()
    assert submit(cluster, "--nodes", "2") == 2
    assert "this run has finished" in capsys.readouterr().err


TRACKER = "runs/job/checkpoints/latest_checkpointed_iteration.txt"


def attempts(cluster):
    return cluster.log().read_text().count(": start ")


def test_a_job_that_fails_without_progress_stops_after_so_many_times(cluster):
    assert submit(cluster, "--nodes", "1", "slurm.max_failures=4", with_ranks(cluster, "exit 7")) == 0
    assert cluster.run() == 1
    assert attempts(cluster) == 4
    assert "failed with exit code 7 after step 0, 4 of at most 4 in a row" in cluster.log().read_text()
    assert cluster.run() == 1  # submitted again as it is: once
    assert attempts(cluster) == 5


def test_a_new_checkpoint_starts_the_count_again(cluster):
    Path(TRACKER).parent.mkdir(parents=True)
    ranks = f'echo >>"$STUBS/tries"; mapfile -t n <"$STUBS/tries"; ((${{#n[@]}} == 3)) && echo 8 >{TRACKER}; exit 1'
    assert submit(cluster, "--nodes", "1", "slurm.max_failures=3", with_ranks(cluster, ranks)) == 0
    assert cluster.run() == 1
    assert attempts(cluster) == 5
    assert re.findall(r"(\d) of at most 3", cluster.log().read_text()) == ["1", "2", "1", "2", "3"]


def test_ranks_that_end_well_without_a_step_are_a_failure(cluster):
    assert submit(cluster, "--nodes", "1", "slurm.max_failures=2", with_ranks(cluster, "exit 0")) == 0
    assert cluster.run() == 1
    assert attempts(cluster) == 2


RANK = """
trap ': >"$STUBS/torchrun-signalled"' TERM
export TORCHELASTIC_RUN_ID=none
bash -c 'trap "exit 0" TERM; : >"$STUBS/ready-$SLURM_NODEID"; for _ in {1..2000}; do sleep 0.05; done' &
wait
"""


# Runs a command in a container: keeps the signals that reach it to itself.
APPTAINER = '#!/bin/bash\nprintf "%s\\n" "$@" >"$STUBS/apptainer-arguments"\nshift 6\n"$@"\nexit\n'


@pytest.mark.parametrize("container", [[], ["slurm.container_image=a.sif", "slurm.container_runtime=apptainer"]])
def test_preemption_is_no_failure_and_reaches_the_ranks_but_not_torchrun(cluster, container):
    (cluster.bin / "sleep").symlink_to("/bin/sleep")
    cluster.environ["TORCHELASTIC_RUN_ID"] = "of the shell that submitted"
    cluster.executable(cluster.bin / "apptainer", APPTAINER)
    Path(TRACKER).parent.mkdir(parents=True)
    assert submit(cluster, "--nodes", "2", "slurm.max_failures=1", with_ranks(cluster, RANK), *container) == 0
    ready = [cluster.root / "ready-0", cluster.root / "ready-1"]

    def preempt(attempt, batch):
        wait_until(lambda: all(path.exists() for path in ready), "no ranks")
        for path in ready:
            path.unlink()
        if attempt:  # the first time there was nothing to save
            Path(TRACKER).write_text(f"{30 * attempt}\n")
        batch.terminate()

    assert cluster.run(preempt) == 0
    assert attempts(cluster) == 3
    assert not (cluster.root / "torchrun-signalled").exists()
    assert Path("runs/job/failures").read_text() == "0\n"
    if container:
        workdir, directory = Path.cwd(), Path("runs/job").absolute()
        options = ["--bind", f"{workdir}:{workdir},{directory}:{directory}", "--pwd", str(workdir)]
        given = (cluster.root / "apptainer-arguments").read_text().splitlines()
        assert given[:8] == ["exec", *options, "a.sif", str(cluster.root / "python"), "-m"]


def test_a_stop_before_there_are_ranks_reaches_torchrun_behind_a_wrapper(cluster):
    (cluster.bin / "sleep").symlink_to("/bin/sleep")
    ranks = """trap 'exit 0' TERM; : >"$STUBS/ready"; for _ in {1..2000}; do sleep 0.05; done"""
    inner = with_ranks(cluster, ranks).removeprefix("slurm.python=")
    wrapper = cluster.executable(cluster.root / "wrapper", f'#!/bin/bash\ntrap "" TERM\n{inner} "$@"\nexit\n')
    assert submit(cluster, "--nodes", "1", f"slurm.python={wrapper}") == 0
    (cluster.root / "state").write_text("CANCELLED None\n")

    def stop(attempt, batch):
        wait_until((cluster.root / "ready").exists, "no torchrun")
        batch.terminate()

    assert cluster.run(stop) == 0
    assert "cancelled" in cluster.log().read_text()


STATES = {
    "COMPLETING None": 1,  # cancelled, or pre-empted and queued again by Slurm
    "CANCELLED None": 1,
    "COMPLETING TimeLimit": 2,  # saving took longer than the grace
    "SIGNALING None": 2,  # TERM is still on its way to the tasks
    "": 2,  # squeue fails
}


@pytest.mark.parametrize("state", STATES)
def test_a_cancelled_job_is_not_queued_again(cluster, state):
    (cluster.bin / "sleep").symlink_to("/bin/sleep")
    Path(TRACKER).parent.mkdir(parents=True)
    assert submit(cluster, "--nodes", "1", with_ranks(cluster, RANK)) == 0
    if state:
        (cluster.root / "state").write_text(f"{state}\n")
    else:
        cluster.executable(cluster.bin / "squeue", "#!/bin/bash\nexit 1\n")
    for counter in ("failures", "stops"):
        Path(f"runs/job/{counter}").write_text("2\n")

    def stop(attempt, batch):
        wait_until((cluster.root / "ready-0").exists, "no rank")
        (cluster.root / "ready-0").unlink()
        Path(TRACKER).write_text(f"{30 * (attempt + 1)}\n")
        batch.terminate()

    assert cluster.run(stop) == 0
    assert attempts(cluster) == STATES[state], cluster.log().read_text()
    assert ("cancelled" in cluster.log().read_text()) == (STATES[state] == 1)
    assert [Path(f"runs/job/{counter}").read_text() for counter in ("failures", "stops")] == ["0\n", "0\n"]


def test_a_cancelled_job_that_saved_nothing_is_no_failure(cluster):
    (cluster.root / "state").write_text("COMPLETING None\n")
    assert submit(cluster, "--nodes", "1", "slurm.max_failures=1", with_ranks(cluster, "exit 1")) == 0
    assert cluster.run() == 0
    assert Path("runs/job/failures").read_text() == "0\n"


def test_a_job_stopped_without_progress_stops_after_so_many_times(cluster):
    """Nothing is saved: no space, too short a grace."""
    (cluster.bin / "sleep").symlink_to("/bin/sleep")
    Path(TRACKER).parent.mkdir(parents=True)
    ranks = RANK.replace("exit 0", "exit 3").replace("\nwait\n", "\nwait $!\n")
    assert submit(cluster, "--nodes", "2", "slurm.max_failures=2", with_ranks(cluster, ranks)) == 0
    ready = [cluster.root / "ready-0", cluster.root / "ready-1"]

    def stop(attempt, batch):
        wait_until(lambda: all(path.exists() for path in ready), "no ranks")
        for path in ready:
            path.unlink()
        if attempt == 1:  # begins the count again
            Path(TRACKER).write_text("8\n")
        batch.terminate()

    assert cluster.run(stop) == 1
    text = cluster.log().read_text()
    assert attempts(cluster) == 5
    assert re.findall(r"after step (\d+), (\d) of at most 3 in a row", text) == [("0", "1"), *(("8", n) for n in "123")]
    for node in (0, 1):
        assert f"node {node}: asked to stop, the ranks ended with exit code 3" in text
    assert f"giving up; fix the cause, remove {Path('runs/job').absolute()}/stops and submit again" in text
    assert Path("runs/job/failures").read_text() == "0\n"


def test_a_job_that_cannot_count_is_not_queued_again(cluster):
    assert submit(cluster, "--nodes", "1", with_ranks(cluster, "exit 1")) == 0
    Path("runs/job/stops").mkdir()
    assert cluster.run() == 1
    assert f"giving up: {Path('runs/job').absolute()} can't be written to" in cluster.log().read_text()


def test_the_time_limit_of_a_site_that_signals_the_tasks_alone(cluster):
    """The batch script hears nothing: it sees ranks that end well, with progress."""
    (cluster.bin / "sleep").symlink_to("/bin/sleep")
    Path(TRACKER).parent.mkdir(parents=True)
    assert submit(cluster, "--nodes", "1", "slurm.max_failures=1", with_ranks(cluster, RANK)) == 0

    def preempt(attempt, batch):
        wait_until((cluster.root / "ready-0").exists, "no rank")
        (cluster.root / "ready-0").unlink()
        Path(TRACKER).write_text(f"{30 * (attempt + 1)}\n")
        subprocess.run(["scancel", "--signal=TERM", str(cluster.job_id)], check=True, env=cluster.environ)

    assert cluster.run(preempt) == 0
    assert attempts(cluster) == 2
