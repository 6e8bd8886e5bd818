"""Sends the output of a rank to its log, and keeps the console for lines that are meant for the user."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def quiet(run_dir: str | None, rank: int) -> Iterator[TextIO]:
    """While entered, what this process prints, native code included, goes to RUN_DIR/logs/rank-N.log.

    Without a run directory nothing is redirected.

    Yields:
        the console.
    """
    if run_dir is None:
        yield sys.stdout
        return
    log_path = Path(run_dir, "logs", f"rank-{rank}.log")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    try:
        with os.fdopen(os.dup(saved[0]), "w", buffering=1) as console:
            yield console
    finally:
        _flush()
        for descriptor, standard in zip(saved, (1, 2), strict=True):
            os.dup2(descriptor, standard)
            os.close(descriptor)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
