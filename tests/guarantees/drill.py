"""The long drills, a line of a table each: `python -m tests.guarantees.drill [NAME[=COUNT] ...]`.

scripts/fault_drill.sh says what they are.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from megatron_attn2d.launch import ranks
from megatron_attn2d.run import checkpoints
from tests import pool as rank_pool
from tests.guarantees.hangs import hangs
from tests.guarantees.jobs import Failed, assert_unbroken, job, reported
from tests.guarantees.repeats import GRIDS_OF_4, TP2, determinism, resume
from tests.guarantees.targets import process_groups, train_counting_groups
from tests.megatron.runs import arguments, context_parallel
from tests.pool import RankPool

SMALL: dict[str, Any] = {"mock_data": True, "num_layers": 1}
TINY: dict[str, Any] = {
    **SMALL,
    "train_iters": 100_000,
    "verify_integrity": True,
    **context_parallel("attention2d", 1, 2),
}


def sigterm(count: int) -> str:
    """SIGTERM at a random moment of training: the next launch continues with the step after the last one reported."""
    with tempfile.TemporaryDirectory() as scratch:
        run, directory, output = (Path(scratch, name) for name in ("run", "checkpoints", "output"))
        args = arguments(run_dir=run, save=directory, load=directory, exit_signal_handler=True, **TINY)
        for i in range(count):
            before = reported(run)
            with job(2, args, output) as training:
                training.until(lambda before=before: reported(run) > before)
                if before and f"resumed after step {before}\n" not in training.said():
                    raise Failed(f"SIGTERM {i}: began anew instead of continuing after step {before}")
                time.sleep(random.uniform(0, 1))
                training.terminate()
                if code := training.wait(120):
                    raise Failed(f"SIGTERM {i}: exit code {code}")
            if checkpoints.last_complete(directory) != reported(run):
                raise Failed(f"SIGTERM {i}: saved {checkpoints.last_complete(directory)} of {reported(run)} steps")
        assert_unbroken(run)
        return f"{count} of {count} saved the last step; {reported(run)} steps without a gap"


def kill(count: int) -> str:
    """kill -9 of a rank at a random moment of a save: the next launch continues from the last complete checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        run, directory = Path(scratch, "run"), Path(scratch, "checkpoints")
        args = arguments(run_dir=run, save=directory, load=directory, save_interval=3, keep_last=2, **TINY)
        half_written, slowest = 0, 0.0
        for i in range(count):
            before = checkpoints.last_complete(directory) or 0
            with job(2, args, Path(scratch, f"output-{i}")) as training:
                folder = checkpoints.folder(directory, before + 6)  # the second save of this launch
                training.until(folder.exists)
                if before and f"resumed after step {before}\n" not in training.said():
                    raise Failed(f"kill {i}: began anew instead of continuing after step {before}")
                time.sleep(random.uniform(0, 0.15))
                rank = random.randrange(2)
                training.ranks()[rank].kill()
                began = time.monotonic()
                code = training.wait(60)
                slowest = max(slowest, time.monotonic() - began)
                if code != 128 + signal.SIGKILL or f"rank {rank} of 2 was ended by SIGKILL" not in training.said():
                    raise Failed(f"kill {i}: exit code {code}, {training.said()[-300:]!r}")
            checkpoints.repair_tracker(directory)
            last = checkpoints.last_complete(directory)
            half_written += last == before + 3
            if last is None or last < before + 3:
                raise Failed(f"kill {i}: continues from {last}, but step {before + 3} had been saved")
        with job(2, [*args, "--exit-interval", str((last or 0) + 1)], Path(scratch, "output")) as training:
            if training.wait(120) or f"resumed after step {last}\n" not in training.said():
                raise Failed(f"the last launch did not continue: {training.said()[-300:]}")
        assert_unbroken(run)
        ended = f"the job ended within {slowest:.1f} s and named the rank"
        return (
            f"{count} of {count} continued from the last complete checkpoint, {half_written} saves cut short; {ended}"
        )


def soak(count: int) -> str:
    """`count` steps on 8 ranks: what each rank holds stays what it was at step 100."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch, "run")
        sizes = {"hidden_size": 32, "seq_length": 32, "micro_batch_size": 1, "global_batch_size": 1}
        args = arguments(run_dir=run, **{**SMALL, **sizes, **TP2, **GRIDS_OF_4["2x2"], "train_iters": count})
        samples = []
        with job(8, args, Path(scratch, "output"), partial(train_counting_groups, directory=Path(scratch))) as training:
            for at in (min(100, count // 4), count // 2, count - 2):
                training.until(lambda at=at: reported(run) >= at)
                samples.append(
                    [(rank.memory_info().rss, rank.num_fds(), rank.num_threads()) for rank in training.ranks()]
                )
            if code := training.wait(120):
                raise Failed(f"exit code {code}: {training.said()[-300:]}")
        memory, handles, threads = (
            max(last[i] - first[i] for first, last in zip(samples[0], samples[-1], strict=True)) for i in range(3)
        )
        counted = [Path(scratch, f"groups-{rank}").read_text().splitlines() for rank in range(8)]
        groups = max(int(lines[-1]) - int(lines[0]) for lines in counted)
        found = (
            f"{memory / 2**20:+.1f} MiB, {handles:+d} file handles, {threads:+d} threads per rank since step 100, "
            f"{groups:+d} process groups of {counted[0][0]} since step 1"
        )
        if memory > 8 * 2**20 or handles > 0 or threads > 0 or any(len(lines) > 1 for lines in counted):
            raise Failed(found)
        return f"{count} steps on 8 ranks of {samples[0][0][0] / 2**20:.0f} MiB: {found}"


def grids(count: int) -> str:
    """`count` grids built, used and destroyed in one process."""
    ranks = RankPool()
    try:
        grown = ranks.run(build_grids, 4, count, timeout=1200)
        groups, handles, threads, memory = (max(values) for values in zip(*grown, strict=True))
    finally:
        ranks.close()
    found = f"{groups:+d} process groups, {handles:+d} file handles, {threads:+d} threads, {memory:+.1f} MiB"
    if groups > 0 or handles > 8 or threads > 8 or memory > 16:
        raise Failed(found)
    return f"{count} grids: {found}"


def build_grids(rank: int, count: int, destroys: bool = True) -> tuple[int, int, int, float]:
    """Process groups, file handles, threads and MiB that this rank holds more after `count` grids."""
    import torch
    import torch.distributed as dist

    from megatron_attn2d import Grid, attention2d

    group = dist.group.WORLD
    assert group is not None
    q = torch.ones(4, 1, 2, 4)

    def build() -> None:
        grid = Grid.from_group(group, rows=2, cols=2)
        attention2d(q, q, q, grid)
        dist.barrier()
        if destroys:
            for axis in (grid.q_group, grid.kv_group):
                dist.destroy_process_group(axis)

    def state() -> tuple[int, int, int, float]:
        mine = psutil.Process()
        return process_groups(), mine.num_fds(), mine.num_threads(), mine.memory_info().rss / 2**20

    for _ in range(10):
        build()
    before = state()
    for _ in range(count):
        build()
    groups, handles, threads, memory = (after - then for after, then in zip(state(), before, strict=True))
    return int(groups), int(handles), int(threads), memory


DRILLS: dict[str, tuple[Callable[[int], str], int]] = {
    "determinism": (determinism, 20),
    "resume": (resume, 20),
    "sigterm": (sigterm, 20),
    "kill": (kill, 20),
    "hangs": (hangs, 15),
    "soak": (soak, 2000),
    "grids": (grids, 1000),
}


def main(asked: list[str]) -> int:
    """Runs the drills that are asked for, or all; the number of those that failed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rank_pool.PRELOAD.extend(module for module in ranks.PRELOAD if module not in rank_pool.PRELOAD)
    ranks._preload()
    random.seed(0)
    failed = 0
    table = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the ranks report of their steps
    print(f"{'drill':12} {'seconds':>8}  result", file=table, flush=True)
    for word in asked or DRILLS:
        name, _, count = word.partition("=")
        if name not in DRILLS:
            print(f"no drill {name!r}: choose from {', '.join(DRILLS)}", file=sys.stderr)
            return 2
        drill, usual = DRILLS[name]
        began = time.monotonic()
        try:
            result = drill(int(count or usual))
        except Exception as error:  # the other drills are run nevertheless
            failed += 1
            result = f"FAILED: {type(error).__name__}: {error}"
        print(f"{name:12} {time.monotonic() - began:8.0f}  {result}", file=table, flush=True)
    return failed


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main(sys.argv[1:]))
