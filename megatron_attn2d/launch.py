"""Starts the ranks of a run on this host: CPU ranks forked from one import, or a process a GPU.

On a cluster torchrun or Slurm start the ranks instead, and nothing here is needed.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, Literal

PRELOAD: tuple[str, ...] = (
    "megatron.training.arguments",
    "megatron.training.training",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron_attn2d.megatron.layer_spec",
    "megatron_attn2d.pretrain_gpt",
)
"""What CPU ranks would each spend seconds on importing; the launcher imports it once, before it forks them."""

_BLAME_S = 0.3
"""How long after a rank's failure to wait for others': the first to fail is to blame, not the first to have exited."""

Target = Callable[[Sequence[str]], None]


def run_local(nprocs: int, target: Target, args: Sequence[str], device: Literal["cpu", "cuda"] = "cpu") -> int:
    """Runs `target(args)` in `nprocs` ranks of this host, with torchrun's variables in their environment.

    When a rank fails the others are killed, and its traceback is printed. SIGTERM and SIGINT reach every rank as
    SIGTERM (Megatron then saves and exits, with `--exit-signal-handler`); a second one kills them. CPU ranks are
    forked: call this from the main thread, before anything starts threads.

    Returns:
        The exit code: 0, or that of the first rank that failed (128 + signal, where one ended it).
    """
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nprocs)))
    if device == "cpu":
        _preload()
    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    port = _free_port()
    ranks, reports = [], []
    for rank in range(nprocs):
        report, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_run_rank, args=(rank, nprocs, port, int(threads), theirs, target, list(args)), name=f"rank {rank}"
        )
        process.start()
        theirs.close()
        ranks.append(process)
        reports.append(report)
    with _forwarded_signals(ranks):
        return _wait(ranks, reports)


def _preload() -> None:
    """Imports `PRELOAD` without what upstream prints about missing libraries; what follows from them is in the log."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in PRELOAD:
                importlib.import_module(module)
    finally:
        logging.disable(logging.NOTSET)


def _run_rank(
    rank: int, nprocs: int, port: int, threads: int, report: Connection, target: Target, args: Sequence[str]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the launcher decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with_launcher, daemon=True).start()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(nprocs),
        LOCAL_WORLD_SIZE=str(nprocs),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        if "torch" in sys.modules:  # forked after the import, which is when torch reads OMP_NUM_THREADS
            sys.modules["torch"].set_num_threads(threads)
        target(args)
    except Exception:
        report.send((time.monotonic(), traceback.format_exc()))
        sys.exit(1)


def _die_with_launcher() -> None:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os._exit(1)


def _wait(ranks: list[Any], reports: list[Connection]) -> int:
    running = list(ranks)
    while running:
        wait([process.sentinel for process in running])
        # Read once: a rank that has closed its sentinel may end, with its code, between two looks, and be missed.
        codes = [(process, process.exitcode) for process in running]
        failed = [process for process, code in codes if code]
        running = [process for process, code in codes if code is None]
        if failed:
            time.sleep(_BLAME_S)
            return _stop_after_failure(ranks, reports, failed[0])
    return 0


def _stop_after_failure(ranks: list[Any], reports: list[Connection], failed: Any) -> int:
    """Kills the ranks that still run, prints what the first failure was and returns its exit code."""
    for process in ranks:
        process.kill()
    for process in ranks:
        process.join()
    messages = [
        (*message, process) for process, report in zip(ranks, reports, strict=True) if (message := _read(report))
    ]
    if failed.exitcode < 0 or not messages:  # a rank that was killed can't tell; the others only saw it vanish
        code = failed.exitcode if failed.exitcode > 0 else 128 - failed.exitcode
        how = f"was ended by {signal.Signals(-failed.exitcode).name}" if failed.exitcode < 0 else f"exited with {code}"
        print(f"{failed.name} of {len(ranks)} {how}; the other ranks were stopped", file=sys.stderr)
        return code
    _, text, process = min(messages, key=lambda message: message[0])
    print(f"{process.name} of {len(ranks)} failed; the other ranks were stopped\n{text}", file=sys.stderr, end="")
    return 1


def _read(report: Connection) -> tuple[float, str] | None:
    try:
        return report.recv() if report.poll() else None
    except EOFError:  # the rank ended without a report
        return None


@contextmanager
def _forwarded_signals(ranks: list[Any]) -> Iterator[None]:
    received = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in ranks:
            if process.is_alive():
                process.terminate() if len(received) == 1 else process.kill()

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
