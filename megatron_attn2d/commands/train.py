"""`megatron-attn2d train`: pretrain what a YAML describes, as one rank of a launcher or with ranks of its own."""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from megatron_attn2d.config import RunConfig, continued, load_run, megatron_arguments, resolved_yaml
from megatron_attn2d.config.arguments import left_out
from megatron_attn2d.config.files import check_files
from megatron_attn2d.config.keys import ORDER, changed, value
from megatron_attn2d.errors import show
from megatron_attn2d.launch import environment
from megatron_attn2d.preview import memory
from megatron_attn2d.preview.topology import picture
from megatron_attn2d.run import checkpoints, lock

_NOT_BY_STEP = {"ckpt_convert_format", "skip_train"}
"""Arguments of Megatron with which it has work to do even after the last step."""


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add `train` to the command line's `commands`, and return its parser."""
    parser = commands.add_parser("train", help="pretrain what a YAML describes", description=_train.__doc__)
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the YAML")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and start nothing")
    parser.set_defaults(command=_train)
    return [parser]


def _train(args: argparse.Namespace) -> int:
    """Pretrain what RUN.yaml describes. Under torchrun or srun this process is one rank; alone, it starts the ranks."""
    world_size = environment.launched_world_size()
    run = load_run(args.run, args.overrides, world_size=world_size)
    arguments = megatron_arguments(run)
    if args.dry_run:
        print(_described(run, arguments))
        memory.check(run)
        return 0
    environment.apply_variables(run.environment.device, run.environment.variables)
    if world_size:
        environment.adopt_launcher()
        return _train_as_rank(run, arguments)
    return _train_alone(run, arguments)


def _described(run: RunConfig, arguments: list[str]) -> str:
    from megatron_attn2d.preview.predictions import waiting_for_the_cpu
    from megatron_attn2d.preview.stock_launch import stock_launch

    lines = " ".join(arguments).replace(" --", "\n--")
    return (
        f"# Run\n{resolved_yaml(run)}\n# Megatron's arguments\n{lines}\n\n# Process grid\n{picture(run)}\n\n"
        f"# Memory\n{memory.report(run)}"
        + "".join(f"\n\n# Speed\n{sentence}" for sentence in waiting_for_the_cpu(run))
        + f"\n\n# The same in Megatron-LM\n{stock_launch(run, arguments)}"
    )


def _train_as_rank(run: RunConfig, arguments: list[str]) -> int:
    environment.check_devices(run.environment.device, environment.local_rank() + 1)
    first = int(os.environ["RANK"]) == 0
    with _prepared(run, first):
        if _is_finished(run, says=first):
            return 0
        from megatron_attn2d.training import pretrain_gpt

        pretrain_gpt.main(arguments)
        return 0


def _train_alone(run: RunConfig, arguments: list[str]) -> int:
    environment.check_devices(run.environment.device, run.world_size)
    with _prepared(run, first=True):
        if _is_finished(run, says=True):
            return 0
        from megatron_attn2d.launch import ranks
        from megatron_attn2d.training import pretrain_gpt

        return ranks.run_local(run.world_size, pretrain_gpt.main, arguments, device=run.environment.device)


@contextmanager
def _prepared(run: RunConfig, first: bool) -> Iterator[None]:
    """While entered, files and data of the run are checked, and its directory is locked.

    The first rank, or the process that starts the ranks, holds the lock, and writes config.yaml into the directory.

    Raises:
        UsageError: a file is missing or does not fit the run, or another training holds the lock.
    """
    from megatron_attn2d.data import docstrings, indexed
    from megatron_attn2d.data.matching import check_data

    check_files(run)
    check_data(run)
    directory = Path(run.directory)
    with lock.held(directory) if first else nullcontext():
        if first:
            for line in _continuation(run):
                print(line)
            with tempfile.NamedTemporaryFile("w", dir=directory, prefix=".config-", delete=False) as scratch:
                scratch.write(resolved_yaml(run))
            Path(scratch.name).replace(directory / "config.yaml")
            checkpoints.repair_tracker(directory / "checkpoints")
        if not (run.data.paths or run.data.mock):
            (docstrings if run.data.format == "sft" else indexed).build_default(run.data.dir)
        yield


def _continuation(run: RunConfig) -> Iterator[str]:
    """Lines on how the run continues from its own checkpoint or another run's: changed keys, data, outdated keys."""
    step = checkpoints.last_complete(Path(run.directory) / "checkpoints")
    before, directory = continued.continued_run(run), continued.continued_directory(run)
    if directory is not None and before is None:
        yield f"{directory}: no config.yaml of this version, so that what has changed since is not looked at"
    if before is not None and (keys := changed(before, run)):
        lines = [f"{key} {show(value(before, key))} -> {show(value(run, key))}" for key in keys]
        yield f"changed, as checkpoint.may_change allows: {', '.join(lines)}"
        if set(keys) & {*ORDER}:
            from megatron_attn2d.data import order

            yield order.describe(before, run, continued.continued_step(run))
    if outdated := left_out(run):
        yield f"left out, as the run goes on from its own step {step}, not from its first start: {', '.join(outdated)}"


def _is_finished(run: RunConfig, says: bool) -> bool:
    """Whether the last step is in a checkpoint, so that Megatron would start, train nothing and end silently."""
    step, steps = checkpoints.last_complete(Path(run.directory) / "checkpoints"), run.training.train_iters
    if step is None or step < steps or any(map(run.megatron_args.get, _NOT_BY_STEP)):
        return False
    if says:
        print(f"step {step} of {steps} is saved: nothing to do")
    return True
