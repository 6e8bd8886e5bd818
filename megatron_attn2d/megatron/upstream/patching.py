"""Narrow replacements of upstream names, each with its reason, that fail loudly when a name has gone."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock


class UpstreamChangedError(RuntimeError):
    """A name that a patch replaces no longer exists in the installed torch or Megatron-Core."""


@dataclass(frozen=True)
class Patch:
    """Replaces `target` ("package.module:name" or "package.module:Class.name") by `make(original)`."""

    target: str
    make: Callable[[Any], Any]
    reason: str

    def resolve(self) -> tuple[Any, str]:
        """The object that holds the name, and the name.

        Raises:
            UpstreamChangedError: the module, the class or the name no longer exists.
        """
        module, _, qualified_name = self.target.partition(":")
        holder, _, name = qualified_name.rpartition(".")
        try:
            owner = pkgutil.resolve_name(f"{module}:{holder}" if holder else module)
            getattr(owner, name)
        except (ImportError, AttributeError) as error:
            raise UpstreamChangedError(
                f"{self.target} is gone from the installed version ({error}); it was patched because {self.reason}"
            ) from error
        return owner, name


@contextmanager
def applied(patches: Iterable[Patch]) -> Iterator[None]:
    """Applies the patches, in order, for the duration of the context."""
    with ExitStack() as stack:
        for patch in patches:
            owner, name = patch.resolve()
            stack.enter_context(mock.patch.object(owner, name, patch.make(getattr(owner, name))))
        yield


@cache
def install(patch: Patch) -> None:
    """Applies a patch for good, once: for a name that upstream uses after the call that asks for it has returned."""
    owner, name = patch.resolve()
    setattr(owner, name, patch.make(getattr(owner, name)))
