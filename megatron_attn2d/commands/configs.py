"""`megatron-attn2d configs`: the YAMLs that come with the package."""

import argparse
import shutil
from pathlib import Path
from typing import Any

from megatron_attn2d.config import shipped
from megatron_attn2d.errors import UsageError


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add `configs` to the command line's `commands`, and return its parser."""
    parser = commands.add_parser("configs", help="list or copy the YAMLs that come along", description=_configs.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models/llama_8b.yaml, or a folder; default: all")
    parser.add_argument("--copy", metavar="FOLDER", help="copy them and what they extend here, for changes of your own")
    parser.set_defaults(command=_configs)
    return [parser]


def _configs(args: argparse.Namespace) -> int:
    """List the models, clusters and runs that `extends` and `train` find from any folder, or copy them."""
    known = shipped.names()
    chosen = [name for name in known if not args.names or {name, name.partition("/")[0]} & set(args.names)]
    for asked in args.names:
        if not any(asked in (name, name.partition("/")[0]) for name in chosen):
            raise UsageError(f"{asked}: no such configuration; megatron-attn2d configs lists them")
    if args.copy is None:
        print("\n".join(chosen))
        return 0
    targets = {name: Path(args.copy) / name for name in shipped.with_parents(chosen)}
    for name, target in targets.items():
        if target.exists() and target.read_bytes() != (shipped.folder() / name).read_bytes():
            raise UsageError(f"{target}: exists already, with other content; copy into another folder")
    for name, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shipped.folder() / name, target)
    print("\n".join(map(str, targets.values())))
    return 0
