"""Starts the ranks of a run on this host: CPU ranks are forked after one import, GPU ranks are spawned.

On a cluster torchrun or Slurm starts the ranks instead.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, Literal, NamedTuple

from megatron_attn2d.errors import UsageError
from megatron_attn2d.launch import environment
from megatron_attn2d.megatron.upstream.quiet_imports import quiet_import

PRELOAD: tuple[str, ...] = (
    "megatron.training.arguments",
    "megatron.training.training",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.tokenizers.text",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron_attn2d.megatron.layer_spec",
    "megatron_attn2d.training.pretrain_gpt",
)
"""Modules that take seconds to import; the launcher imports them once, before it forks CPU ranks."""

_FORWARDED = (signal.SIGTERM, signal.SIGINT)
"""Signals that this process passes on to its ranks."""
_BLAME_S = 0.3
"""Seconds to wait for further reports after a rank's exit: the first to fail is to blame, not the first to exit."""
_TIMEOUTS_S = 10.0
"""Seconds to wait for further reports after a timeout, to learn which rank the others have waited for."""
_TIMED_OUT = re.compile(r"tim(ed|e) ?out", re.IGNORECASE)

_REPORT_CHARACTERS = 12_000
"""Most characters of a traceback: the pipe is read only after the rank has ended, so a report must fit into it."""

Target = Callable[[Sequence[str]], None]


class _Failure(NamedTuple):
    """The report of a rank that fails; reports sort by time."""

    time: float
    rank: int
    timed_out: bool
    brief: str
    text: str


def run_local(nprocs: int, target: Target, args: Sequence[str], device: Literal["cpu", "cuda"] = "cpu") -> int:
    """Run `target(args)` in `nprocs` ranks of this host, with torchrun's variables in their environment.

    When a rank fails, the others are killed and its traceback is printed. SIGTERM and SIGINT reach every rank as
    SIGTERM, upon which Megatron saves and exits, with `--exit-signal-handler`; a second signal kills the ranks. CPU
    ranks are forked: call this from the main thread, before anything starts threads.

    Args:
        nprocs: number of ranks.
        target: what each rank runs.
        args: passed to `target`.
        device: cpu forks the ranks, cuda spawns them.

    Returns:
        The exit code: 0, or that of the first rank that failed, which is 128 + signal if a signal ended it.

    Raises:
        UsageError: OMP_NUM_THREADS is set, but not to a number.
    """
    limit = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nprocs)))
    outermost = limit.partition(",")[0]  # OpenMP takes a list with a number per level of nesting
    threads = environment.number("OMP_NUM_THREADS", outermost, "a rank's threads, or unset it", least=1)
    if device == "cpu":
        _preload()
    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    port = _free_port()
    ranks, reports = [], []
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)  # a signal that comes now waits until all ranks run
    try:
        for rank in range(nprocs):
            report, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank, args=(rank, nprocs, port, threads, theirs, target, list(args)), name=f"rank {rank}"
            )
            process.start()
            theirs.close()
            ranks.append(process)
            reports.append(report)
        with _forwarded_signals(ranks):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
            return _wait(ranks, reports)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)


def alone() -> None:
    """Make this process the only rank of a world, by torchrun's variables in its environment."""
    name_rank(0, 1, _free_port())


def name_rank(rank: int, nprocs: int, port: int) -> None:
    """Set torchrun's variables: this process is rank `rank` of `nprocs` ranks on this host."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(nprocs),
        LOCAL_WORLD_SIZE=str(nprocs),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _preload() -> None:
    """Import `PRELOAD`; ranks' logs tell what follows from libraries that Megatron misses."""
    for module in PRELOAD:
        quiet_import(module)
    gc.freeze()  # What was imported is no garbage: a rank that looked through it would copy its memory.
    atexit.register(gc.unfreeze)  # At the end it is, or Triton's bindings would report their types as leaked.


def _run_rank(
    rank: int, nprocs: int, port: int, threads: int, report: Connection, target: Target, args: Sequence[str]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group: the launcher passes it on
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    threading.Thread(target=_die_with_launcher, daemon=True).start()
    name_rank(rank, nprocs, port)
    try:
        # A spawned process spawns its own children by default. Data loaders hand their workers a function that only a
        # fork can take; under torchrun and srun they fork as well.
        multiprocessing.set_start_method("fork", force=True)
        if "torch" in sys.modules:  # torch has read OMP_NUM_THREADS already, at its import
            sys.modules["torch"].set_num_threads(threads)
        target(args)
    except Exception as error:
        timed_out = isinstance(error, RuntimeError) and _TIMED_OUT.search(str(error)) is not None
        brief = "".join(traceback.format_exception_only(error)).strip()
        # A user's mistake needs no traceback.
        text = f"{error}\n" if isinstance(error, UsageError) else traceback.format_exc()[-_REPORT_CHARACTERS:]
        report.send(_Failure(time.monotonic(), rank, timed_out, brief[:1000], text))
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
        # Read each code once: a rank that exits between two reads would be in neither list.
        codes = [(process, process.exitcode) for process in running]
        failed = [process for process, code in codes if code]
        running = [process for process, code in codes if code is None]
        if failed:
            return _stop_after_failure(ranks, reports, failed[0])
    return 0


def _stop_after_failure(ranks: list[Any], reports: list[Connection], failed: Any) -> int:
    """Kill the ranks that still run, print the first failure and return its exit code."""
    failures = _collected(reports, _BLAME_S)
    if failures and min(failures).timed_out:
        failures += _collected(reports, _TIMEOUTS_S, enough=len(ranks) - 1 - len(failures))
    for process in ranks:
        process.kill()
    for process in ranks:
        process.join()
    failures += _collected(reports, 0.0)
    if failed.exitcode < 0 or not failures:  # a killed rank sends no report, and the others' errors only follow
        code = failed.exitcode if failed.exitcode > 0 else 128 - failed.exitcode
        how = f"was ended by {signal.Signals(-failed.exitcode).name}" if failed.exitcode < 0 else f"exited with {code}"
        print(f"{failed.name} of {len(ranks)} {how}; the other ranks were stopped", file=sys.stderr)
        return code
    first, *others = sorted(failures)
    print(
        f"rank {first.rank} of {len(ranks)} failed; the other ranks were stopped\n{first.text}", file=sys.stderr, end=""
    )
    if first.timed_out:
        for other in others:
            print(f"rank {other.rank} failed {other.time - first.time:.1f} s later: {other.brief}", file=sys.stderr)
        silent = sorted(set(range(len(ranks))) - {failure.rank for failure in failures})
        if silent:
            print(
                f"waited for nobody, so that the others may have waited for it: rank {', '.join(map(str, silent))}",
                file=sys.stderr,
            )
    return 1


def _collected(reports: list[Connection], seconds: float, enough: int | None = None) -> list[_Failure]:
    """The reports that arrive within `seconds`, or until there are `enough`."""
    found: list[_Failure] = []
    deadline, waiting = time.monotonic() + seconds, list(reports)
    while waiting and (enough is None or len(found) < enough):
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for report in ready:
            assert isinstance(report, Connection)
            waiting.remove(report)
            with suppress(EOFError):  # the rank ended without a report
                found.append(report.recv())
    return found


@contextmanager
def _forwarded_signals(ranks: list[Any]) -> Iterator[None]:
    received = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in ranks:
            if process.is_alive():
                process.terminate() if len(received) == 1 else process.kill()

    previous = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
