"""A cluster of one machine: stubs of Slurm's commands that start a job's tasks here, and pre-empt and requeue it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from megatron_attn2d import cli

SBATCH = r"""#!/bin/bash
[[ $1 == --parsable && $# == 2 && -r $2 ]] || { echo "sbatch: error: $*" >&2; exit 1; }
printf %s "$2" >"$STUBS/submitted"
echo "$JOB_ID;cluster"
"""
SRUN = r"""#!/bin/bash
printf '%s\n' "$@" >"$STUBS/srun-arguments"
exported=${SLURM_EXPORT_ENV:-ALL}
while [[ $1 == --* ]]; do [[ $1 == --export=* ]] && exported=${1#*=}; shift; done
[[ $exported == ALL ]] || unset PYTHONPATH
: >"$STUBS/tasks"
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$SLURM_NNODES "$@" &
    echo "$!" >>"$STUBS/tasks"
done
highest=0
for ((node = 0; node < SLURM_NNODES; node++)); do
    wait -n || { code=$?; ((code > highest)) && highest=$code; scancel --signal=TERM "$JOB_ID" 2>/dev/null; }
done
exit "$highest"
"""
SCANCEL = r"""#!/bin/bash
[[ "$*" == "--signal=TERM $JOB_ID" ]] || exit
mapfile -t tasks <"$STUBS/tasks"
kill -TERM "${tasks[@]}"
"""
SCONTROL = r"""#!/bin/bash
case "$*" in
    "show hostnames $SLURM_JOB_NODELIST") printf 'localhost\nlocalhost\n' ;;
    "requeue $JOB_ID") : >"$STUBS/requeued" ;;
    *) exit 1 ;;
esac
"""
SQUEUE = r"""#!/bin/bash
[[ "$*" == "-h -j $JOB_ID -o %T %r" ]] || exit 1
cat "$STUBS/state" 2>/dev/null || echo "RUNNING None"
"""
TOOLS = ("bash", "cat", "date", "head")


def unescaped(line: str) -> str:
    """What sbatch's parser makes of the rest of a line of #SBATCH: ends at a bare space, `\\x` is x."""
    assert re.fullmatch(r"(\\.|[^\\\s\"'#])*", line), line
    return re.sub(r"\\(.)", r"\1", line)


class Cluster:
    """Runs one job at a time."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin = root, root / "bin"
        self.bin.mkdir()
        stubs = {"sbatch": SBATCH, "srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL, "squeue": SQUEUE}
        for name, text in stubs.items():
            self.executable(self.bin / name, text)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.job_id = _free_port() + 20000  # the job's port: 20000 + id % 20000
        self.environ = {"PATH": str(self.bin), "STUBS": str(root), "JOB_ID": str(self.job_id), "OMP_NUM_THREADS": "1"}

    @staticmethod
    def executable(path: Path, text: str) -> Path:
        path.write_text(text)
        path.chmod(0o755)
        return path

    @property
    def script(self) -> Path:
        """The batch file that was submitted last."""
        return Path((self.root / "submitted").read_text())

    def options(self) -> dict[str, str]:
        """What sbatch reads from the batch file, without its command line."""
        lines = [line for line in self.script.read_text().splitlines() if line.startswith("#SBATCH ")]
        pairs = [line.removeprefix("#SBATCH --").partition("=") for line in lines]
        return {name: unescaped(value) for name, _, value in pairs}

    def log(self) -> Path:
        """Where the job's output goes."""
        return Path(self.options()["output"].replace("%%", "\0").replace("%j", str(self.job_id)).replace("\0", "%"))

    def run(self, meanwhile: Callable[[int, subprocess.Popen[bytes]], None] | None = None, at_most: int = 9) -> int:
        """Runs the job, again each time that it is requeued; `meanwhile(attempt, batch script)`. The last exit code."""
        options = self.options()
        assert options["open-mode"] == "append"
        for attempt in range(at_most):
            (self.root / "requeued").unlink(missing_ok=True)
            environ = self.environ | {
                "SLURM_JOB_ID": str(self.job_id),
                "SLURM_NNODES": options["nodes"],
                "SLURM_JOB_NODELIST": f"node[1-{options['nodes']}]",
                "SLURM_RESTART_COUNT": str(attempt),
            }
            if "export" in options:
                environ["SLURM_EXPORT_ENV"] = options["export"]
            with self.log().open("ab") as log:
                batch = subprocess.Popen(
                    ["bash", self.script],
                    env=environ,
                    cwd=options["chdir"],
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            try:
                if meanwhile is not None:
                    meanwhile(attempt, batch)
                code = batch.wait(timeout=240)
            finally:
                if batch.poll() is None:
                    os.killpg(batch.pid, signal.SIGKILL)
            if not (self.root / "requeued").exists():
                return code
            assert code == 0
        raise AssertionError(f"requeued {at_most} times:\n{self.log().read_text()}")


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 240) -> None:
    """Waits until `condition` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def _free_port() -> int:
    """A port between 20000 and 39999 on which nobody listens."""
    for port in range(20000 + os.getpid() % 10000, 40000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


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


def submit(cluster, *args, directory="runs/job"):
    path = Path("run.yaml")
    path.write_text(RUN.format(root=Path(__file__).parents[2], dir=json.dumps(directory)))
    return cli.main(["submit", str(path), *args])


def with_ranks(cluster, script):
    """The override that has `script`, in bash, run in place of torchrun."""
    (cluster.root / "ranks").write_text(script)
    return f"slurm.python={cluster.executable(cluster.root / 'python', PYTHON)}"
