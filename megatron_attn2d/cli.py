"""The command `megatron-attn2d`: its subcommands are the files of `megatron_attn2d.commands`."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any, NoReturn

from megatron_attn2d import __version__
from megatron_attn2d.commands import configs, data, evaluate, generate, plan, plot, report, submit, train
from megatron_attn2d.errors import UsageError

_COMMANDS = (train, configs, plot, plan, data, report, evaluate, generate, submit)
"""In the order in which `--help` lists them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`; the exit code. A user's mistake is 2, with one message and no traceback."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    try:
        return int(args.command(args))
    except UsageError as error:
        if args.debug:
            raise
        print("\n".join(f"megatron-attn2d: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except OSError as error:
        # Of a rank's failure the traceback tells where training was; without a file it is no matter of a path.
        if args.debug or error.filename is None or "RANK" in os.environ:
            raise
        print(f"megatron-attn2d: {os.fsdecode(error.filename)}: {error.strerror}", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-attn2d", description="GPT pretraining with 2D context parallelism.")
    parser.add_argument("--version", action=_Version, help="show the versions of this package and of what it rests on")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in _COMMANDS:
        for command in module.add(commands):
            command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    # Intermixed, so that options may stand between overrides.
    known, extra = parser.parse_known_args(argv)
    if unknown := [word for word in extra if word.startswith("-") or "overrides" not in known]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if extra:
        known.overrides += extra
    return known


class _Version(argparse.Action):
    """Looks versions up only where they are asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"{parser.prog} {__version__}")
        for package in ("megatron-core", "torch", "transformer-engine", "flash-attn-4"):
            with suppress(metadata.PackageNotFoundError):
                print(f"{package} {metadata.version(package)}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
