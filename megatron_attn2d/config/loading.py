"""From files and `key.sub=value` overrides to one plain mapping."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_attn2d.config.errors import ConfigError
from megatron_attn2d.config.yaml_io import parse, read_mapping


def read_run(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping that `path` describes: the files it extends, in order, then itself, then the overrides."""
    content = _read_extended(path, ())
    for override in overrides:
        _apply(content, override)
    return content


def _read_extended(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    try:
        resolved = path.resolve()
    except (OSError, ValueError) as error:
        raise ConfigError("extends", str(path), f"not a path ({error})") from error
    if resolved in above:
        chain = " -> ".join(p.name for p in (*above, resolved))
        raise ConfigError("extends", str(path), f"files extend each other in a circle ({chain})", "break the circle")
    own = _with_underscores(read_mapping(path))
    parents = own.pop("extends", None) or []
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError("extends", parents, f"in {path}: not a list of files", "write [models/gpt.yaml, ...]")
    merged: dict[str, Any] = {}
    for parent in parents:
        _merge(merged, _read_extended(path.parent / parent, (*above, resolved)))
    _merge(merged, own)
    return merged


def _merge(base: dict[str, Any], update: dict[str, Any]) -> None:
    """Lay `update` over `base`: mappings key by key, anything else replaced."""
    for key, value in update.items():
        if isinstance(base.get(key), dict) and isinstance(value, dict):
            _merge(base[key], value)
        elif isinstance(base.get(key), dict) and value is None:
            continue  # a heading with nothing below it changes nothing
        else:
            base[key] = value


def _apply(content: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *sections, key = dotted.split(".")
    if not equals or not all([*sections, key]):
        raise ConfigError(override, reason="not an override", choice="write key.sub=value", has_value=False)
    if dotted == "extends":
        raise ConfigError(override, reason="extends belongs in a file", choice="name the file there", has_value=False)
    target = content
    for depth, section in enumerate(sections, 1):
        if target.get(section) is None:
            target[section] = {}
        if not isinstance(target[section], dict):
            name = ".".join(sections[:depth])
            raise ConfigError(
                override, reason=f"{name} is a value, not a section", choice=f"write {name}=...", has_value=False
            )
        target = target[section]
    value = parse(text, f"override {override!r}")
    if sections == ["megatron_args"]:
        key = key.replace("-", "_")
    target[key] = _with_underscores({key: value})[key] if not sections else value


def _with_underscores(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with one spelling of each key of megatron_args, as all that look there know only that one."""
    arguments = content.get("megatron_args")
    if not isinstance(arguments, dict):
        return content
    spelt: dict[str, Any] = {}
    for name, value in arguments.items():
        key = str(name).replace("-", "_")
        if key in spelt:
            raise ConfigError(f"megatron_args.{key}", value, "is given with hyphens and with underscores", "keep one")
        spelt[key] = value
    return {**content, "megatron_args": spelt}
