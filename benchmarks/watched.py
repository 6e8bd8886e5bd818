#!/usr/bin/env python3
"""Programs that must not outlive a deadline: their processes, however many and however stuck, end with it.

    python benchmarks/watched.py 300 pytest -m gpu tests/gpu/test_inference.py --durations=0 -rs

As a command it runs another for so many seconds at most, and exits with its code, or with 124 where it ended it. Unlike
`timeout` it also ends ranks that lead sessions of their own and would stay on the GPUs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_POLL_S = 0.1


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a leader of a session and all that it started, torchrun's ranks too, which lead sessions of their own."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=5)  # their memory is free then


@dataclass
class Watched:
    """A program that appends `{"begin": i}` and `{"end": i}` to a file as it works through cases.

    Attributes:
        command: FIRST, the case to begin with, is appended.
        rows: the file.
        log: of what it prints.
        start_s, case_s: how long it may take until the first case begins, and for a case.
        deadline: by time.time(), when it is ended.
    """

    command: list[str]
    rows: Path
    log: Path
    start_s: float
    case_s: float
    deadline: float

    def run(self, cases: int, tell: Callable[[dict[str, Any]], None], starts: int = 3) -> None:
        """Tell of everything that it appends, and of cases that it did not end, why: `{"end": i, "failed": ...}`.

        After a case that failed the program it is started anew with the next, `starts` times in all.
        """
        ended: set[int] = set()
        reason = ""
        for _ in range(starts):
            first = next((i for i in range(cases) if i not in ended), cases)
            if first == cases or time.time() > self.deadline:
                break
            begun, reason = self._once(first, cases, ended, tell)
            if reason and begun is None:
                break  # it would not start the next time either
            if reason and begun not in ended:
                ended.add(begun)
                tell({"end": begun, "failed": reason})
        else:
            reason = f"not run: the ranks failed {starts} times"
        if time.time() > self.deadline:
            reason = "not run: out of time"
        for i in set(range(cases)) - ended:
            tell({"end": i, "failed": reason})

    def _once(
        self, first: int, cases: int, ended: set[int], tell: Callable[[dict[str, Any]], None]
    ) -> tuple[int | None, str]:
        """The last case that it began, and why it ended, if that was not with all cases."""
        self.rows.unlink(missing_ok=True)
        with self.log.open("a") as log:
            process = subprocess.Popen([*self.command, str(first)], stdout=log, stderr=log, start_new_session=True)
        read, begun, since = 0, None, time.time()
        try:
            while True:
                running = process.poll() is None
                lines = self.rows.read_text().splitlines(keepends=True) if self.rows.exists() else []
                for line in (line for line in lines[read:] if line.endswith("\n")):
                    read, since = read + 1, time.time()
                    said = json.loads(line)
                    begun = said.get("begin", begun)
                    ended.add(said.get("end", -1))
                    tell(said)
                if len(ended - {-1}) == cases:
                    return begun, ""  # and don't wait for goodbyes
                if not running:
                    code = process.returncode
                    return begun, f"ranks ended with {code}: {last_words(self.log)}"
                if time.time() > self.deadline:
                    return begun, "stopped: out of time"
                if time.time() - since > (limit := self.start_s if begun is None else self.case_s):
                    return begun, f"hung: nothing for {limit:.0f} s"
                time.sleep(_POLL_S)
        finally:
            end(process)


def last_words(log: Path) -> str:
    """The last line of an error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["no output"])[-1][:160]


def brief(text: str, most: int = 15) -> str:
    """Of what a failed program printed: the first error, then lines of its traceback, or the end if there is none."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and not _CHATTER.search(line)]
    blamed = next((i for i, line in enumerate(lines) if "the other ranks were stopped" in line), 0)
    at = next((i for i, line in enumerate(lines) if i >= blamed and _ERROR.search(line)), None)
    if at is None:
        return "\n".join(lines[:1] + lines[1:][1 - most :])
    return "\n".join([lines[at].strip()[:500], *lines[max(0, at - most + 1) : at]])


_ERROR = re.compile(r"^\s*(\[rank\d+\]:\s*)?[\w.]*(Error|Exception)(: |$)|^config error|ended by SIG")
_CHATTER = re.compile(r"\b(INFO|WARNING)\b|Warning:|warnings\.warn")


def python(script: Path, *arguments: str) -> list[str]:
    """The command of a script."""
    return [sys.executable, str(script), *arguments]


def main() -> None:
    """Run a command for some seconds."""
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
        sys.exit("usage: watched.py SECONDS COMMAND [ARGUMENT ...]")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    process = subprocess.Popen(sys.argv[2:], start_new_session=True)
    try:
        sys.exit(process.wait(int(sys.argv[1])))
    except subprocess.TimeoutExpired:
        print(f"ended after {sys.argv[1]} s: {' '.join(sys.argv[2:])}", file=sys.stderr)
        sys.exit(124)
    finally:
        end(process)


if __name__ == "__main__":
    main()
