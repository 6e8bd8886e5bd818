"""The YAMLs that come with the package, which are the repository's folder configs/.

In the repository people find that folder at the top, and `megatron_attn2d/configs` is a link to it. A wheel holds the
files themselves, at the same path.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from megatron_attn2d.config.yaml_io import read_mapping


def folder() -> Path:
    """The folder that holds them."""
    return Path(str(resources.files("megatron_attn2d"))) / "configs"


def names() -> list[str]:
    """The files' names, as `extends` and `train` take them: models/llama_8b.yaml, ..."""
    return sorted(path.relative_to(folder()).as_posix() for path in folder().glob("*/*.yaml"))


def with_parents(chosen: Iterable[str]) -> list[str]:
    """The names in `chosen` and those of the files that they extend, so that copies of them all are complete."""
    whole: set[str] = set()
    waiting = list(chosen)
    while waiting:
        whole.add(name := waiting.pop())
        parents = read_mapping(folder() / name).get("extends", [])
        for parent in [parents] if isinstance(parents, str) else parents:
            waiting.append(posixpath.normpath(posixpath.join(posixpath.dirname(name), parent)))
    return sorted(whole)


def found(path: Path, beside: Path | None = None) -> Path:
    """The file that `path` names: a file of the user's, or else one of ours.

    Args:
        path: as it was written.
        beside: the folder that a relative `path` starts from; None: the current one.

    Returns:
        The user's file where it exists, so that it always wins, else ours. Where neither exists, the user's, so that a
        message names it.
    """
    own = path if beside is None else beside / path
    return own if own.exists() or path.as_posix() not in names() else folder() / path
