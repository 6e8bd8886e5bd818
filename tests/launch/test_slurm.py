"""What `submit` writes and refuses, and that nothing in it is run that a name or path holds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_attn2d import cli
from megatron_attn2d.config import load_run
from megatron_attn2d.launch.slurm import _seconds, render
from tests.launch.cluster import PYTHON, submit, with_ranks

ROOT = Path(__file__).parents[2]
NASTY = """it's "$(touch pwned)" `touch pwned`; touch pwned & %j \\ #x*"""


# Tells what reached it and fails, but not before the other node's task was started: srun ends that one on a failure.
FAILING_RANKS = """echo "$FROM_SETUP $PYTHONPATH" >"$STUBS/environment"
for _ in {1..300}; do [[ -s $STUBS/given-0 && -s $STUBS/given-1 ]] && break; sleep 0.1; done
exit 1
"""


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
