"""Reads and writes YAML: the core schema of YAML 1.2, one document without tags and anchors, and no key twice.

PyYAML follows YAML 1.1, where `1e-4` is a string, `no` is false, `010` is 8 and `1:30` is 90. The loader and the dumper
here share the rules of YAML 1.2 instead, so that what is written reads back as it was.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_attn2d.errors import ConfigError

_INT = re.compile(r"[-+]?[0-9]{1,30}|0x[0-9a-fA-F]{1,16}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,4})?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_SCALARS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": _INT,
    "float": _FLOAT,
}
_IMPLICIT = {
    None: [(f"tag:yaml.org,2002:{kind}", re.compile(f"(?:{pattern.pattern})$")) for kind, pattern in _SCALARS.items()]
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _IMPLICIT

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            # An alias may hold itself or grow without bound; `extends` serves the purpose.
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not supported", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="a key must be a plain name", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} occurs twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value, 16 if node.value.startswith("0x") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _IMPLICIT

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def parse(text: str, source: str) -> Any:
    """The value that `text` holds.

    Raises:
        ConfigError: `text` is no valid YAML; names `source`.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        raise ConfigError(where, reason=f"not valid YAML: {error.problem or error.context}", has_value=False) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(source, reason=f"not valid YAML: {reason}", has_value=False) from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that the file at `path` holds, {} for an empty file.

    Raises:
        ConfigError: the file can't be read, is no valid YAML, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"not UTF-8 text ({error})"
        siblings = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        choice = (
            f"there are {', '.join(siblings)}" if siblings else "megatron-attn2d configs lists those that come along"
        )
        raise ConfigError(str(path), reason=reason, choice=choice, has_value=False) from error
    content = parse(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(str(path), reason="must hold a mapping of sections", has_value=False)
    return content


def dump(content: dict[str, Any]) -> str:
    """`content` as YAML that `parse` reads back unchanged."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)
