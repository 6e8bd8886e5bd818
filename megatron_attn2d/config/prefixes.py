"""Prefixes of data sets, which data.paths names: PREFIX.bin and PREFIX.idx."""

from pathlib import Path


def prefix_fault(prefix: str) -> tuple[str, str] | None:
    """Why `prefix` can't begin the names PREFIX.bin and PREFIX.idx, and what to write instead; None where it can."""
    if prefix.rpartition("/")[2].strip("."):
        return None
    return "a folder, whose files need a name to begin with", f"write {prefix.rstrip('/')}/NAME"


def is_complete(prefix: Path) -> bool:
    """Whether both files of the data set `prefix` exist."""
    return all(prefix.with_name(prefix.name + suffix).is_file() for suffix in (".bin", ".idx"))
