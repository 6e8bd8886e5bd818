"""Refuses ranks that were started with different arguments or libraries, which would wait for each other for ever.

The comparison precedes the model's first process group, since ranks that disagree about its size hang there.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from megatron_attn2d.errors import UsageError
from megatron_attn2d.megatron.upstream.patching import Patch, applied

_LIBRARIES = ("torch", "megatron-core", "megatron-attn2d", "transformer-engine")
_MAY_DIFFER = {"--data-path", "--data-cache-path", "--tokenizer-model", "--run-dir", "--tensorboard-dir"}
"""Paths on a host's own disk: all ranks must be given them, or none, but the paths may differ."""


class DisagreementError(UsageError):
    """Ranks of one run were started differently."""


def description(arguments: Sequence[str]) -> dict[str, str]:
    """What ranks must agree about, by name: Megatron's arguments with their values, and the versions of libraries."""
    found: dict[str, str] = {}
    flag = ""
    for token in arguments:
        if token.startswith("--"):
            flag = token
            found[flag] = "given"
        elif flag in found and flag not in _MAY_DIFFER:
            found[flag] = token if found[flag] == "given" else f"{found[flag]} {token}"
    return found | {name: _version(name) for name in _LIBRARIES}


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def check_agreement(mine: Mapping[str, str]) -> None:
    """Compare the descriptions of all ranks of the default group; every rank must call it.

    Raises:
        DisagreementError: descriptions differ; raised on every rank, names keys, values and the ranks that hold them.
        RuntimeError: a rank did not answer.
    """
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    try:
        torch.distributed.all_gather_object(everyone, dict(mine))
    except RuntimeError as error:
        rank = torch.distributed.get_rank()
        what = f"comparing how all {len(everyone)} ranks were started"
        raise RuntimeError(f"{what} failed on rank {rank}, before any layer: {error}") from error
    differences = []
    for key in sorted({key for one in everyone for key in one}):
        holders: dict[str, list[int]] = defaultdict(list)
        for rank, one in enumerate(everyone):
            holders[one.get(key, "not given")].append(rank)
        if len(holders) > 1:
            values = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items())
            differences.append(f"{key} is {values}")
    if differences:
        raise DisagreementError(
            f"the ranks of this run were started differently: {'; '.join(differences)}. Start all of them from the "
            "same YAML, with the same overrides and the same installation"
        )


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' * (len(ranks) > 1)} {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def agreed(arguments: Sequence[str]) -> AbstractContextManager[None]:
    """While entered, ranks are compared before Megatron makes its groups."""

    def compare_first(initialize_model_parallel: Any) -> Any:
        @functools.wraps(initialize_model_parallel)
        def initialize(*args: Any, **kwargs: Any) -> Any:
            check_agreement(description(arguments))
            return initialize_model_parallel(*args, **kwargs)

        return initialize

    reason = "ranks that disagree about sizes would wait for each other for ever when groups are made"
    return applied([Patch("megatron.core.parallel_state:initialize_model_parallel", compare_first, reason)])
