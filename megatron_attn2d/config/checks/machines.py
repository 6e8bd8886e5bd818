"""Checks that the machines and the installed packages have what a run asks for."""

import importlib.util
from collections.abc import Iterator

from megatron_attn2d.config.checks.refusal import Refusal
from megatron_attn2d.config.schema import RunConfig

_LAUNCHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Environment variables that a launcher sets, differently in each rank."""


def check_machines(run: RunConfig) -> Iterator[Refusal]:
    """Refuse numbers of nodes and GPUs that do not fit the device, and packages that are not installed."""
    where = run.environment
    for name in sorted(where.variables.keys() & _LAUNCHERS):
        yield "environment.variables", f"{name} is the launcher's, different in each rank", f"leave out {name}"
    if where.device == "cpu" and (where.nodes or 1) > 1:
        yield "environment.nodes", "CPU ranks run on one machine", "choose 1"
    if where.device == "cuda" and where.nodes and not where.gpus_per_node:
        yield "environment.nodes", "environment.gpus_per_node is not given", "set that too, or leave out both"
    if where.device == "cpu" and where.gpus_per_node is not None:
        yield "environment.gpus_per_node", "environment.device = cpu has no GPUs", "choose null"
    if where.device == "cpu" and run.training.precision == "fp16":
        yield "training.precision", "environment.device = cpu computes in fp32 or bf16", "choose fp32"
    if run.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        yield "logging.wandb_project", "wandb is not installed", "pip install 'megatron-attn2d[wandb]', or choose null"
