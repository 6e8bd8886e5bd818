"""One YAML describes a run: load it, check it, compile it to Megatron's arguments.

loading.py    files that extend each other, command-line overrides -> one mapping
schema.py     the keys and their types
check.py      whether the values fit together
arguments.py  Megatron's arguments
"""

from megatron_attn2d.config.arguments import megatron_arguments
from megatron_attn2d.config.read import load_run, resolved_yaml
from megatron_attn2d.config.schema import RunConfig
from megatron_attn2d.errors import ConfigError

__all__ = ["ConfigError", "RunConfig", "load_run", "megatron_arguments", "resolved_yaml"]
