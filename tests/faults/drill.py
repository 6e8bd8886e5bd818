"""The long drills, a line of a table each: `python -m tests.faults.drill [NAME[=COUNT] ...]`.

scripts/fault_drill.sh says what they are.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from megatron_attn2d import checkpoints, launch
from tests import pool as rank_pool
from tests.megatron.runs import arguments, context_parallel, metrics
from tests.pool import RankPool

TINY: dict[str, Any] = {"mock_data": True, "num_layers": 1, "train_iters": 100_000, "verify_integrity": True}
SPREAD = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
STAGED = {"pipeline_model_parallel_size": 2}
MODES = {
    "2x2": context_parallel("attention2d", 2, 2),
    "4x1": context_parallel("attention2d", 4, 1),
    "1x4": context_parallel("attention2d", 1, 4),
    "2x2x1": {**context_parallel("attention2d", 2, 2), "hierarchical_context_parallel_sizes": [2, 2, 1]},
    "ring": context_parallel("p2p", 1, 4),
}


class Failed(AssertionError):
    """A drill did not keep its promise."""


def determinism(count: int) -> str:
    """Two runs of `count` steps of each mode on 8 ranks, TP2 or PP2: losses, weights and states bit for bit."""
    from tests.faults.test_determinism import assert_deterministic

    ranks = RankPool()
    try:
        for name, mode in MODES.items():
            sizes = {} if name == "2x2x1" else {"num_query_groups": 4}
            for split in (SPREAD, STAGED):
                with tempfile.TemporaryDirectory() as scratch:
                    assert_deterministic(ranks, 8, Path(scratch), train_iters=count, **sizes, **mode, **split)
    finally:
        ranks.close()
    return f"{2 * len(MODES)} of {2 * len(MODES)} pairs of runs equal ({', '.join(MODES)}; TP2, PP2; 8 ranks)"


def sigterm(count: int) -> str:
    """SIGTERM at a random moment of training: the next launch continues with the step after the last one reported."""
    with tempfile.TemporaryDirectory() as scratch:
        run, directory = Path(scratch, "run"), Path(scratch, "checkpoints")
        for i in range(count):
            process = _train(run, directory, exit_signal_handler=True)
            _wait_for_steps(process, run, _reported(run) + 1)
            time.sleep(random.uniform(0, 1))
            process.terminate()
            if process.wait(timeout=120):
                raise Failed(f"SIGTERM {i}: exit code {process.returncode}")
            if checkpoints.last_complete(directory) != _reported(run):
                raise Failed(f"SIGTERM {i}: saved {checkpoints.last_complete(directory)} of {_reported(run)} steps")
        _assert_unbroken(run)
        return f"{count} of {count} saved the last step; {_reported(run)} steps without a gap"


def kill(count: int) -> str:
    """kill -9 of a rank at a random moment of a save: the next launch continues from the last complete checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        run, directory = Path(scratch, "run"), Path(scratch, "checkpoints")
        half_written = 0
        for i in range(count):
            before = checkpoints.last_complete(directory) or 0
            process = _train(run, directory, save_interval=3, keep_last=2)
            folder = checkpoints.folder(directory, before + 6)  # the second save of this launch
            _wait_until(process, folder.exists)
            time.sleep(random.uniform(0, 0.15))
            random.choice(psutil.Process(process.pid).children()).kill()
            if process.wait(timeout=60) == 0:
                raise Failed(f"kill {i}: the job ended as if nothing had happened")
            checkpoints.repair_tracker(directory)
            last = checkpoints.last_complete(directory)
            half_written += last == before + 3
            if last is None or last < before + 3:
                raise Failed(f"kill {i}: continues from {last}, but step {before + 3} had been saved")
        process = _train(run, directory, train_iters=(checkpoints.last_complete(directory) or 0) + 1)
        if process.wait(timeout=120):
            raise Failed("the last launch did not continue")
        _assert_unbroken(run)
        return f"{count} of {count} continued from the last complete checkpoint; {half_written} saves were cut short"


def soak(count: int) -> str:
    """`count` steps on 8 ranks: memory, file handles and threads of the ranks stay what they were at step 100."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch, "run")
        options = {**SPREAD, **MODES["2x2"], "num_query_groups": 4, "num_layers": 2, "train_iters": count}
        process = _start(8, arguments(run_dir=run, mock_data=True, **options))
        samples = []
        for at in (count // 4, count // 2, count - 2):
            _wait_for_steps(process, run, at)
            ranks = sorted(psutil.Process(process.pid).children(), key=lambda rank: rank.pid)
            samples.append([(rank.memory_info().rss, rank.num_fds(), rank.num_threads()) for rank in ranks])
        if process.wait(timeout=120):
            raise Failed(f"exit code {process.returncode}")
        growth = max(b[0] / a[0] - 1 for a, b in zip(samples[0], samples[-1], strict=True))
        handles, threads = (max(b[i] - a[i] for a, b in zip(samples[0], samples[-1], strict=True)) for i in (1, 2))
        found = f"memory {growth:+.1%}, {handles:+d} file handles, {threads:+d} threads after the first quarter"
        if growth > 0.02 or handles > 0 or threads > 0:
            raise Failed(found)
        return f"{count} steps: {found}"


def grids(count: int) -> str:
    """`count` grids built, used and destroyed in one process."""
    ranks = RankPool()
    try:
        handles, threads, memory = max(ranks.run(_build_grids, 4, count, timeout=1200))
    finally:
        ranks.close()
    if handles > 8 or threads > 8:
        raise Failed(f"{handles:+d} file handles, {threads:+d} threads")
    return f"{count} grids: {handles:+d} file handles, {threads:+d} threads, {memory:+.1f} MiB"


def _build_grids(rank: int, count: int) -> tuple[int, int, float]:
    import torch
    import torch.distributed as dist

    from megatron_attn2d import Grid, attention2d

    group = dist.group.WORLD
    assert group is not None
    q = torch.ones(4, 1, 2, 4)

    def build(i: int) -> None:
        grid = Grid.from_group(group, rows=2, cols=2)
        attention2d(q, q, q, grid)
        dist.barrier()
        for axis in (grid.q_group, grid.kv_group):
            dist.destroy_process_group(axis)

    def state() -> tuple[int, int, float]:
        mine = psutil.Process()
        return mine.num_fds(), mine.num_threads(), mine.memory_info().rss / 2**20

    for i in range(10):
        build(i)
    before = state()
    for i in range(count):
        build(i)
    handles, threads, memory = (after - then for after, then in zip(state(), before, strict=True))
    return int(handles), int(threads), memory


def _start(nprocs: int, args: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.launch.targets", "pretrain", str(nprocs), *args]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _train(run: Path, directory: Path, **options: Any) -> subprocess.Popen[bytes]:
    mode = context_parallel("attention2d", 1, 2)
    return _start(2, arguments(run_dir=run, save=directory, load=directory, **{**TINY, **mode, **options}))


def _reported(run: Path) -> int:
    try:
        return int(metrics(run)[-1]["step"])
    except (FileNotFoundError, IndexError, json.JSONDecodeError):
        return 0


def _wait_for_steps(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    _wait_until(process, lambda: _reported(run) >= step)


def _wait_until(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    while not condition():
        if process.poll() is not None:
            raise Failed(f"the run ended by itself with {process.returncode}")
        time.sleep(0.01)


def _assert_unbroken(run: Path) -> None:
    steps = [step["step"] for step in metrics(run)]
    if steps != list(range(1, len(steps) + 1)):
        raise Failed("recorded steps have a gap or a repetition")


DRILLS: dict[str, tuple[Callable[[int], str], int]] = {
    "determinism": (determinism, 10),
    "sigterm": (sigterm, 20),
    "kill": (kill, 20),
    "soak": (soak, 2000),
    "grids": (grids, 1000),
}


def main(asked: list[str]) -> int:
    """Runs the drills that are asked for, or all; the number of those that failed."""
    rank_pool.PRELOAD.extend(module for module in launch.PRELOAD if module not in rank_pool.PRELOAD)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    random.seed(0)
    failed = 0
    print(f"{'drill':12} {'seconds':>8}  result", flush=True)
    for word in asked or DRILLS:
        name, _, count = word.partition("=")
        if name not in DRILLS:
            print(f"no drill {name!r}: choose from {', '.join(DRILLS)}", file=sys.stderr)
            return 2
        drill, usual = DRILLS[name]
        began = time.monotonic()
        try:
            result = drill(int(count or usual))
        except (AssertionError, subprocess.TimeoutExpired) as error:
            failed += 1
            result = f"FAILED: {error}"
        print(f"{name:12} {time.monotonic() - began:8.0f}  {result}", flush=True)
    return failed


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main(sys.argv[1:]))
