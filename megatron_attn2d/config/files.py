"""Checks that the files that a run reads exist and that it can write its directories, before processes start."""

import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from megatron_attn2d.config.continued import check_continued
from megatron_attn2d.config.prefixes import is_complete
from megatron_attn2d.config.schema import RunConfig
from megatron_attn2d.errors import ConfigError, ConfigErrors
from megatron_attn2d.run import checkpoints


def check_files(run: RunConfig) -> None:
    """Raise ConfigError, naming each key with its path, the reason and a way out, if files of `run` are missing."""
    # Whether a directory can be made is known by making it, which only a run without other errors should do.
    if errors := [*_data(run), *_checkpoint(run), *check_continued(run)] or [*_directories(run)]:
        raise ConfigErrors(errors)


def _data(run: RunConfig) -> Iterator[ConfigError]:
    for prefix in run.data.paths:
        if not is_complete(Path(prefix)):
            reason = f"{prefix}.bin and {prefix}.idx are not both there"
            yield ConfigError("data.paths", prefix, reason, "build it: megatron-attn2d data build")
    tokenizer = run.data.tokenizer_model
    if tokenizer and run.data.tokenizer_type != "NullTokenizer" and not Path(tokenizer).exists():
        yield ConfigError(
            "data.tokenizer_model", tokenizer, "there is no such file or folder", "name one on local disk"
        )


def _checkpoint(run: RunConfig) -> Iterator[ConfigError]:
    """Errors in the checkpoints of another run, which only a first start reads."""
    if checkpoints.last_complete(Path(run.directory) / "checkpoints") is not None:
        return
    for key in ("checkpoint.load", "checkpoint.start_from"):
        if not (directory := attrgetter(key)(run)):
            continue
        path, asked = Path(directory), run.megatron_args.get("ckpt_step")
        if not (path / checkpoints.TRACKER).is_file():
            # Megatron would begin with random weights.
            reason = f"there is no checkpoint in it, as it holds no {checkpoints.TRACKER}"
            below = path / "checkpoints"
            choice = str(below) if (below / checkpoints.TRACKER).is_file() else "the folder that another run saves to"
            yield ConfigError(key, directory, reason, f"name {choice}, or null")
            continue
        step = checkpoints.tracked(path) if asked is None else asked
        if isinstance(step, int) and not checkpoints.folder(path, step).is_dir():
            there = ", ".join(map(str, checkpoints.complete(path))) or "none"
            whose = f"{path / checkpoints.TRACKER} names it, but " if asked is None else ""
            reason = f"{whose}there is no checkpoint of that step in {directory}"
            yield ConfigError("megatron_args.ckpt_step", step, reason, f"complete ones: {there}")


def _directories(run: RunConfig) -> Iterator[ConfigError]:
    written = {"run.dir": run.directory}
    if not (run.data.paths or run.data.mock):
        written["data.dir"] = run.data.dir
    for key, path in written.items():
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            yield ConfigError(key, path, f"can't be made a directory ({error.strerror})", "choose another")
            continue
        if not os.access(path, os.W_OK | os.X_OK):
            yield ConfigError(key, path, "can't be written to", "choose another")
