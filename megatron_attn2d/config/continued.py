"""Compares the configuration of a continued run with that of its checkpoint, and refuses what must not change."""

from collections.abc import Iterator
from pathlib import Path

from megatron_attn2d.config.keys import changed, is_fixed, value
from megatron_attn2d.config.loading import read_run
from megatron_attn2d.config.read import build_run
from megatron_attn2d.config.schema import RunConfig
from megatron_attn2d.errors import ConfigError, show
from megatron_attn2d.run import checkpoints


def continued_directory(run: RunConfig) -> Path | None:
    """The directory of the run whose checkpoint `run` continues: its own, or that of checkpoint.load; None: no run."""
    if checkpoints.last_complete(Path(run.directory) / "checkpoints") is not None:
        return Path(run.directory)
    return Path(run.checkpoint.load).parent if run.checkpoint.load else None


def continued_run(run: RunConfig) -> RunConfig | None:
    """The configuration that was saved with the checkpoint that `run` continues; None where there is none to read."""
    directory = continued_directory(run)
    if directory is None:
        return None
    saved = Path(run.directory) / "checkpoints" if directory == Path(run.directory) else Path(run.checkpoint.load or "")
    # The file in the run's directory comes second: the last start wrote it, and may have ended before it saved.
    for folder in (checkpoints.folder(saved, continued_step(run)), directory):
        if (folder / checkpoints.CONFIGURATION).is_file():
            try:
                return build_run(read_run(folder / checkpoints.CONFIGURATION))
            except ConfigError:  # another version of this package wrote it
                return None
    return None


def continued_step(run: RunConfig) -> int:
    """The step of the checkpoint from which `run` continues; there must be one."""
    own = checkpoints.last_complete(Path(run.directory) / "checkpoints")
    if own is not None:
        return own
    asked = run.megatron_args.get("ckpt_step")
    found = checkpoints.tracked(Path(run.checkpoint.load or "")) if asked is None else asked
    return found if isinstance(found, int) else 0


def check_continued(run: RunConfig) -> Iterator[ConfigError]:
    """A refusal for each key that differs from the configuration of the checkpoint, and must not differ."""
    before, directory = continued_run(run), continued_directory(run)
    if before is None:
        return
    is_own = directory == Path(run.directory)
    for key in changed(before, run):
        if key in run.checkpoint.may_change and not is_fixed(key):
            continue
        old, new = value(before, key), value(run, key)
        ways = [f"choose {show(old)}", "another run.dir" if is_own else "another checkpoint.load"]
        if not is_fixed(key):
            ways += ["name it in checkpoint.may_change"]
            ways += [] if is_own else ["take the weights alone by checkpoint.start_from"]
        yield ConfigError(key, new, f"the run in {directory} was begun with {show(old)}", ", or ".join(ways))
