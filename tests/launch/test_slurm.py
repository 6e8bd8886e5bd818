"""Jobs as Slurm would run them, on stubs of its commands: the batch file is the real one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_attn2d import cli
from megatron_attn2d.config import load_run
from megatron_attn2d.launch.slurm import _seconds, render
from tests.launch.cluster import Cluster, wait_until

ROOT = Path(__file__).parents[2]
NASTY = """it's "$(touch pwned)" `touch pwned`; touch pwned & %j \\ #x*"""

RUN = """
extends: {root}/configs/clusters/cpu.yaml
run: {{name: job, dir: {dir}}}
model: {{num_layers: 1, hidden_size: 32, num_attention_heads: 2, position_embedding_type: rope}}
context_parallel: {{size: 2}}
data: {{mock: true, vocab_size: 512, null_tokenizer_eod_id: 256}}
optimizer: {{lr: 1e-3, lr_decay_style: constant}}
training: {{train_iters: 60, seq_length: 32, global_batch_size: 2}}
"""
# Stands for torchrun: tells what it was given, then does what the test says.
PYTHON = '#!/bin/bash\nprintf "%s\\n" "$@" >"$STUBS/given-$SLURM_NODEID"\nsource "$STUBS/ranks"\n'
# Tells what reached it and fails, but not before the other node's task was started: srun ends that one on a failure.
FAILING_RANKS = """echo "$FROM_SETUP $PYTHONPATH" >"$STUBS/environment"
for _ in {1..300}; do [[ -s $STUBS/given-0 && -s $STUBS/given-1 ]] && break; sleep 0.1; done
exit 1
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
            monkeypatch.delenv(name)
    stubs = Cluster(tmp_path)
    for name, value in stubs.environ.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return stubs


def submit(cluster, *args, directory="runs/job"):
    path = Path("run.yaml")
    path.write_text(RUN.format(root=ROOT, dir=json.dumps(directory)))
    return cli.main(["submit", str(path), *args])


def with_ranks(cluster, script):
    """The override that has `script`, in bash, run in place of torchrun."""
    (cluster.root / "ranks").write_text(script)
    return f"slurm.python={cluster.executable(cluster.root / 'python', PYTHON)}"


def losses(directory):
    return [(s["step"], s["loss"]) for s in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())]


def steps_in(metrics):
    return metrics.read_text().count("\n") if metrics.exists() else 0


# --- with real ranks ---


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


# --- with a stand-in for torchrun ---

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


# --- names and paths ---


def test_nothing_that_a_path_holds_is_run(cluster):
    """Directories, image, interpreter and option values that a shell would love to expand."""
    nasty = cluster.root / "work" / NASTY
    nasty.mkdir()
    (nasty / "setup.sh").write_text('export FROM_SETUP="$UNSET yes"\n')
    python = cluster.executable(nasty / "python", PYTHON)
    (cluster.root / "ranks").write_text(FAILING_RANKS)
    overrides = {
        "slurm.python": str(python),
        "slurm.setup": f"{NASTY}/setup.sh",
        "slurm.container_image": f"/images/{NASTY}.sqsh",
        "slurm.container_mounts": [f"/data {NASTY}:/data:ro"],
        "slurm.sbatch": {"comment": NASTY, "account": "a,b"},
        "slurm.srun": {"mpi": NASTY, "cpus-per-task": 4, "unbuffered": None, "overlap": True},
        "slurm.max_failures": 1,
    }
    assert (
        submit(
            cluster,
            "--nodes",
            "2",
            *(f"{key}={json.dumps(value)}" for key, value in overrides.items()),
            directory=NASTY,
        )
        == 0
    )
    options = cluster.options()
    assert options["comment"] == NASTY
    assert cluster.log() == nasty / f"slurm-{cluster.job_id}.log"
    assert cluster.run() == 1
    assert not list(cluster.root.rglob("pwned"))

    workdir, job = str(cluster.root / "work"), nasty / "jobs" / "001"
    given = (cluster.root / "given-1").read_text().splitlines()
    port = 20000 + cluster.job_id % 20000
    launcher = f"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr localhost --master-port {port}"
    assert given[:-1] == f"{launcher} --node-rank 1 -m megatron_attn2d.cli train".split()
    assert given[-1] == str(job / "config.yaml")
    assert (cluster.root / "environment").read_text() == f" yes {job}/code\n"
    given = (cluster.root / "srun-arguments").read_text().splitlines()
    assert given[:6] == [
        *("--export=ALL", "--kill-on-bad-exit=1", "--cpu-bind=none"),
        *(f"--mpi={NASTY}", "--cpus-per-task=4", "--overlap"),
    ]
    assert f"--container-image=/images/{NASTY}.sqsh" in given
    mounts = f"{workdir}:{workdir},{nasty}:{nasty},/data {NASTY}:/data:ro"
    assert f"--container-mounts={mounts}" in given
    assert f"--container-workdir={workdir}" in given


def test_a_job_keeps_the_code_and_configuration_of_its_submission(cluster):
    assert submit(cluster, "--nodes", "2", "training.train_iters=9") == 0
    first = cluster.script.parent
    assert submit(cluster, "--nodes", "1") == 0
    assert (first.name, cluster.script.parent.name) == ("001", "002")
    run = load_run(first / "config.yaml")
    assert (run.training.train_iters, run.run.dir) == (9, str(Path("runs/job").absolute()))
    code = (first / "code" / "megatron_attn2d" / "cli.py").read_text()
    assert code == (ROOT / "megatron_attn2d" / "cli.py").read_text()
    assert (first / "code" / "megatron_attn2d" / "launch" / "job.sbatch").exists()


def test_the_ranks_get_our_code_whatever_the_job_exports(cluster):
    options = ("slurm.sbatch={export: NONE}", "slurm.max_failures=1")
    assert submit(cluster, "--nodes", "2", *options, with_ranks(cluster, FAILING_RANKS)) == 0
    assert cluster.run() == 1
    assert (cluster.root / "environment").read_text() == f" {cluster.script.parent}/code\n"


# --- the batch file ---

OPTIONS_OF_175B = """
#SBATCH --job-name=gpt3_175b_32k
#SBATCH --dependency=singleton
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
"""


def test_dry_run_prints_the_batch_file_and_leaves_nothing(cluster, capsys):
    path = str(ROOT / "configs" / "runs" / "gpt3_175b_32k.yaml")
    args = ['slurm.sbatch={partition: gpu, time: "1-00:00:00"}', "--dry-run", "slurm.container_image=/a.sqsh"]
    assert cli.main(["submit", path, *args]) == 0
    text = capsys.readouterr().out
    assert OPTIONS_OF_175B in text
    assert "#SBATCH --partition=gpu\n#SBATCH --time=1-00:00:00\n" in text
    assert "\npython=(python3)\nranks_per_node=8\ntrain_iters=70000\nmax_failures=3\n" in text
    assert not list(Path().iterdir())
    assert cli.main(["submit", path, *args, "--nodes", "128", "slurm.sbatch.exclusive=null"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --nodes=128\n" in text
    assert "exclusive" not in text


def test_the_example_is_what_is_rendered(monkeypatch):
    """scripts/slurm/README.md says how it was made."""
    overrides = ["run.dir=/shared/runs/gpt3_175b_32k", "slurm.container_image=/shared/images/megatron-attn2d.sqsh"]
    overrides += ["slurm.container_mounts=[/data:/data:ro]", "slurm.sbatch={partition: gpu, time: '1-00:00:00'}"]
    run = load_run(ROOT / "configs" / "runs" / "gpt3_175b_32k.yaml", overrides)
    script = render(run, 64, Path("/shared/runs/gpt3_175b_32k/jobs/001"), Path("/shared/megatron_attn2d"))
    assert (ROOT / "scripts" / "slurm" / "example.sbatch").read_text() == script


@pytest.mark.parametrize("container", [[], ["slurm.container_image=/images/attn2d.sqsh"]])
def test_shellcheck_is_content_with_the_batch_file(cluster, capsys, tmp_path, container):
    assert submit(cluster, "--nodes", "2", "--dry-run", *container) == 0
    (tmp_path / "job.sbatch").write_text(capsys.readouterr().out)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([shellcheck, tmp_path / "job.sbatch"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


DEPENDENCIES = {
    "afterok:5": "afterok:5,singleton",
    "afterok:5:6,afterany:7": "afterok:5:6,afterany:7,singleton",
    "singleton,afterok:5": "singleton,afterok:5",
}


@pytest.mark.parametrize("given", DEPENDENCIES)
def test_jobs_of_a_run_take_turns_beside_other_dependencies(cluster, given):
    assert submit(cluster, "--nodes", "2", f"slurm.sbatch.dependency={given}") == 0
    assert cluster.options()["dependency"] == DEPENDENCIES[given]


def test_ranks_that_only_fit_the_nodes_asked_for(cluster, capsys):
    gpus = ["environment.device=cuda", "environment.gpus_per_node=1", "training.precision=bf16"]
    assert submit(cluster, "--nodes", "2", "--dry-run", *gpus) == 0
    assert "\nranks_per_node=1\n" in capsys.readouterr().out
    assert submit(cluster, "--nodes", "3", "--dry-run", *gpus) == 2
    assert "world size = 3: not a multiple" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus_per_node", "replicas", "nodes"), [(1, "null", 2), (2, "null", 1), (8, "null", 1), (2, 4, 4)]
)
def test_nodes_follow_from_the_ranks(cluster, capsys, gpus_per_node, replicas, nodes):
    gpus = ["environment.device=cuda", f"environment.gpus_per_node={gpus_per_node}", "training.precision=bf16"]
    run = [f"parallelism.data={replicas}", "training.global_batch_size=8"]
    assert submit(cluster, "--dry-run", *gpus, *run, "slurm.container_image=i") == 0
    output, error = capsys.readouterr()
    assert f"\n#SBATCH --nodes={nodes}\n" in output
    assert f"--nodes {nodes} follows from the ranks of the run\n" in error


def test_files_that_are_missing_are_named_before_the_job_waits(cluster, capsys):
    args = ["--nodes", "1", "data.mock=false", "data.paths=[/nowhere/x]"]
    missing = "data.paths = '/nowhere/x': /nowhere/x.bin and /nowhere/x.idx are not"
    assert submit(cluster, *args) == 2
    assert missing in capsys.readouterr().err
    assert submit(cluster, *args, "--dry-run") == 0  # a host that doesn't see the data may still print the batch file
    output, error = capsys.readouterr()
    assert output.startswith("#!/bin/bash\n")
    assert error.startswith("megatron-attn2d: without --dry-run this is refused on this host:\ndata.paths = ")
    assert not Path("runs").exists()
    assert submit(cluster, *args, "slurm.container_image=i", "slurm.container_mounts=[/nowhere:/nowhere]") == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "there is no such file; name one that the nodes"), ("module load x\nif true\n", "bash can't read it (")],
)
def test_what_the_job_reads_first_is_checked_before_it_waits(cluster, capsys, text, reason):
    if text is not None:
        Path("site.sh").write_text(text)
    assert submit(cluster, "--nodes", "1", "slurm.setup=site.sh", "slurm.container_image=i") == 2
    assert f"slurm.setup = 'site.sh': {reason}" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_dry_run_with_the_embedded_data_makes_no_directory(cluster):
    assert submit(cluster, "--nodes", "1", "--dry-run", "data.mock=false") == 0
    assert [path.name for path in Path().iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("container", [[], ["slurm.container_image=i"]])
def test_a_directory_that_cannot_be_made(cluster, capsys, container):
    assert submit(cluster, "--nodes", "1", *container, directory="/proc/foo") == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-attn2d: run.dir = '/proc/foo': can't be ")
    assert error.endswith("(No such file or directory); choose another\n")


REFUSED = {
    "--nodes 0": "--nodes 0: must be at least 1",
    "--nodes 3": "--nodes 3: 2 ranks do not spread evenly over them",
    "training.train_iters=9": "on how many nodes? give --nodes, or environment.nodes in the YAML",
    "--nodes 1 checkpoint.save=false": (
        "checkpoint.save = false: a job that is queued again continues from its checkpoint; choose true"
    ),
    "--nodes 1 checkpoint.exit_signal_handler=false": "checkpoint.exit_signal_handler = false: a job ...",
    "--nodes 1 training.exit_interval=5": (
        "training.exit_interval = 5: a job goes on until training.train_iters; choose null"
    ),
    "--nodes 1 slurm.sbatch.signal=USR1": (
        "slurm.sbatch.signal = 'USR1': the batch file rests on this option; leave it out"
    ),
    "--nodes 1 slurm.sbatch.no-requeue=true": (
        "slurm.sbatch.no-requeue = true: the batch file rests on this option; leave it out"
    ),
    "--nodes 1 slurm.sbatch.time=5": (
        "slurm.sbatch.time = 5: 300 s, and slurm.grace_s = 300 s before the end, or up to 60 s earlier, ranks are told "
        "to save and exit: nothing would be trained; choose more time, or a smaller slurm.grace_s"
    ),
    "--nodes 1 slurm.sbatch.time=00:06:00": "slurm.sbatch.time = '00:06:00': 360 s, and slurm.grace_s = 300 s ...",
    "--nodes 1 slurm.grace_s=7200 slurm.sbatch.time-min=0-2": "slurm.sbatch.time-min = '0-2': 7200 s, ...",
    "--nodes 1 slurm.sbatch.dependency=afterok:5?afterok:6": (
        "slurm.sbatch.dependency = 'afterok:5?afterok:6': with ? one of them is enough, but this run's other jobs must "
        "always have ended; separate them by ,"
    ),
    "--nodes 1 megatron_args.no_such=1": "megatron_args.no_such: no argument of Megatron; ...",
    '--nodes 1 slurm.sbatch.comment="a\\nb"': "slurm.sbatch.comment = 'a\\nb': holds a line break; ...",
    "--nodes 1 slurm.sbatch={'a b': c}": "slurm.sbatch = {'a b': 'c'}: not options of sbatch; ...",
    "--nodes 1 slurm.srun={export: NONE}": (
        "slurm.srun.export = 'NONE': the batch file rests on this option; leave it out"
    ),
    "--nodes 1 slurm.srun={n: 4}": "slurm.srun.n = 4: not the long name of an option; write its long name",
    "--nodes 1 slurm.srun={--mpi: pmix}": "slurm.srun = {'--mpi': 'pmix'}: not options of srun; ...",
    "--nodes 1 slurm.container_mounts=[/a:/b]": (
        "slurm.container_mounts = ['/a:/b']: there is no container; choose [], or name slurm.container_image"
    ),
    "--nodes 1 slurm.container_runtime=apptainer": "slurm.container_runtime = 'apptainer': there is no container; ...",
    "--nodes 1 slurm.container_runtime=docker": (
        "slurm.container_runtime = 'docker': no such choice; choose pyxis, apptainer or singularity"
    ),
    "--nodes 1 slurm.container_image=i slurm.container_mounts=[/a]": (
        "slurm.container_mounts = '/a': not a mount; write SOURCE:TARGET or SOURCE:TARGET:ro"
    ),
    "--nodes 1 slurm.container_image=i run.dir=a,b": "slurm.container_image = 'i': ...",
    "environment.device=cuda training.precision=bf16": (
        "environment.gpus_per_node = null: not given; extend a file of configs/clusters"
    ),
}


@pytest.mark.parametrize("args", REFUSED)
def test_refused_with_its_reason(cluster, capsys, args):
    assert submit(cluster, *re.split(r" (?=[a-z_]+\.)|(?<=--nodes) ", args)) == 2
    error = capsys.readouterr().err.strip().removeprefix("megatron-attn2d: ")
    expected = REFUSED[args]
    assert error.startswith(expected.removesuffix("...")) if expected.endswith("...") else error == expected
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        (30, 1800),
        ("30:20", 1820),
        ("04:00:00", 14400),
        ("1-00", 86400),
        ("1-00:10", 87000),
        ("1-02:03:04", 93784),
        *[(unlimited, None) for unlimited in (0, "UNLIMITED", "soon", None, True)],
    ],
)
def test_times_are_read_as_sbatch_reads_them(limit, seconds):
    assert _seconds(limit) == seconds


def test_without_slurm_and_when_sbatch_refuses(cluster, capsys):
    cluster.executable(cluster.bin / "sbatch", '#!/bin/bash\necho "sbatch: error: invalid account" >&2; exit 1\n')
    assert submit(cluster, "--nodes", "2") == 2
    assert "sbatch: error: invalid account" in capsys.readouterr().err
    (cluster.bin / "sbatch").unlink()
    assert submit(cluster, "--nodes", "2") == 2
    assert "sbatch is not on the PATH" in capsys.readouterr().err
