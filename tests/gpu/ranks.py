"""Ranks on GPUs: each has one where there are enough, and they share them where there are not."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.pool import RankPool

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from hosts import posing


class GpuRanks(RankPool):
    """Ranks that may use CUDA: started afresh, for a process forked from one that has touched CUDA can't.

    Rank r takes GPU r % GPUs, by LOCAL_RANK. NCCL refuses two ranks of one host on one GPU, so that each rank poses as
    a host of its own where they share: messages then go through loopback sockets. On CPU ranks nothing of this is set.
    """

    def __init__(self) -> None:
        super().__init__("spawn")
        self._hosts = torch.cuda.device_count() == 1

    def run(self, fn: Callable[..., Any], nranks: int, *args: Any, hosts: bool = False, **kwargs: Any) -> list[Any]:
        """As `RankPool.run`. With `hosts` ranks pose as hosts even where each has a GPU."""
        hosts |= 0 < torch.cuda.device_count() < nranks
        if nranks > 1 and hosts != self._hosts:
            self.close()  # NCCL reads its variables once per process
            self._hosts = hosts
        return super().run(fn, nranks, *args, **kwargs)

    def variables(self, rank: int, nranks: int) -> dict[str, str]:
        gpus = torch.cuda.device_count()
        if not gpus:
            return {}
        # As in training: see configs/clusters/gpu.yaml.
        found = {"LOCAL_RANK": str(rank % gpus), "NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE", "0")}
        if self._hosts:
            found |= posing(rank)
            found["NCCL_GRAPH_REGISTER"] = "0"  # of what a CUDA graph sends: see upstream/graph_environment.py
        return found


def take_gpu() -> torch.device:
    """This rank's GPU, the current device from now on, without what its last test took."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    torch.cuda.empty_cache()
    return device


def start() -> None:
    """A world over NCCL."""
    take_gpu()
    dist.init_process_group("nccl")
