"""`megatron-attn2d plot`: the loss curves of runs."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add `plot` to the command line's `commands`, and return its parser."""
    parser = commands.add_parser("plot", help="draw the loss curves of runs", description=_plot.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("-o", "--output", default="loss.png", metavar="PNG", help="default: %(default)s")
    parser.set_defaults(command=_plot)
    return [parser]


def _plot(args: argparse.Namespace) -> int:
    """Draw the loss curves of runs into one PNG, and print them side by side."""
    from megatron_attn2d.run import curves

    drawn = [curves.read_curve(Path(directory)) for directory in args.runs]
    print(curves.table(drawn))
    curves.draw(drawn, Path(args.output))
    print(f"curves: {args.output}")
    return 0
