"""Puts pydantic's errors into words for someone who writes YAML."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_attn2d.config.schema import RunConfig
from megatron_attn2d.errors import ConfigError, nearest

_BY_KEY = {
    "context_parallel.grid": ("not a grid", "write auto, [rows, columns] or [heads, rows, columns]"),
    "data.paths": ("not a list of prefixes, nor a blend", "write [prefix, ...] or {prefix: weight, ...}"),
    "data.split": ("not three weights", "write 98,1,1"),
    "slurm.sbatch": ("not options of sbatch", "write {long-name: value, ...}"),
    "slurm.srun": ("not options of srun", "write {long-name: value, ...}"),
    "environment.variables": ("not environment variables", 'write {NAME: "value", ...}'),
}
_BY_TYPE = {
    "int_type": ("not an integer", "write 8, without quotes or a decimal point"),
    "float_type": ("not a number", "write 0.1 or 1e-4, without quotes"),
    "bool_type": ("not a boolean", "write true or false"),
    "string_type": ("not a string", "write it in quotes"),
    "string_pattern_mismatch": ("holds characters that a name or path must not", "use letters, digits and . _ + -"),
}


def explain(error: ValidationError, content: Mapping[str, Any]) -> list[ConfigError]:
    """A ConfigError for each key of `content` that `error` concerns, in the order of the errors."""
    findings: dict[str, tuple[str, str]] = {}
    for details in error.errors(include_url=False):
        # A union reports an error per member that did not fit, all of one key: the first is enough.
        findings.setdefault(_key(details["loc"]), (details["type"], details["msg"]))
    return [_explained(key, kind, message, content) for key, (kind, message) in findings.items()]


def _key(location: tuple[int | str, ...]) -> str:
    """The key "section.name" at pydantic's `location`, without the parts for list items and members of unions."""
    names: list[str] = []
    model: Any = RunConfig
    for part in location:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            break
        names.append(str(part))
        model = field.annotation if (field := model.model_fields.get(str(part))) else None
    return ".".join(names)


def _explained(key: str, kind: str, message: str, content: Mapping[str, Any]) -> ConfigError:
    section, _, name = key.rpartition(".")
    if kind == "extra_forbidden":
        return ConfigError(key, reason="unknown key", choice=_suggestion(section, name), has_value=False)
    if kind == "missing":
        return ConfigError(key, reason="missing", choice="every run needs it", has_value=False)
    value = content[section][name] if section else content[name]
    if kind == "model_type":
        return ConfigError(key, value, "not a section", f"write its keys below {key}:")
    if key == "context_parallel.mode" and (grid := re.fullmatch(r"attention2d:(\d+(?:x\d+){1,2})", str(value))):
        numbers = grid[1].replace("x", ", ")
        return ConfigError(key, value, "a grid has a key of its own", f"write mode: attention2d and grid: [{numbers}]")
    if kind == "literal_error" and key not in _BY_KEY:
        return ConfigError(key, value, "no such choice", message.replace("Input should be", "choose").replace("'", ""))
    reason, choice = _BY_KEY.get(key) or _BY_TYPE.get(kind) or (message.replace("Input should", "must"), "")
    return ConfigError(key, value, reason, choice)


def _suggestion(section: str, name: str) -> str:
    """What to write instead of an unknown key: the section that has this name, else the nearest name in `section`."""
    sections = {title: getattr(field.annotation, "model_fields", {}) for title, field in RunConfig.model_fields.items()}
    for title, keys in sections.items():
        if title == section and name in keys:  # the key in the file holds the dot
            return f"write {name} below {title}:"
        if name in keys:
            return f"did you mean {title}.{name}?"
    return nearest(name, sections.get(section, sections))
