"""Runs what a command does in the ranks of a run: those of a launcher, or its own."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_attn2d.config import RunConfig
from megatron_attn2d.launch import environment
from megatron_attn2d.launch.ranks import Target


def on_ranks(run: RunConfig, target: Target, arguments: Sequence[str], *, launched: bool) -> int:
    """Run `target(arguments)` in each rank of `run`.

    Args:
        run: has the number of ranks and their device.
        target: what a rank does.
        arguments: Megatron's.
        launched: whether a launcher has started the ranks, so that this process is one of them; else this process
            starts them.

    Returns:
        The exit code.

    Raises:
        ConfigError: this host has too few devices for the ranks that it is to start.
    """
    if launched:
        environment.adopt_launcher()
        target(arguments)
        return 0
    environment.check_devices(run.environment.device, run.world_size)
    from megatron_attn2d.launch import ranks

    return ranks.run_local(run.world_size, target, arguments, device=run.environment.device)
