"""One training per run directory: a second one would write the same checkpoints and metrics at the same time."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_attn2d.errors import UsageError

NAME = ".training"
PATIENCE_S = 60.0


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold the directory's lock, for which what is left of a training that has ended is waited for.

    Processes that are forked meanwhile, CPU ranks and those that load data, hold it too: the kernel lets go of it when
    the last of them ends, however it ends; a loader of a killed rank takes 5 s to notice, a file server whose client
    has died longer. GPU ranks, which are spawned, don't hold it, but end with their launcher. A file system without
    locks is left unlocked.

    Raises:
        UsageError: another process holds it for longer than PATIENCE_S; says which.
    """
    file = os.open(run_dir / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            _lock(file, run_dir)
        except OSError:  # no locks here: a network file system without them
            yield
            return
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(file)


def _lock(file: int, run_dir: Path) -> None:
    deadline, waits = time.monotonic() + PATIENCE_S, False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "unknown"
            what = f"{run_dir}: another training writes there (process {holder})"
            if time.monotonic() > deadline:
                raise UsageError(f"{what}; wait for it, or choose another run.dir") from None
            if not waits:
                print(f"{what}; waiting for {PATIENCE_S:g} s", file=sys.stderr)
            waits = True
            time.sleep(0.2)
