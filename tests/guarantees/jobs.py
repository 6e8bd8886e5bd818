"""Jobs that the drills disturb: a launch of ranks forked from this process, which has imported everything once."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from megatron_attn2d.launch import ranks
from megatron_attn2d.training import pretrain_gpt
from tests.megatron.runs import metrics


class Failed(AssertionError):
    """A drill did not keep its promise."""


class Job:
    """A running launch."""

    def __init__(self, nranks: int, target: ranks.Target, args: Sequence[str], output: Path) -> None:
        output.touch()
        self._output = output
        self._process = multiprocessing.get_context("fork").Process(target=_run, args=(nranks, target, args, output))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, in order; fewer while they start and after they ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return sorted(psutil.Process(self.pid).children(), key=lambda rank: rank.pid)
        return []

    def terminate(self) -> None:
        """SIGTERM to the launcher."""
        self._process.terminate()

    def wait(self, timeout: float) -> int:
        """The launcher's exit code."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise Failed(f"the job still runs {timeout:.0f} s later")
        return self._process.exitcode

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition; Failed if the job ends before it holds."""
        while not condition():
            if not self._process.is_alive():
                raise Failed(f"the job ended by itself with {self._process.exitcode}: {self.said()[-300:]}")
            time.sleep(0.01)

    def said(self) -> str:
        """What the launcher and the ranks printed."""
        return self._output.read_text()

    def end(self) -> None:
        """Kills what still runs."""
        for rank in self.ranks():
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
        self._process.kill()
        self._process.join()


@contextmanager
def job(nranks: int, args: Sequence[str], output: Path, target: ranks.Target = pretrain_gpt.main) -> Iterator[Job]:
    """Runs `target(args)`, training, on `nranks`; nothing of it outlives the block."""
    started = Job(nranks, target, args, output)
    try:
        yield started
    finally:
        started.end()


def reported(run: Path) -> int:
    """The last step that a run has recorded."""
    try:
        return int(metrics(run)[-1]["step"])
    except (FileNotFoundError, IndexError, json.JSONDecodeError):
        return 0


def assert_unbroken(run: Path) -> None:
    """Asserts that the recorded steps are 1, 2, 3, ..."""
    steps = [step["step"] for step in metrics(run)]
    if steps != list(range(1, len(steps) + 1)):
        raise Failed("recorded steps have a gap or a repetition")


def _run(nranks: int, target: ranks.Target, args: Sequence[str], output: Path) -> None:
    with output.open("ab") as file:
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(file.fileno(), descriptor)
    sys.exit(ranks.run_local(nranks, target, args))
