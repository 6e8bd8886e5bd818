"""Every command that a file of the repository tells a reader to type: run where that starts nothing, else parsed.

The table is read out of the files: what begins a line, in a comment too, or a span of code, and names our command, a
module or a script of ours.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_attn2d import cli
from megatron_attn2d.commands import data as data_command
from tests.guarantees.drill import DRILLS

ROOT = Path(__file__).resolve().parents[2]
KINDS = {".md", ".yaml", ".sh", ".py", ".sbatch", ""}
PROGRAM = r"(?:python3?|bash|torchrun|megatron-attn2d|pytest|docker) "
LINE = re.compile(rf"^(?:usage: )?(?:sudo )?(?:\w+=\w+ )?(?:\S*bin/)?(?={PROGRAM})")
PLACEHOLDERS = {
    "RUN.yaml": "configs/runs/gpt3_125m_8k.yaml",
    "NAME.yaml": "quickstart.yaml",
    "/opt/megatron_attn2d": str(ROOT),
}
FOLDERS = "benchmarks|scripts|examples"
OURS = re.compile(rf"megatron-attn2d|-m (?:megatron_attn2d|scripts|tests)\b|\b(?:{FOLDERS})/\w+\.|pytest")


def commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """The commands of a file as words, each with its line."""
    variables = {"repository": str(ROOT), "repo_root": str(ROOT)}
    joined = re.sub(r" *\\{1,2}\n\s*#?\s*", " ", text)  # a command on several lines, in a comment too
    for number, line in enumerate(joined.splitlines(), 1):
        line = re.sub(r"^\s*(#|\$|//)? *", "", line)
        if found := re.match(r'(\w+)="(.*?)"|for (\w+) in (\S+) ', line):
            variables[found[1] or found[3]] = found[2] or found[4]
        spans = [line, *re.findall(r"`([^`]*)`", line)]
        for span in spans:
            if LINE.match(span) and OURS.search(span):
                span = re.sub(r"\$\{?(\w+)\}?", lambda name: variables.get(name[1], name[0]), span)
                for placeholder, meant in PLACEHOLDERS.items():
                    span = re.sub(rf"(?<![\w.]){re.escape(placeholder)}", meant, span)
                yield number, words(span)


def words(span: str) -> list[str]:
    """A command's words, without a remark, a redirection and what is written as optional."""
    span = re.split(r"\s{3,}|;| \|\|? | && | >| \[(?:--|key|options|[A-Z])", span)[0]
    return [word for word in shlex.split(span, comments=True) if word != "..."]


def files() -> Iterator[Path]:
    """What a reader may read: no tests, no environments, nothing that runs left behind."""
    yield ROOT / ".ci" / "run"
    for top in sorted(ROOT.iterdir()):
        if top.name[0] != "." and top.name not in {"tests", "runs", "data", "build", "dist", "LICENSE"}:
            yield from (path for path in sorted([top, *top.rglob("*")]) if path.suffix in KINDS and path.is_file())


FOUND = [
    pytest.param(found, id=f"{path.relative_to(ROOT)}:{number}")
    for path in files()
    for number, found in commands(path.read_text(errors="replace"))
]


class _Parsed(Exception):
    """A script's arguments were taken."""


def ours(arguments: list[str]) -> None:
    """`megatron-attn2d` with these arguments."""
    named = arguments[:2] if arguments[0] == "data" else arguments[:1]
    if arguments == named:  # a command's name
        with pytest.raises(SystemExit) as end:
            cli._parse([*named, "--help"])
        assert end.value.code == 0
        return
    if named[0] in {"train", "submit"}:
        arguments = [*dict.fromkeys([*arguments, "--dry-run"])]
    args = cli._parse(arguments)
    if named[0] in {"train", "submit", "plan"}:
        args.output = None  # no picture
        assert args.command(args) == 0
    elif named[0] == "data":
        assert args.command in {data_command._build, data_command._inspect, data_command._needles}


def script(path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A script of ours: whether its parser takes these arguments, or its text knows these options."""
    text = path.read_text()
    if path.name == "fault_drill.sh":
        assert {word.partition("=")[0] for word in arguments} <= DRILLS.keys()
    elif path.name == "test.sh":
        return  # the arguments are pytest's
    elif "parse_args(" in text:
        parse = ArgumentParser.parse_args

        def parsed(self: ArgumentParser, *args: Any) -> Namespace:
            parse(self, *args)
            raise _Parsed

        monkeypatch.setattr(ArgumentParser, "parse_args", parsed)
        monkeypatch.syspath_prepend(path.parent)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(_Parsed):
            runpy.run_path(str(path), run_name="__main__")
    else:
        assert all(word in text for word in arguments if word.startswith("-"))


@pytest.mark.parametrize("found", FOUND)
def test_it_can_be_typed(found: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RANK", raising=False)
    own = next((i for i, word in enumerate(found) if re.fullmatch(rf"({FOLDERS})/\w+\.(py|sh)", word)), None)
    if found[:2] == ["docker", "build"]:
        assert (ROOT / found[found.index("-f") + 1]).exists()
    elif "-m" in found and "pytest" not in found:
        module, *arguments = found[found.index("-m") + 1 :]
        if module == "megatron_attn2d.cli":
            ours(arguments)
        else:
            assert importlib.util.find_spec(module) is not None
    elif own is not None:
        script(ROOT / found[own], found[own + 1 :], monkeypatch)
    elif "pytest" in found:
        paths = [word for word in found[found.index("pytest") :] if "/" in word]
        assert all((ROOT / path.partition("::")[0]).exists() for path in paths)
    else:
        ours(found[found.index("megatron-attn2d") + 1 :])


def test_the_tests_that_keep_our_promises_exist() -> None:
    named = set(re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "guarantees.md").read_text()))
    places = [ROOT / "tests" / "guarantees", ROOT / "tests", ROOT]
    assert len(named) >= 20
    assert {name for name in named if not any((place / name).exists() for place in places)} == set()


def test_the_tests_beside_upstreams_own_exist() -> None:
    """Files, and tests and rows of tables within them, in the third column of docs/upstream_tests.md."""
    rows = [
        line.split(" | ") for line in (ROOT / "docs" / "upstream_tests.md").read_text().splitlines() if line[:1] == "|"
    ]
    named = {name for row in rows if len(row) >= 4 for name in re.findall(r"`([^`]+)`", row[2])}
    files = {name for name in named if name.endswith(".py")}
    assert len(files) >= 10
    assert {name for name in files if not any((place / name).exists() for place in (ROOT / "tests", ROOT))} == set()
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    assert {name for name in named - files if name not in written} == set()


def test_the_table_has_every_page() -> None:
    """A pattern that no longer matches must not empty the table without a word."""
    pages = {parameter.id.partition(":")[0] for parameter in FOUND}
    assert {"README.md", "configs/README.md", "docs/multi_gpu.md", "docs/attention_gpu.md", "docker/README.md"} <= pages
    assert {"configs/runs/gpt3_125m_8k.yaml", "scripts/slurm/README.md", "examples/device_mesh.py", ".ci/run"} <= pages
    assert len(FOUND) >= 70
