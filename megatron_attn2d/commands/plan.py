"""`megatron-attn2d plan`: predicted time, bytes and memory of every mode and grid on the YAML's cluster."""

import argparse
from pathlib import Path
from typing import Any

from megatron_attn2d.config import load_run


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add `plan` to the command line's `commands`, and return its parser."""
    parser = commands.add_parser("plan", help="predict modes and grids for a YAML", description=_plan.__doc__)
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the YAML")
    parser.add_argument("-o", "--output", metavar="PNG", help="draw predicted speed-ups here")
    parser.add_argument("--growth", metavar="PNG", help="draw time and bytes at 16 to 4,096 context ranks here")
    parser.set_defaults(command=_plan)
    return [parser]


def _plan(args: argparse.Namespace) -> int:
    """Predict time, bytes and memory of a layer's attention for every mode and grid on the YAML's cluster."""
    from megatron_attn2d.preview import growth, predictions

    run = load_run(args.run, args.overrides)
    print(predictions.report(run))
    if args.growth:
        found = growth.growth(run)
        print(f"\n{growth.table(found, run)}")
        growth.draw(found, run, Path(args.growth))
        print(f"growth: {args.growth}")
    if args.output:
        predictions.draw(run, Path(args.output))
        print(f"speed-ups: {args.output}")
    return 0
