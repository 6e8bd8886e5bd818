"""Tells which checkpoints in a run's directory are complete and which one a run continues from, and deletes old ones.

Megatron writes CHECKPOINTS/iter_0000100/ and then that number into a tracker file. A process that is killed may leave
a folder half-written or the tracker empty. A checkpoint is complete if it has `metadata.json`, which is written last.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

from megatron_attn2d.errors import UsageError

TRACKER = "latest_checkpointed_iteration.txt"
_LAST_WRITTEN = "metadata.json"
CHECKSUMS = "integrity.json"
"""Checksums of a checkpoint's files; upstream's `--verify-integrity` writes this file after all others."""
CONFIGURATION = "config.yaml"
"""The resolved YAML of a run: beside each checkpoint as it was then, and in the run's directory as it is now."""
_DELETED = ".deleted-"


def folder(directory: Path, step: int) -> Path:
    """The folder in which Megatron keeps the checkpoint of `step`."""
    return directory / f"iter_{step:07d}"


def complete(directory: Path) -> list[int]:
    """The steps of the complete checkpoints, ascending."""
    steps = {_step(path): path for path in directory.glob("iter_*")}
    return sorted(step for step, path in steps.items() if step is not None and _is_complete(path))


def _step(path: Path) -> int | None:
    number = path.name.removeprefix("iter_")
    return int(number) if number.isdecimal() else None


def _is_complete(path: Path) -> bool:
    legacy = any(path.glob("mp_rank_*"))  # --ckpt-format torch: nothing marks a complete one
    return legacy or ((path / _LAST_WRITTEN).is_file() and (path / ".metadata").is_file())


def last_complete(directory: Path) -> int | None:
    """The step to continue from: the tracker's if complete, else the newest complete one; None: from scratch."""
    steps = complete(directory)
    named = tracked(directory)
    return named if named in steps else max(steps, default=None)


def chosen(directory: Path, step: int | None) -> int:
    """`step`, or for None the step of the last complete checkpoint.

    Raises:
        UsageError: there is no such complete checkpoint; names those that there are.
    """
    there = complete(directory)
    found = last_complete(directory) if step is None else step
    if found is None or found not in there:
        what = "no complete checkpoint" if step is None else f"no complete checkpoint of step {step}"
        raise UsageError(f"{directory}: {what}; there are {', '.join(map(str, there)) or 'none'}")
    return found


def tracked(directory: Path) -> int | None:
    """The step that the tracker names; None where it is missing or holds no number."""
    try:
        return int((directory / TRACKER).read_text())
    except (OSError, ValueError):
        return None


def repair_tracker(directory: Path) -> None:
    """Make the tracker name `last_complete`, or remove it where there is none: Megatron reads the tracker alone."""
    step = last_complete(directory)
    if step == tracked(directory):
        return
    if step is None:
        (directory / TRACKER).unlink(missing_ok=True)
        return
    with tempfile.NamedTemporaryFile("w", dir=directory, prefix=f".{TRACKER}-", delete=False) as scratch:
        scratch.write(str(step))
    os.replace(scratch.name, directory / TRACKER)


def begin_save(directory: Path, step: int) -> None:
    """Mark the checkpoint of `step` as incomplete; call it before it is saved or overwritten."""
    for name in (_LAST_WRITTEN, CHECKSUMS, CONFIGURATION):
        (folder(directory, step) / name).unlink(missing_ok=True)


def keep_configuration(directory: Path, step: int, run_dir: Path) -> None:
    """Copy the configuration in `run_dir`, if there is one, beside the checkpoint of `step`; call it after the save."""
    if (run_dir / CONFIGURATION).is_file() and folder(directory, step).is_dir():
        shutil.copyfile(run_dir / CONFIGURATION, folder(directory, step) / CONFIGURATION)


def prune(directory: Path, keep: int) -> threading.Thread:
    """Delete all but the last `keep` complete checkpoints, and older half-written ones.

    The tracker's checkpoint stays, and all newer ones, as one of them may be under way. Nothing is deleted while the
    tracker names no complete checkpoint.

    Returns:
        The thread that deletes. Folders that it deletes are renamed before this function returns, so that they no
        longer count as checkpoints.
    """
    assert keep >= 1
    named, steps = tracked(directory), complete(directory)
    if named in steps:
        kept = set([step for step in steps if step <= named][-keep:])
        for path in directory.glob("iter_*"):
            step = _step(path)
            if step is not None and step < named and step not in kept and not path.is_symlink():
                path.rename(directory / f"{_DELETED}{path.name}")
    thread = threading.Thread(target=_delete, args=(list(directory.glob(f"{_DELETED}*")),))
    thread.start()
    return thread


def _delete(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
