"""Keeps the checkpoints of a run in order while upstream saves them; see `megatron_attn2d.run.checkpoints`."""

from __future__ import annotations

import functools
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_attn2d.megatron.upstream.patching import Patch, applied
from megatron_attn2d.run import checkpoints


class SaveError(RuntimeError):
    """A checkpoint could not be written, for example for want of space; the checkpoints before it are untouched."""


def _failure(directory: Path, step: int, error: BaseException) -> str:
    last = checkpoints.last_complete(directory)
    left = "there is none to continue from" if last is None else f"step {last} is whole: continue from it"
    free = shutil.disk_usage(directory).free / 2**30
    reason = str(error).strip().splitlines()[-1:]
    return f"step {step} could not be saved to {directory} ({free:.1f} GiB free): {''.join(reason)}; {left}"


@contextmanager
def retained(args: Namespace) -> Iterator[None]:
    """While entered, the run's checkpoints are kept in order.

    An overwritten checkpoint counts as incomplete until it is saved, each has the configuration beside it that it was
    trained with, and those beyond `--keep-last` are deleted. A failed save raises SaveError.
    """

    def around(save_checkpoint: Any) -> Any:
        @functools.wraps(save_checkpoint)
        def save(iteration: int, *rest: Any, **kwargs: Any) -> Any:
            keeps = args.rank == 0 and not kwargs.get("non_persistent_ckpt")
            if keeps:
                checkpoints.begin_save(Path(args.save), iteration)
            try:
                result = save_checkpoint(iteration, *rest, **kwargs)
                if keeps and args.run_dir:
                    checkpoints.keep_configuration(Path(args.save), iteration, Path(args.run_dir))
            except (Exception, CheckpointException) as error:  # torch's is no Exception
                raise SaveError(_failure(Path(args.save), iteration, error)) from error
            prune()
            return result

        return save

    def prune() -> None:
        if args.rank == 0 and args.save and args.keep_last:
            checkpoints.prune(Path(args.save), args.keep_last)

    reason = "upstream overwrites a checkpoint in place, and keeps all of them or those of an interval"
    with applied([Patch("megatron.training.training:save_checkpoint", around, reason)]):
        try:
            yield
        finally:
            prune()  # an asynchronous save ends after its call
