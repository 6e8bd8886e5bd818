"""One training a run directory: a second one would write the same checkpoints and metrics at the same time."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_attn2d.config.errors import UsageError

NAME = ".training"


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold the directory's lock.

    Ranks that are forked meanwhile hold it too; the kernel lets go of it when the last of them ends, however it ends.
    A file system without locks is left unlocked.

    Raises:
        UsageError: another process holds it; says which.
    """
    file = os.open(run_dir / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace").strip() or "unknown"
            raise UsageError(
                f"{run_dir}: another training writes there (process {holder}); wait for it, or choose another run.dir"
            ) from None
        except OSError:  # no locks here: a network file system without them
            yield
            return
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(file)
