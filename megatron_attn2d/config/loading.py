"""Merges files and `key.sub=value` overrides into one plain mapping.

A key may stand in several places: in the extended files, in order, then in the file itself, then on the command line.
One rule holds: *a section merges, a value replaces*. A section is a heading at the margin (`model:`, `data:`,
`megatron_args:`). Everything below a section is a value, and is replaced as a whole: a number, a list, a blend, a table
of options.

    data: {paths: {c: 1.0}}         data.paths={c: 1.0}         the blend is c, whatever stood there before
    data: {paths+: {c: 1.0}}        data.paths+={c: 1.0}        c is added to the blend, or has this weight from now on
    data: {paths+: [c]}             data.paths+=[c]             c is added to the list
                                    slurm.sbatch.time=60        one entry of a table, as slurm.sbatch+={time: 60}
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_attn2d.config.shipped import found
from megatron_attn2d.config.yaml_io import parse, read_mapping
from megatron_attn2d.errors import ConfigError, show


def read_run(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping that `path` describes: the files that it extends, in order, then itself, then the overrides.

    Files that come with the package are found from any folder: see `shipped.found`.

    Raises:
        ConfigError: a file can't be read or is no mapping of sections, files extend each other in a circle, or an
            override is malformed.
    """
    content = _read_extended(found(path), ())
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
        _merge(merged, _read_extended(found(Path(parent), path.parent), (*above, resolved)))
    _merge(merged, own)
    return merged


def _merge(base: dict[str, Any], update: dict[str, Any]) -> None:
    """Merge `update` into `base`, key by key: a value replaces, or adds to the one before if its key ends with +."""
    for title, section in update.items():
        if section is None and isinstance(base.get(title), dict):
            continue  # a heading with nothing below it changes nothing
        if not isinstance(section, dict):
            base[title] = section
            continue
        merged = dict(held) if isinstance(held := base.get(title), dict) else {}
        for key, value in section.items():
            name = key.removesuffix("+")
            if name == key:
                merged[name] = value
            elif name in section:
                raise ConfigError(f"{title}.{name}", section[name], "is given with + and without", "keep one")
            else:
                merged[name] = _sum(f"{title}.{key}", merged.get(name), value)
        base[title] = merged


def _sum(key: str, held: Any, more: Any) -> Any:
    """The sum of two lists or of two tables; `more` alone where `held` is None."""
    if not isinstance(more, list | dict):
        raise ConfigError(key, more, "not a list or a table, which alone can be added to", f"write {key[:-1]}")
    if held is None:
        return more
    if isinstance(held, list) and isinstance(more, list):
        return held + more
    if isinstance(held, dict) and isinstance(more, dict):
        return held | more
    kind = "a list" if isinstance(held, list) else "a table" if isinstance(held, dict) else show(held)
    raise ConfigError(key, more, f"{key[:-1]} is {kind} so far", f"add the same kind, or replace it: {key[:-1]}")


def _apply(content: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    path = dotted.split(".")
    if not equals or not all(path):
        raise ConfigError(override, reason="not an override", choice="write key.sub=value", has_value=False)
    if dotted == "extends":
        raise ConfigError(override, reason="extends belongs in a file", choice="name the file there", has_value=False)
    value = parse(text, f"override {override!r}")
    above: Any = content
    for depth, name in enumerate(path[:-1][:2], 1):
        above = above.get(name) or {}
        if not isinstance(above, dict):
            there = ".".join(path[:depth])
            raise ConfigError(
                override, reason=f"{there} is a value, not a section", choice=f"write {there}=...", has_value=False
            )
    if len(path) > 2:  # an entry of a table, such as a blend, whose name may hold dots
        path, value = [path[0], f"{path[1]}+"], {".".join(path[2:]): value}
    for name in reversed(path):
        value = {name: value}
    _merge(content, _with_underscores(value))


def _with_underscores(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with the keys of megatron_args spelled with underscores, as the rest of the package reads them."""
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
