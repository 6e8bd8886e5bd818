"""Ranks that were started with different arguments or libraries are told so at once, instead of waiting for each other.

The comparison comes before the first group of the model's is made: that is where ranks that disagree about sizes hang.
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
"""Paths on a host's own disk: whether they are given must agree, where they lead need not."""


class DisagreementError(UsageError):
    """Ranks of one run were started differently."""


def description(arguments: Sequence[str]) -> dict[str, str]:
    """What ranks must agree about: each of Megatron's arguments with its values, and the libraries' versions."""
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
    """Compares the descriptions of all ranks of the default group; every rank must call it.

    Raises:
        DisagreementError: on every rank, naming what differs, the values and the ranks that hold them.
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

    reason = "ranks that disagree about sizes would wait for each other for ever where groups are made"
    return applied([Patch("megatron.core.parallel_state:initialize_model_parallel", compare_first, reason)])
