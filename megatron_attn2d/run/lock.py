"""Locks a run's directory: a second training would write the same checkpoints and metrics at the same time."""

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
"""Seconds to wait for the lock: processes of a training that has ended may hold it a while."""


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold the directory's lock while entered; wait up to PATIENCE_S for another process that holds it.

    Processes that are forked meanwhile, CPU ranks and data loaders, hold the lock too. The kernel releases it when the
    last of them has ended, in whatever way. A loader notices after 5 s that its rank was killed, and a file server even
    later that its client has died, hence the patience. GPU ranks are spawned and don't hold the lock, but end with
    their launcher. On a file system without locks nothing is locked.

    Raises:
        UsageError: another process holds the lock for longer than PATIENCE_S; names it.
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
