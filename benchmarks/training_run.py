"""Runs of `megatron-attn2d train` that the benchmarks start, end by a deadline and read the steps of."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hosts import posing
from watched import end

from megatron_attn2d.errors import UsageError
from megatron_attn2d.run.metrics import read_steps

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ("-m", "megatron_attn2d.cli", "train")
_POLL_S = 0.1


class TrainingError(RuntimeError):
    """A run that failed, and what it printed."""


def run(
    yaml: Path,
    ranks: int,
    overrides: list[str],
    timeout: float,
    *,
    torchrun: bool = True,
    nodes: bool = False,
    enough: int = 10**9,
    directory: str | None = None,
    program: Sequence[str] = TRAIN,
) -> list[dict[str, Any]]:
    """Train and return the recorded steps.

    Args:
        ranks: processes on this machine.
        timeout: seconds after which all of them are ended.
        torchrun, nodes, program: see `started`.
        enough: steps that count although the run was ended by its timeout.
        directory: of the run; None for one that goes afterwards.

    Raises:
        TrainingError: it failed, or was ended with fewer steps than are enough.
    """
    with tempfile.TemporaryDirectory() if directory is None else nullcontext(directory) as directory:
        with started(
            yaml, ranks, overrides, Path(directory), torchrun=torchrun, nodes=nodes, program=program
        ) as training:
            code = training.wait(timeout)
        try:
            steps = list(read_steps(Path(directory)).values())
        except UsageError:  # none yet
            steps = []
        if steps and (code == 0 or (code is None and len(steps) >= enough)):
            return steps
        logs = [path.read_text(errors="replace")[-3000:] for path in Path(directory).glob("**/*.log")]
        how = f"ended after {timeout:.0f} s, {len(steps)} steps" if code is None else f"exit code {code}"
        raise TrainingError("\n".join([how, training.printed(), *logs]))


def machines(ranks: int, nodes: bool) -> list[str]:
    """Overrides that describe what `started` makes of this machine."""
    if nodes:
        return [f"environment.nodes={ranks}", "environment.gpus_per_node=1"]
    return [f"environment.gpus_per_node={ranks}"]


@dataclass
class Training:
    """A training that runs: its processes, of which each leads a session, and the files that they print to.

    Attributes:
        blamed: the process that failed first, as far as `wait` has seen.
    """

    processes: list[subprocess.Popen[Any]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    blamed: int = 0

    def wait(self, timeout: float) -> int | None:
        """The exit code of the first that fails, 0 once all have ended; None after so many seconds."""
        deadline = time.monotonic() + timeout
        while True:
            codes = [process.poll() for process in self.processes]
            self.blamed = next((number for number, code in enumerate(codes) if code), 0)
            if codes[self.blamed] or None not in codes:
                return codes[self.blamed]
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL_S)

    def printed(self) -> str:
        """The end of what the process to blame has printed, or the first where none failed."""
        return self.files[self.blamed].read_text(errors="replace")[-8000:]


@contextmanager
def started(
    yaml: Path,
    ranks: int,
    overrides: list[str],
    directory: Path,
    *,
    torchrun: bool = False,
    nodes: bool = False,
    program: Sequence[str] = TRAIN,
) -> Iterator[Training]:
    """A training in `directory`; what of it runs at the end of the `with` block is killed.

    Args:
        torchrun: ranks are started by it; else the command itself starts them, which suits CPU ranks.
        nodes: each rank is started as a launcher would on a host of its own, and poses as one to NCCL: rank r on GPU
            r % GPUs, so that ranks may share them.
        program: what Python runs, with the YAML and the overrides as arguments.
    """
    directory.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if torchrun else []
    command = [sys.executable, *launcher, *program, str(yaml), f"run.dir={directory}"]
    shared = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    # Kept by this process: a port that is merely free may be another's by the time that a rank listens on it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if nodes else None
    environments = [{}] if store is None else [_on_a_host(rank, ranks, store.port) for rank in range(ranks)]
    training = Training()
    try:
        for number, environment in enumerate(environments):
            file = directory / f"printed-{number}.txt"
            with file.open("w") as out:
                process = subprocess.Popen(
                    [*command, *overrides], env=shared | environment, stdout=out, stderr=out, start_new_session=True
                )
            training.processes.append(process)
            training.files.append(file)
        yield training
    finally:
        for process in training.processes:
            end(process)


def _on_a_host(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables of a rank that is alone on its host."""
    return posing(rank) | {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank % (torch.cuda.device_count() or 1)),
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # no rank is to serve the store
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }
