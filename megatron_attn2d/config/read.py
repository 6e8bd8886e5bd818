"""Loads a YAML file as a checked RunConfig, and writes one back as YAML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_attn2d.config.auto import with_grid
from megatron_attn2d.config.check import check
from megatron_attn2d.config.explain import explain
from megatron_attn2d.config.loading import read_run
from megatron_attn2d.config.schema import RunConfig
from megatron_attn2d.config.yaml_io import dump
from megatron_attn2d.errors import ConfigError, ConfigErrors


def load_run(path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> RunConfig:
    """The run that the YAML at `path` describes, with `key.sub=value` overrides applied.

    Args:
        path: the YAML file; a file below its `extends:` is relative to its folder.
        overrides: as on the command line; values are YAML.
        world_size: ranks that a launcher has started; None where no rank runs yet.

    Returns:
        The run, with numbers in the place of `auto`.

    Raises:
        ConfigError: mistakes in the file or the overrides, one per line.
    """
    run = _with_replicas(build_run(read_run(Path(path), overrides)), world_size)
    check(run)
    return with_grid(run)


def build_run(content: Mapping[str, Any]) -> RunConfig:
    """The typed form of `content`; raises ConfigError for unknown keys and wrong types."""
    # A heading with nothing below it is an empty section, not a value.
    sections = {k: {} if v is None and k in RunConfig.model_fields else v for k, v in content.items()}
    try:
        return RunConfig.model_validate(sections)
    except ValidationError as error:
        raise ConfigErrors(explain(error, sections)) from None


def resolved_yaml(run: RunConfig) -> str:
    """Every key of `run` with its value, as YAML that loads back to the same run."""
    return dump(run.model_dump(mode="json"))


def _with_replicas(run: RunConfig, world_size: int | None) -> RunConfig:
    """`run` with parallelism.data derived from the number of ranks, or checked against it."""
    where, given = run.environment, run.parallelism.data
    gpus = (where.nodes or 1) * where.gpus_per_node if where.gpus_per_node else None
    if world_size and gpus and world_size != gpus:
        key = "environment.nodes" if where.nodes else "environment.gpus_per_node"
        reason = f"{gpus} ranks in all, but {world_size} were started"
        raise ConfigError(
            key, where.nodes or where.gpus_per_node, reason, f"start {gpus}, or override environment.nodes"
        )
    world = world_size or gpus or run.model_ranks * (given or 1)
    if world % run.model_ranks:
        parallel = run.parallelism
        raise ConfigError(
            "world size",
            world,
            f"not a multiple of tensor * pipeline * context = {parallel.tensor} * {parallel.pipeline} * "
            f"{run.context_parallel.size} = {run.model_ranks} ranks",
            f"choose {-(-world // run.model_ranks) * run.model_ranks} ranks, or other sizes",
        )
    if given and given * run.model_ranks != world:
        raise ConfigError(
            "parallelism.data",
            given,
            f"with {run.model_ranks} ranks per replica that is {given * run.model_ranks} ranks, but there are {world}",
            f"choose {world // run.model_ranks}, or null to derive it",
        )
    parallelism = run.parallelism.model_copy(update={"data": world // run.model_ranks})
    return run.model_copy(update={"parallelism": parallelism})
