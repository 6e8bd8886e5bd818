"""Imports of Megatron-Core without what it says about missing libraries, which is no concern of who prepares data."""

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
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def indexed_dataset() -> Any:
    """The module of Megatron's .bin/.idx files."""
    with hushed():
        return import_module("megatron.core.datasets.indexed_dataset")
