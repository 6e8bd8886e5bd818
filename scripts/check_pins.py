"""Compares requirements.lock with the advisories of scripts/advisories.txt; asks no network.

    .venv/bin/python scripts/check_pins.py [LOCK [ADVISORIES]]

Prints the pins that an advisory is about, and fails if there are any.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
_PIN = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*==\s*([^\s;\\]+)")
_ADVISORY = re.compile(
    r"([A-Za-z0-9._-]+?)((?:[<>=!~]=?|,)\S*)\s+(\S.*; (?:record|notes|page|quoted) https?://\S+)$", re.ASCII
)
_EXAMPLE = "name<1.2,>=1.0  ID: what; record https://source"


def read_pins(lock: Path) -> dict[str, Version]:
    """The packages of a lock with their versions.

    Raises:
        ValueError: a requirement has no version of its own, which no advisory could be compared with.
    """
    pins = {}
    for line in lock.read_text().splitlines():
        requirement = line.partition("#")[0].strip()
        if not requirement or requirement.startswith("--"):
            continue
        if not (match := _PIN.match(requirement)):
            raise ValueError(f"{lock}: {requirement!r} is not pinned; write name==version")
        pins[canonicalize_name(match[1])] = Version(match[2])
    return pins


def read_advisories(path: Path) -> list[tuple[str, SpecifierSet, str]]:
    """Package, affected versions and what it is about with its source, a line each; the file says how they are written.

    Raises:
        ValueError: a line can't be read.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _ADVISORY.match(text)
        try:
            assert match
            found.append((canonicalize_name(match[1]), SpecifierSet(match[2], prereleases=True), match[3]))
        except (AssertionError, InvalidSpecifier) as error:
            raise ValueError(f"{path}, line {number}: not an advisory; write {_EXAMPLE!r}") from error
    return found


def main(arguments: list[str]) -> int:
    """The number of pins that an advisory is about."""
    lock = Path(arguments[0]) if arguments else ROOT / "requirements.lock"
    advisories = read_advisories(Path(arguments[1]) if arguments[1:] else ROOT / "scripts" / "advisories.txt")
    pins = read_pins(lock)
    hits = [(name, about) for name, affected, about in advisories if name in pins and pins[name] in affected]
    for name, about in hits:
        print(f"{lock.name}: {name}=={pins[name]} is affected: {about}", file=sys.stderr)
    print(f"{len(pins)} pins, {len(advisories)} advisories, {len(hits)} affected")
    return len(hits)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 100))
