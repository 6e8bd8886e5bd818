"""Reads the environment variables of a launcher, and sets those of a run."""

import os
import subprocess
import sys
from collections.abc import Mapping, MutableMapping

from megatron_attn2d.errors import ConfigError, UsageError

_ALONE = "or unset RANK and WORLD_SIZE"


def launched_world_size(environ: Mapping[str, str] = os.environ) -> int | None:
    """Number of ranks that torchrun or srun has started, this process among them; None without a launcher.

    Raises:
        UsageError: the launcher's variable is no number; names it.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return number("WORLD_SIZE", environ["WORLD_SIZE"], f"the number of ranks, {_ALONE}", least=1)
    # One task is an interactive shell of Slurm, or the batch script itself: there this process starts the ranks.
    if not ("SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ):
        return None
    tasks = _slurm_tasks(environ)
    return tasks if tasks > 1 else None


def adopt_launcher(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for torch.distributed, which srun does not set.

    Raises:
        UsageError: one of them is missing or no number, and does not follow from Slurm's variables.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        number("RANK", environ["RANK"], f"this rank's number, from 0, {_ALONE}")
        if not environ.get("MASTER_ADDR"):
            raise UsageError(
                f"MASTER_ADDR: not set, but RANK and WORLD_SIZE are; choose rank 0's host, as torchrun does, {_ALONE}"
            )
        number("MASTER_PORT", environ.get("MASTER_PORT"), "a free port of rank 0's host")
        return
    environ["RANK"] = str(number("SLURM_PROCID", environ["SLURM_PROCID"], "this rank's number, as srun does"))
    environ["WORLD_SIZE"] = str(_slurm_tasks(environ))
    local = number("SLURM_LOCALID", environ.get("SLURM_LOCALID"), "this rank's number on its node, as srun does")
    environ["LOCAL_RANK"] = str(local)
    if not environ.get("MASTER_ADDR"):
        environ["MASTER_ADDR"] = _first_host(environ)
    if not environ.get("MASTER_PORT"):
        job = number("SLURM_JOB_ID", environ.get("SLURM_JOB_ID"), "the job's number, as srun does, or set MASTER_PORT")
        # The same port on every node, and different ports for jobs that share a node.
        environ["MASTER_PORT"] = str(20000 + job % 20000)


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    return number(name, environ.get(name, "1"), "the number of ranks, as srun does", least=1)


def _first_host(environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    try:
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True)
        return hosts.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:  # containers have no scontrol
        raise UsageError(
            f"MASTER_ADDR: not set, and scontrol doesn't tell the hosts of {nodes!r}; set it before srun, for instance "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)'
        ) from error


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """This rank's number on its node; 0 where the launcher does not set it."""
    return number("LOCAL_RANK", environ.get("LOCAL_RANK", "0"), "this rank's number on its node, from 0")


def number(name: str, value: str | None, choice: str, least: int = 0) -> int:
    """`value`, of the environment variable `name`, as an integer of `least` or more.

    Raises:
        UsageError: it is missing or no such integer; names variable, value and `choice`.
    """
    if value is None:
        raise UsageError(f"{name}: not set; choose {choice}")
    if not value.strip().isdecimal() or int(value) < least:
        raise UsageError(f"{name}={value!r}: not a number of {least} or more; choose {choice}")
    return int(value)


def apply_variables(
    device: str, variables: Mapping[str, str | int], environ: MutableMapping[str, str] = os.environ
) -> None:
    """Set the run's environment variables; call it before torch is imported, which reads some of them.

    The YAML's value wins, so that a run is the same from every shell; rank 0 reports the values that it replaces.
    """
    first = environ.get("RANK", environ.get("SLURM_PROCID", "0")) == "0"
    for name, value in variables.items():
        exported = environ.get(name)
        if first and exported is not None and exported != str(value):
            print(
                f"megatron-attn2d: {name}={exported} of the environment gives way to {value} of the YAML; "
                f"to keep it: environment.variables.{name}={exported}",
                file=sys.stderr,
            )
        environ[name] = str(value)
    if device == "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = ""


def check_devices(device: str, ranks_here: int) -> None:
    """Raise ConfigError unless this machine has a CUDA device for each of `ranks_here` ranks."""
    if device == "cpu":
        return
    import torch

    devices = torch.cuda.device_count()
    if devices < ranks_here:
        reason = f"{ranks_here} ranks on this machine, which has {devices} CUDA devices"
        raise ConfigError(
            "environment.device", device, reason, "start it on more machines (torchrun, Slurm), or choose cpu"
        )
