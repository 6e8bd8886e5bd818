"""What a launcher's and a shell's variables may be, and what a user reads where they can't."""

import os
import re

import pytest

from megatron_attn2d.errors import UsageError
from megatron_attn2d.launch import environment, ranks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "node07", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_JOB_ID": "1234567",
}


def launched(environ):
    """What `train` and `eval` ask of the environment, in their order."""
    environment.launched_world_size(environ)
    environment.adopt_launcher(environ)
    return environment.local_rank(environ)


@pytest.mark.parametrize(
    ("environ", "changes", "message"),
    [
        (TORCHRUN, {"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc': not a number of 1 or more; choose the number of ranks"),
        (TORCHRUN, {"WORLD_SIZE": ""}, "WORLD_SIZE='': not a number of 1 or more"),
        (TORCHRUN, {"WORLD_SIZE": "0"}, "WORLD_SIZE='0': not a number of 1 or more"),
        (TORCHRUN, {"RANK": "-1"}, "RANK='-1': not a number of 0 or more; choose this rank's number"),
        (TORCHRUN, {"LOCAL_RANK": "x"}, "LOCAL_RANK='x': not a number of 0 or more; choose this rank's number on its"),
        (TORCHRUN, {"MASTER_ADDR": None}, "MASTER_ADDR: not set, but RANK and WORLD_SIZE are; choose rank 0's host"),
        (TORCHRUN, {"MASTER_PORT": None}, "MASTER_PORT: not set; choose a free port of rank 0's host"),
        (SRUN, {"SLURM_NTASKS": "8(x2)"}, "SLURM_NTASKS='8(x2)': not a number of 1 or more"),
        (SRUN, {"SLURM_PROCID": ""}, "SLURM_PROCID='': not a number of 0 or more"),
        (SRUN, {"SLURM_LOCALID": None}, "SLURM_LOCALID: not set; choose this rank's number on its node, as srun does"),
        (SRUN, {"SLURM_JOB_ID": None, "MASTER_ADDR": "a"}, "SLURM_JOB_ID: not set; choose the job's number"),
    ],
)
def test_a_launchers_variable_that_is_wrong_is_named(environ, changes, message):
    given = {name: value for name, value in (environ | changes).items() if value is not None}
    with pytest.raises(UsageError, match=re.escape(message)):
        launched(given)


@pytest.mark.parametrize("script", [None, "exit 1", "true"])
def test_without_scontrol_the_host_is_asked_for(script, tmp_path, monkeypatch):
    if script is not None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = re.escape("'node[07-08]'; set it before srun, for instance export MASTER_ADDR=$(scontrol show hostnames ")
    with pytest.raises(UsageError, match=told):
        launched(dict(SRUN))
    environ = SRUN | {"MASTER_ADDR": "node07"}
    assert launched(environ) == 1
    assert (environ["RANK"], environ["WORLD_SIZE"]) == ("5", "8")


def test_slurms_variables_outside_a_step_are_not_read():
    assert environment.launched_world_size({"SLURM_NTASKS": "8(x2)", "SLURM_PROCID": "0"}) is None


def test_what_torchrun_says_stays():
    environ = dict(TORCHRUN)
    assert launched(environ) == 3
    assert environ == TORCHRUN


def test_an_exported_variable_that_the_yaml_replaces_is_named_once(capsys):
    variables = {"NCCL_DEBUG": "WARN", "CUDA_DEVICE_MAX_CONNECTIONS": 1, "OMP_NUM_THREADS": 4, "NCCL_NVLS_ENABLE": 0}
    shell = {"NCCL_DEBUG": "INFO", "CUDA_DEVICE_MAX_CONNECTIONS": "8", "OMP_NUM_THREADS": "4"}
    for first in ({}, {"RANK": "0"}, {"SLURM_PROCID": "0"}):
        environ = shell | first
        environment.apply_variables("cuda", variables, environ)
        assert environ == first | {name: str(value) for name, value in variables.items()}
        assert capsys.readouterr().err.splitlines() == [
            "megatron-attn2d: NCCL_DEBUG=INFO of the environment gives way to WARN of the YAML; "
            "to keep it: environment.variables.NCCL_DEBUG=INFO",
            "megatron-attn2d: CUDA_DEVICE_MAX_CONNECTIONS=8 of the environment gives way to 1 of the YAML; "
            "to keep it: environment.variables.CUDA_DEVICE_MAX_CONNECTIONS=8",
        ]
    for other in ({"RANK": "1"}, {"SLURM_PROCID": "1"}):
        environment.apply_variables("cuda", variables, shell | other)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", ["x", "", "0", ",2"])
def test_threads_that_are_no_number_are_named(value, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(UsageError, match=r"OMP_NUM_THREADS='.?': not a number of 1 or more; choose a rank's threads"):
        ranks.run_local(1, os.path.join, [])
