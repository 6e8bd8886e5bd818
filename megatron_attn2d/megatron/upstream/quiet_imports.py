"""Imports of Megatron-Core without what it says about libraries that are not installed. No other place silences it.

Silenced while Megatron is imported, and nowhere else:

    "Transformer Engine and Apex are not installed. Falling back to ..."    from the optimizer, clipping, FSDP
    "Apex is not installed. Falling back to Torch Norm"                      from the layer specs
    "Only transformer-engine>=1.7.0 supports MoE experts, but your version is 0.0.0"
    "No CUDA runtime is found, using CUDA_HOME=..."                          from torch, for extensions nobody builds

CPU ranks can have neither library, and whoever prepares data needs neither. What a run derives from a missing library
stands in the log of its rank 0. Warnings of training itself go to the rank's log.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def hushed() -> Iterator[None]:
    """Without warnings and log messages below errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def quiet_import(name: str) -> Any:
    """The module `name`."""
    with hushed():
        return import_module(name)


def indexed_dataset() -> Any:
    """Megatron's module of .bin/.idx files."""
    return quiet_import("megatron.core.datasets.indexed_dataset")
