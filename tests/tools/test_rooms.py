"""Which room of the package may import from which: no arrow runs upward, none in a circle.

Every import counts, also those within functions, those of type checkers, and names given to `import_module`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_attn2d"
ALLOWED: dict[str, set[str]] = {
    # A room imports from those of the rooms above it that stand beside it.
    "errors": set(),
    "pictures": set(),
    "attention": set(),
    "planner": {"attention"},
    "run": {"errors", "pictures"},
    "megatron.upstream": set(),
    "megatron": {"attention", "errors", "megatron.upstream", "planner"},
    "config": {"errors", "megatron", "megatron.upstream", "planner", "run"},
    "data": {"config", "errors", "megatron.upstream", "pictures"},
    "training.guards": {"attention", "config", "errors", "megatron", "megatron.upstream", "run"},
    "training": {"attention", "config", "data", "errors", "megatron", "megatron.upstream", "run", "training.guards"},
    "launch": {"config", "errors", "megatron.upstream"},
    "inference": {
        "attention",
        "config",
        "data",
        "errors",
        "launch",
        "megatron",
        "megatron.upstream",
        "pictures",
        "run",
        "training",
    },
    "preview": {"attention", "config", "data", "errors", "pictures", "planner", "training"},
    "commands": {"config", "data", "errors", "inference", "launch", "preview", "run", "training"},
}
ENTRIES = {"": {"attention", "megatron"}, "cli": {"commands", "errors"}, "pretrain_gpt": {"training"}}
"""Modules outside of rooms: names that users import, the command, and a launch under torchrun."""


def modules() -> dict[str, Path]:
    """Each module of the package by its name in it: "config.read"."""
    paths = {path: path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    return {".".join(name.parts).removesuffix("__init__").rstrip("."): path for path, name in paths.items()}


MODULES = modules()


def room(module: str) -> str:
    """The innermost room that `module` is in."""
    found = [name for name in (*ALLOWED, *ENTRIES) if name and f"{module}.".startswith(f"{name}.")]
    return max(found, key=len, default="")


def imported(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        for name in names:
            package, _, inner = name.partition(".")
            if package == "megatron_attn2d":
                yield inner if inner in MODULES else inner.rpartition(".")[0]


def test_every_import_runs_along_an_arrow_of_the_table() -> None:
    found: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        for other in imported(path):
            if room(other) != room(module) and other:  # the package itself holds a version and lazy names
                found.setdefault(room(module), set()).add(room(other))
                allowed = (ALLOWED | ENTRIES)[room(module)]
                assert room(other) in allowed, f"{module} imports {other}: {room(module)} may not from {room(other)}"
    assert found == {name: arrows for name, arrows in (ALLOWED | ENTRIES).items() if arrows}, "arrows that nobody uses"


def test_no_arrow_runs_in_a_circle() -> None:
    above: set[str] = set()
    for name, arrows in ALLOWED.items():
        assert arrows <= above, f"{name} imports from {arrows - above}, which stand below it"
        above.add(name)


@pytest.mark.parametrize("name", sorted({path.name for path in PACKAGE.rglob("*.py")} - {"__init__.py"}))
def test_a_file_name_stands_for_one_thing(name: str) -> None:
    """Beside that, a subcommand is named as what it is about, and an entry as what it starts or a deprecated name."""
    places = [path.parent for path in PACKAGE.rglob(name) if path != PACKAGE / "megatron" / "compat.py"]
    beside = [place for place in places if place not in (PACKAGE, PACKAGE / "commands")]
    assert len(beside) <= 1, f"{name} stands in {[str(place.relative_to(PACKAGE)) for place in beside]}"
