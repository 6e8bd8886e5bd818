"""Checks that the keys of a run fit together, before any process starts."""

from collections.abc import Iterable

from megatron_attn2d.config import keys
from megatron_attn2d.config.auto import with_grid
from megatron_attn2d.config.checks.checkpoint import check_checkpoint
from megatron_attn2d.config.checks.context import check_context, check_layer_modes
from megatron_attn2d.config.checks.data import check_data, check_documents
from megatron_attn2d.config.checks.graphs import check_graphs
from megatron_attn2d.config.checks.layers import check_hybrid, check_layers
from megatron_attn2d.config.checks.machines import check_machines
from megatron_attn2d.config.checks.model_sizes import check_model
from megatron_attn2d.config.checks.optimizer import check_optimizer
from megatron_attn2d.config.checks.parallelism import check_parallelism
from megatron_attn2d.config.checks.refusal import Refusal
from megatron_attn2d.config.checks.step import check_fp8, check_step
from megatron_attn2d.config.schema import RunConfig
from megatron_attn2d.errors import ConfigError, ConfigErrors

_CHECKS = (
    *(check_model, check_layers, check_hybrid, check_parallelism, check_machines, check_step, check_fp8),
    *(check_data, check_documents, check_optimizer, check_checkpoint, check_graphs),
)
"""The checks, in the order of their messages."""


def check(run: RunConfig) -> None:
    """Raise ConfigError, naming each key with its value, the reason and a valid choice, if `run` cannot work."""
    errors = _told(run, (refusal for subject in _CHECKS for refusal in subject(run)))
    if not {error.key for error in errors} & {"model.num_query_groups", "parallelism.tensor"}:
        # The planner may have to choose the grid, for which heads must divide; the grid that trains is checked.
        resolved = with_grid(run)
        errors += _told(run, [*check_context(resolved), *check_layer_modes(resolved)])
    if errors:
        raise ConfigErrors(errors)


def _told(run: RunConfig, refusals: Iterable[Refusal]) -> list[ConfigError]:
    return [ConfigError(key, keys.given(run, key), reason, choice) for key, reason, choice in refusals]
