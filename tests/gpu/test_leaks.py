"""Grids built, used and destroyed on GPUs leave nothing behind, and attention makes no CUDA stream of its own."""

from __future__ import annotations

import gc
import os
import time
import traceback
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_attn2d import Grid, attention2d
from tests.gpu.ranks import GpuRanks, start

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MIB = 2**20
BOUNDS = {"process groups": 0, "file handles": 4, "threads": 4, "reserved MiB": 2, "MiB used on the GPU": 128}
"""How much more 80 grids may leave: a communicator that is not destroyed has threads, sockets and some MiB each."""


def use(grid: Grid) -> None:
    """One forward and backward call of attention."""
    q, k, v = (torch.randn(256, 1, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = attention2d(q, k, v, grid)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def held() -> dict[str, float]:
    """What this process holds."""
    gc.collect()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {
        "process groups": len(dist.distributed_c10d._world.pg_map),
        "file handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "reserved MiB": torch.cuda.memory_reserved() / MIB,
        "MiB used on the GPU": (total - free) / MIB,
    }


def build_grids(rank: int, rows: int, cols: int, warm: int, count: int, destroys: bool = True) -> dict[str, float]:
    """What this rank holds more after `count` grids than it did after the first `warm` of them."""
    start()
    nowhere = torch.ones(1, device="cuda")

    def build() -> None:
        group = dist.new_group()
        assert isinstance(group, dist.ProcessGroup)
        grid = Grid.from_group(group, rows=rows, cols=cols)
        use(grid)
        dist.all_reduce(nowhere)
        torch.cuda.synchronize()
        if destroys:
            for made in dict.fromkeys((grid.kv_group, grid.q_group, group)):
                if made is not None:
                    dist.destroy_process_group(made)

    def settled() -> dict[str, float]:
        """As `held`, when all ranks have had time to end what ends by itself."""
        dist.all_reduce(nowhere)
        before = held()
        for _ in range(20):
            time.sleep(0.5)
            now = held()
            if all(now[what] >= before[what] for what in now):
                break
            before = now
        dist.all_reduce(nowhere)
        return before

    for _ in range(warm):
        build()
    first = settled()
    for _ in range(count - warm):
        build()
    last = settled()
    return {what: last[what] - first[what] for what in first}


@pytest.mark.parametrize(("rows", "cols"), [(2, 1), (2, 2)], ids=["2 ranks", "4 ranks"])
def test_a_hundred_grids_leave_nothing_behind(pool: GpuRanks, rows: int, cols: int) -> None:
    grown = pool.run(build_grids, rows * cols, rows, cols, 20, 100, init_group=False, hosts=True, timeout=900)
    print(*grown, sep="\n")
    assert [{k: v for k, v in more.items() if v > BOUNDS[k]} for more in grown] == [{}] * (rows * cols)


def test_grids_that_are_not_destroyed_are_found(pool: GpuRanks) -> None:
    for more in pool.run(build_grids, 2, 2, 1, 2, 12, destroys=False, init_group=False, hosts=True):
        assert more["process groups"] == 2 * 10  # the group, and its column with high priority
        assert more["threads"] > BOUNDS["threads"] or more["file handles"] > BOUNDS["file handles"]


def count_streams(rank: int) -> tuple[list[str], int, int, int]:
    """Where streams are made in the calls after the first; allocated bytes after 10 and 50; streams made by hand."""
    start()
    assert dist.group.WORLD is not None
    grid = Grid.from_group(dist.group.WORLD, rows=2, cols=1)
    made: list[str] = []
    original = torch.cuda.Stream.__new__

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if "stream_id" not in kwargs:  # with it an existing stream is wrapped, as torch.cuda.current_stream() does
            made.append("".join(traceback.format_stack(limit=8)))
        return original(cls, *args, **kwargs)

    allocated = []
    with mock.patch.object(torch.cuda.Stream, "__new__", new):
        use(grid)
        made.clear()
        for i in range(2, 51):
            use(grid)
            if i in (10, 50):
                torch.cuda.synchronize()
                allocated.append(torch.cuda.memory_allocated())
        by_us = list(made)
        torch.cuda.Stream()
    return by_us, *allocated, len(made) - len(by_us)


def test_calls_make_no_stream_and_keep_no_memory(pool: GpuRanks) -> None:
    for by_us, early, late, by_hand in pool.run(count_streams, 2, init_group=False, hosts=True):
        assert by_us == []
        assert late == early
        assert by_hand == 1, "what counts the streams counts none"
