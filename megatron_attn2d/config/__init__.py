"""One YAML describes a run: load it, check it, compile it to Megatron's arguments.

loading.py    files that extend each other and command-line overrides -> one mapping
schema.py     the keys and their types
auto.py       numbers in the place of `auto`
check.py      whether the values fit together, by checks/
read.py       all of this in order: `load_run`
arguments.py  the run as Megatron's command line, and passed_through.py what of Megatron's own arguments joins it
"""

from megatron_attn2d.config.arguments import megatron_arguments
from megatron_attn2d.config.read import load_run, resolved_yaml
from megatron_attn2d.config.schema import RunConfig
from megatron_attn2d.errors import ConfigError

__all__ = ["ConfigError", "RunConfig", "load_run", "megatron_arguments", "resolved_yaml"]
