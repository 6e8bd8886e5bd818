"""The minor version of Megatron-Core that is installed, and what is called otherwise in each.

What moves between minor versions is called from this room alone: a table names the function of each version, and the
rest of the package knows one name. docs/next_versions.md lists what moves next.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping

from megatron_attn2d.megatron.upstream.patching import UpstreamChangedError


@functools.cache
def minor() -> str:
    """The installed minor version, "0.19"; looked up once, as each batch asks for it."""
    return ".".join(importlib.metadata.version("megatron-core").split(".")[:2])


def of_this_version[Function](what: str, functions: Mapping[str, Function]) -> Function:
    """The function for the installed version, out of those for each minor version.

    Args:
        what: the functions do, for the message.
        functions: by minor version.

    Raises:
        UpstreamChangedError: there is none for the installed version.
    """
    if (installed := minor()) not in functions:
        raise UpstreamChangedError(
            f"Megatron-Core {installed}: no way is known to {what}; install one of {', '.join(functions)} "
            "(docs/next_versions.md)"
        )
    return functions[installed]
