"""The command `megatron-attn2d`."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from megatron_attn2d import __version__, checkpoints, environment, evaluate, memory, run_lock
from megatron_attn2d import report as run_report
from megatron_attn2d.config import RunConfig, continued, load_run, megatron_arguments, resolved_yaml
from megatron_attn2d.config.arguments import left_out
from megatron_attn2d.config.errors import UsageError, show
from megatron_attn2d.config.files import check_files
from megatron_attn2d.config.keys import ORDER, changed, value
from megatron_attn2d.corpus import command as corpus
from megatron_attn2d.slurm import submit
from megatron_attn2d.topology import picture

_NOT_BY_STEP = {"ckpt_convert_format", "skip_train"}
"""Arguments of Megatron's under which it has something to do after the last step too."""


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

    train = commands.add_parser("train", help="pretrain what a YAML describes", description=_train.__doc__)
    train.add_argument("run", metavar="RUN.yaml")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the YAML")
    train.add_argument("--dry-run", action="store_true", help="print what would run, and start nothing")
    train.set_defaults(command=_train)

    plot = commands.add_parser("plot", help="draw the loss curves of runs", description=_plot.__doc__)
    plot.add_argument("runs", nargs="+", metavar="RUN_DIR")
    plot.add_argument("-o", "--output", default="loss.png", metavar="PNG", help="default: %(default)s")
    plot.set_defaults(command=_plot)

    plan = commands.add_parser("plan", help="predict modes and grids for a YAML", description=_plan.__doc__)
    plan.add_argument("run", metavar="RUN.yaml")
    plan.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the YAML")
    plan.add_argument("-o", "--output", metavar="PNG", help="draw predicted speed-ups here")
    plan.add_argument("--growth", metavar="PNG", help="draw time and bytes at 16 to 4,096 context ranks here")
    plan.set_defaults(command=_plan)

    added = [*corpus.add(commands), *run_report.add(commands), *evaluate.add(commands)]
    for command in (train, plot, plan, *added, *submit.add(commands)):
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


def _train(args: argparse.Namespace) -> int:
    """Pretrain what RUN.yaml describes. Under torchrun or srun this process is one rank; alone, it starts the ranks."""
    world_size = environment.launched_world_size()
    run = load_run(args.run, args.overrides, world_size=world_size)
    arguments = megatron_arguments(run)
    if args.dry_run:
        print(_described(run, arguments))
        return 0
    environment.apply_variables(run.environment.device, run.environment.variables)
    if world_size:
        environment.adopt_launcher()
        return _train_as_rank(run, arguments)
    return _train_alone(run, arguments)


def _described(run: RunConfig, arguments: list[str]) -> str:
    from megatron_attn2d.planner.report import waiting_for_the_cpu

    lines = " ".join(arguments).replace(" --", "\n--")
    return (
        f"# Run\n{resolved_yaml(run)}\n# Megatron's arguments\n{lines}\n\n# Process grid\n{picture(run)}\n\n"
        f"# Memory\n{memory.report(run)}" + "".join(f"\n\n# Speed\n{sentence}" for sentence in waiting_for_the_cpu(run))
    )


def _train_as_rank(run: RunConfig, arguments: list[str]) -> int:
    environment.check_devices(run.environment.device, environment.local_rank() + 1)
    first = int(os.environ["RANK"]) == 0
    with _prepared(run, first):
        if _is_finished(run, says=first):
            return 0
        from megatron_attn2d import pretrain_gpt

        pretrain_gpt.main(arguments)
        return 0


def _train_alone(run: RunConfig, arguments: list[str]) -> int:
    environment.check_devices(run.environment.device, run.world_size)
    with _prepared(run, first=True):
        if _is_finished(run, says=True):
            return 0
        from megatron_attn2d import launch, pretrain_gpt

        return launch.run_local(run.world_size, pretrain_gpt.main, arguments, device=run.environment.device)


@contextmanager
def _prepared(run: RunConfig, first: bool) -> Iterator[None]:
    """The run's data and, by its first rank or its launcher, its directory: locked, with its resolved configuration."""
    from megatron_attn2d import data
    from megatron_attn2d.corpus.matching import check_data

    check_files(run)
    check_data(run)
    directory = Path(run.directory)
    with run_lock.held(directory) if first else nullcontext():
        if first:
            for line in _continuation(run):
                print(line)
            with tempfile.NamedTemporaryFile("w", dir=directory, prefix=".config-", delete=False) as scratch:
                scratch.write(resolved_yaml(run))
            Path(scratch.name).replace(directory / "config.yaml")
            checkpoints.repair_tracker(directory / "checkpoints")
        if not (run.data.paths or run.data.mock):
            data.build_default(run.data.dir)
        yield


def _continuation(run: RunConfig) -> Iterator[str]:
    """What a user should know about how the run goes on from its checkpoint or that of another."""
    step = checkpoints.last_complete(Path(run.directory) / "checkpoints")
    before, directory = continued.begun(run), continued.begun_in(run)
    if directory is not None and before is None:
        yield f"{directory}: no config.yaml of this version, so that what has changed since is not looked at"
    if before is not None and (keys := changed(before, run)):
        lines = [f"{key} {show(value(before, key))} -> {show(value(run, key))}" for key in keys]
        yield f"changed, as checkpoint.may_change allows: {', '.join(lines)}"
        if set(keys) & {*ORDER}:
            from megatron_attn2d import data_order

            yield data_order.told(before, run, continued.step_of(run))
    if outdated := left_out(run):
        yield f"left out, as the run goes on from its own step {step}, not from its first start: {', '.join(outdated)}"


def _is_finished(run: RunConfig, says: bool) -> bool:
    """Whether the last step is in a checkpoint, so that Megatron would start, train nothing and end without a word."""
    step, steps = checkpoints.last_complete(Path(run.directory) / "checkpoints"), run.training.train_iters
    if step is None or step < steps or any(map(run.megatron_args.get, _NOT_BY_STEP)):
        return False
    if says:
        print(f"step {step} of {steps} is saved: nothing to do")
    return True


def _plan(args: argparse.Namespace) -> int:
    """Predict time, bytes and memory of a layer's attention for every mode and grid on the YAML's cluster."""
    from megatron_attn2d.planner import growth, report

    run = load_run(args.run, args.overrides)
    print(report.report(run))
    if args.growth:
        found = growth.growth(run)
        print(f"\n{growth.table(found, run)}")
        growth.draw(found, run, Path(args.growth))
        print(f"growth: {args.growth}")
    if args.output:
        report.draw(run, Path(args.output))
        print(f"speed-ups: {args.output}")
    return 0


def _plot(args: argparse.Namespace) -> int:
    """Draw the loss curves of runs into one PNG, and print them side by side."""
    from megatron_attn2d import plot

    curves = [plot.read_curve(Path(directory)) for directory in args.runs]
    print(plot.table(curves))
    plot.draw(curves, Path(args.output))
    print(f"curves: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
