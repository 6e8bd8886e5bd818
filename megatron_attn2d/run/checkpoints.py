"""Which checkpoints in a run's directory are complete, which one a run continues from, and which are kept.

Megatron writes CHECKPOINTS/iter_0000100/ and then that number into a tracker file. A process that is killed may leave
a folder half-written or the tracker empty: what counts here is `metadata.json`, the last file of a whole checkpoint.
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
"""Of every file of a checkpoint, by upstream's `--verify-integrity`, which writes it last of all."""
CONFIGURATION = "config.yaml"
"""How the run was configured that wrote a checkpoint, beside its files, and last in the run's directory."""
_DELETED = ".deleted-"


def folder(directory: Path, step: int) -> Path:
    """Where Megatron keeps the checkpoint of `step`."""
    return directory / f"iter_{step:07d}"


def complete(directory: Path) -> list[int]:
    """The steps of the complete checkpoints, ascending."""
    steps = {_step(path): path for path in directory.glob("iter_*")}
    return sorted(step for step, path in steps.items() if step is not None and _is_complete(path))


def _step(path: Path) -> int | None:
    number = path.name.removeprefix("iter_")
    return int(number) if number.isdecimal() else None


def _is_complete(path: Path) -> bool:
    legacy = any(path.glob("mp_rank_*"))  # --ckpt-format torch: nothing tells whether it is whole
    return legacy or ((path / _LAST_WRITTEN).is_file() and (path / ".metadata").is_file())


def last_complete(directory: Path) -> int | None:
    """The step to continue from: the tracker's, or where that isn't complete the newest that is; None: from scratch."""
    steps = complete(directory)
    named = tracked(directory)
    return named if named in steps else max(steps, default=None)


def chosen(directory: Path, step: int | None) -> int:
    """`step`, or that of the last complete checkpoint.

    Raises:
        UsageError: there is no complete checkpoint of it.
    """
    there = complete(directory)
    found = last_complete(directory) if step is None else step
    if found is None or found not in there:
        what = "no complete checkpoint" if step is None else f"no complete checkpoint of step {step}"
        raise UsageError(f"{directory}: {what}; there are {', '.join(map(str, there)) or 'none'}")
    return found


def tracked(directory: Path) -> int | None:
    """The step that the tracker names; None where it names none."""
    try:
        return int((directory / TRACKER).read_text())
    except (OSError, ValueError):
        return None


def repair_tracker(directory: Path) -> None:
    """Makes the tracker name `last_complete`, or removes it where there is none; Megatron reads nothing else."""
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
    """To be called before `step` is saved: one that is overwritten is no longer complete."""
    for name in (_LAST_WRITTEN, CHECKSUMS, CONFIGURATION):
        (folder(directory, step) / name).unlink(missing_ok=True)


def keep_configuration(directory: Path, step: int, run_dir: Path) -> None:
    """To be called once `step` is saved: keeps beside it the configuration in `run_dir`, where there is one."""
    if (run_dir / CONFIGURATION).is_file() and folder(directory, step).is_dir():
        shutil.copyfile(run_dir / CONFIGURATION, folder(directory, step) / CONFIGURATION)


def prune(directory: Path, keep: int) -> threading.Thread:
    """Deletes all but the last `keep` complete checkpoints, and what is half-written and older.

    The tracker's checkpoint stays, and all that are newer: one of them may be being written. Nothing is deleted while
    the tracker names no complete checkpoint.

    Returns:
        The thread that deletes: what it deletes has no longer the name of a checkpoint when this function returns.
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
