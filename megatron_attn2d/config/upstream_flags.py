"""A table of Megatron's own arguments, so that a check need not import Megatron, which takes seconds.

`upstream_flags.json` lists them for the version that requirements.lock pins;
`python -m megatron_attn2d.config.upstream_flags` rewrites it. Under any other version, and for values that a function
of Megatron converts, Megatron's parser is asked.
"""

import contextlib
import importlib.metadata
import io
import json
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from megatron_attn2d.megatron.upstream.quiet_imports import quiet_import

_TABLE = "upstream_flags.json"
_TYPES: dict[str, type] = {"int": int, "float": float, "str": str}


@dataclass(frozen=True)
class Option:
    """An argument of Megatron: the attribute that stores it, how many values it takes, their type and choices.

    `nargs`, `type` and `default` are argparse's. The type "megatron" stands for a function of Megatron. A default that
    is no plain value is given as text. `group` is the title under which Megatron's help shows the argument.
    """

    dest: str
    nargs: int | str | None = None
    type: str | None = None
    choices: list[Any] | None = None
    default: Any = None
    group: str | None = None


def installed() -> str:
    """The installed version of Megatron-Core."""
    return importlib.metadata.version("megatron-core")


@cache
def options() -> dict[str, Option]:
    """Megatron's arguments by their flags."""
    table = json.loads(resources.files(__package__).joinpath(_TABLE).read_text())
    if table["megatron-core"] != installed():
        return described()
    return {flag: Option(**fields) for flag, fields in table["flags"].items()}


def given(arguments: Sequence[str]) -> dict[str, tuple[str, list[str]]]:
    """Megatron's arguments on a command line, by the attribute that stores them: each one's flag and values."""
    known: dict[str, Option] = options()
    found: dict[str, tuple[str, list[str]]] = {}
    values: list[str] = []
    for token in arguments:
        if not token.startswith("--"):
            values.append(token)
            continue
        flag, equals, value = token.partition("=")
        values = [value] if equals else []
        if flag in known:
            found[known[flag].dest] = flag, values
    return found


def described() -> dict[str, Option]:
    """Megatron's arguments, read from its parser."""
    found = {}
    titles = {id(action): group.title for group in parser()._action_groups for action in group._group_actions}
    for flag, action in parser()._option_string_actions.items():
        kind = getattr(action.type, "__name__", None)
        choices = None if action.choices is None else list(action.choices)
        plain = all(isinstance(choice, str | int | float) for choice in choices or ())
        if not plain or (action.type is not None and action.type is not _TYPES.get(str(kind))):
            kind, choices = "megatron", None
        if isinstance(action, BooleanOptionalAction):
            kind = None
        default = action.default if isinstance(action.default, bool | int | float | str | list | None) else None
        if default is not action.default:
            default = str(action.default)
        found[flag] = Option(action.dest, action.nargs, kind, choices, default, titles.get(id(action)))
    return found


def refusal(flag: str, tokens: list[str]) -> str | None:
    """Why argparse refuses `tokens`, which are `flag` and its values; None where it takes them."""
    option = options()[flag]
    if option.nargs == 0:
        return None
    if option.type == "megatron":
        asked = parser()
    else:
        asked = _Parser(allow_abbrev=False, exit_on_error=False, add_help=False)
        kind = _TYPES.get(option.type or "str", str)
        asked.add_argument(flag, dest=option.dest, nargs=option.nargs, type=kind, choices=option.choices)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            asked.parse_args(tokens)
    except (Exception, SystemExit) as error:  # a type of Megatron may raise anything
        return str(error)
    return None


class _Parser(ArgumentParser):
    """Raises the message of a wrong argument, where argparse prints it and exits."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


@cache
def parser() -> ArgumentParser:
    """Megatron's parser; importing it takes seconds."""
    arguments = quiet_import("megatron.training.arguments")
    return arguments.add_megatron_arguments(_Parser(allow_abbrev=False, exit_on_error=False))


def _write(path: Path) -> None:
    def shortened(option: Option) -> dict[str, Any]:
        return {name: value for name, value in asdict(option).items() if value is not None}

    lines = [f"    {json.dumps(flag)}: {json.dumps(shortened(option))}" for flag, option in sorted(described().items())]
    version = json.dumps(installed())
    path.write_text(f'{{\n  "megatron-core": {version},\n  "flags": {{\n' + ",\n".join(lines) + "\n  }\n}\n")


if __name__ == "__main__":
    _write(Path(__file__).with_name(_TABLE))
