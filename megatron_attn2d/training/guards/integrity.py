"""Compares a checkpoint with its checksums before anything of it is read.

Upstream writes the checksums (`--verify-integrity`), but compares them after it has read the checkpoint's metadata and
arguments. There a flipped byte shows as an error of some parser. Upstream also refuses a checkpoint without checksums.
"""

from __future__ import annotations

import functools
import logging
from argparse import Namespace
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_attn2d.megatron.upstream.patching import Patch, applied
from megatron_attn2d.run import checkpoints

logger = logging.getLogger(__name__)


class CorruptCheckpointError(ValueError):
    """A file of a checkpoint is not the one that was saved."""


def verified() -> AbstractContextManager[None]:
    """While entered, checkpoints are verified before they are loaded."""

    def verify_first(load_checkpoint: Any) -> Any:
        @functools.wraps(load_checkpoint)
        def load(
            ddp_model: Any, optimizer: Any, scheduler: Any, load_arg: str = "load", *rest: Any, **kwargs: Any
        ) -> Any:
            from megatron.training import get_args

            args = get_args()
            if (checkpoint := checkpoint_to_load(args, load_arg)) is not None:
                verify(checkpoint)
            with mock.patch.object(args, "verify_integrity", False):
                return load_checkpoint(ddp_model, optimizer, scheduler, load_arg, *rest, **kwargs)

        return load

    reason = "upstream compares checksums only after it has read what may be corrupt"
    return applied([Patch("megatron.training.training:load_checkpoint", verify_first, reason)])


def checkpoint_to_load(args: Namespace, load_arg: str = "load") -> Path | None:
    """The folder that upstream's load_checkpoint reads; None where it loads nothing.

    Args:
        args: Megatron's arguments.
        load_arg: the argument that names the directory of the checkpoints.
    """
    for directory in (getattr(args, load_arg), args.pretrained_checkpoint):
        if directory and (tracker := Path(directory, checkpoints.TRACKER)).is_file():
            if args.ckpt_step is None and tracker.read_text().strip() == "release":
                return Path(directory, "release")
            step = checkpoints.tracked(Path(directory)) if args.ckpt_step is None else args.ckpt_step
            return None if step is None else checkpoints.folder(Path(directory), step)
    return None


def verify(checkpoint: Path) -> None:
    """Compare the files of a checkpoint with its checksums. All ranks must call it; rank 0 reads the files.

    Raises:
        CorruptCheckpointError: a file differs, or the checksums can't be read; names the files.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    if not checkpoint.is_dir():
        return  # upstream reports it
    checksums = checkpoint / checkpoints.CHECKSUMS
    if not checksums.is_file():
        logger.warning("%s was saved without checksums: it is loaded unverified", checkpoint)
        return
    try:
        verify_integrity_manifest(str(checkpoint))
    except CheckpointingException as error:
        tracker = checkpoint.parent / checkpoints.TRACKER
        raise CorruptCheckpointError(f"{error}\nTo go on from another step, write it into {tracker}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{checksums} can't be read ({error})") from error
