"""What a launcher told this process, and what the run wants of its environment."""

import os
import subprocess
from collections.abc import Mapping, MutableMapping

from megatron_attn2d.config.errors import ConfigError


def launched_world_size(environ: Mapping[str, str] = os.environ) -> int | None:
    """Ranks that torchrun or srun has started, this process among them; None where nobody has."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return int(environ["WORLD_SIZE"])
    # One task is an interactive shell of Slurm's, or the batch script itself: ranks are still to be started there.
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")))
    return tasks if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and tasks > 1 else None


def adopt_slurm(environ: MutableMapping[str, str] = os.environ) -> None:
    """Give a task of srun what torch.distributed expects: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT."""
    if "RANK" in environ:
        return
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["WORLD_SIZE"] = environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"]
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    if "MASTER_ADDR" not in environ:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True)
        environ["MASTER_ADDR"] = hosts.stdout.split()[0]
    # The same on every node, and another for each job that shares one.
    environ.setdefault("MASTER_PORT", str(20000 + int(environ["SLURM_JOB_ID"]) % 20000))


def apply_variables(
    device: str, variables: Mapping[str, str | int], environ: MutableMapping[str, str] = os.environ
) -> None:
    """Set the run's environment variables; to be called before torch is imported, which reads some of them."""
    environ.update({name: str(value) for name, value in variables.items()})
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
