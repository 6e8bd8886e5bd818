"""Keeps the checkpoints of a run in order while upstream saves them; see `megatron_attn2d.checkpoints`."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_attn2d import checkpoints
from megatron_attn2d.megatron.patching import Patch, applied


@contextmanager
def retained(args: Namespace) -> Iterator[None]:
    """While entered, an overwritten checkpoint counts as incomplete until it is saved, and `--keep-last` is kept."""

    def around(save_checkpoint: Any) -> Any:
        @functools.wraps(save_checkpoint)
        def save(iteration: int, *rest: Any, **kwargs: Any) -> Any:
            if args.rank == 0 and not kwargs.get("non_persistent_ckpt"):
                checkpoints.begin_save(Path(args.save), iteration)
            result = save_checkpoint(iteration, *rest, **kwargs)
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
