"""`megatron-attn2d report`: loss and throughput of runs, side by side."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add `report` to the command line's `commands`, and return its parser."""
    parser = commands.add_parser("report", help="loss and throughput of runs", description=_report.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("-o", "--output", default="report.png", metavar="PNG", help="default: %(default)s")
    parser.set_defaults(command=_report)
    return [parser]


def _report(args: argparse.Namespace) -> int:
    """Draw loss and throughput of runs into one PNG, and print a row for each."""
    from megatron_attn2d.run.comparison import draw, read_runs, table

    runs = read_runs([Path(directory) for directory in args.runs])
    print(table(runs))
    draw(runs, Path(args.output))
    print(f"curves: {args.output}")
    return 0
