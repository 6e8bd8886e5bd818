"""Warnings that point to the caller's line, and names of earlier versions, which still work and warn."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

import megatron_attn2d

_NO_CALLERS = tuple(f"{Path(x).parent}{os.sep}" for x in (torch.__file__, megatron_attn2d.__file__))
"""Folders of code that calls for others."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside of torch and this package. Python shows a warning once for each place that calls."""
    warnings.warn(message, category, skip_file_prefixes=_NO_CALLERS)


def renamed_arguments[**Arguments, Result](
    **names: str,
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """A function that also takes keyword arguments by their old names, given here as old="new"."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(function)
        def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            given: dict[str, Any] = kwargs
            for old in names.keys() & given.keys():
                if names[old] in given:
                    raise TypeError(
                        f"{function.__qualname__}() got {names[old]}= and its old name {old}=: pass the first"
                    )
                warn(f"{function.__qualname__}({old}=...) is deprecated: pass {names[old]}=", DeprecationWarning)
                given[names[old]] = given.pop(old)
            return function(*args, **kwargs)

        return wrapped

    return decorate


def renamed_property(owner: str, old: str, new: str) -> property:
    """The attribute `new` of a class by its old name."""

    def get(self: object) -> Any:
        warn(f"{owner}.{old} is deprecated: read {owner}.{new}", DeprecationWarning)
        return getattr(self, new)

    return property(get, doc=f"The old name of `{new}`.")
