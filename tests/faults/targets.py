"""Ranks of which one stops: `python -m tests.faults.targets SECONDS MODE ROWS COLS HEADS WHERE...`.

There is a launch for each WHERE, the number of the exchange, from 0, in which rank 1 stops. After it a line with its
exit code and the seconds it took goes to stdout; what the launcher says goes to stderr.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_attn2d import Grid, attention2d, launch, ring_attention
from megatron_attn2d.attention import exchange, ring, ulysses


def stop_in(args: Sequence[str]) -> None:
    """Attention forward and backward over all ranks; rank 1 stops when it starts its exchange number `where`."""
    seconds, mode, rows, cols, heads, where = args
    dist.init_process_group("gloo")
    group = dist.new_group(timeout=timedelta(seconds=float(seconds)))
    assert isinstance(group, dist.ProcessGroup)
    launches = 0

    def stopping(original: Any) -> Any:
        def start(*given: Any, **named: Any) -> Any:
            nonlocal launches
            if dist.get_rank() == 1 and launches == int(where):
                os.kill(os.getpid(), signal.SIGSTOP)
            launches += 1
            return original(*given, **named)

        return start

    patches = [mock.patch.object(module, "launch", stopping(exchange.launch)) for module in (exchange, ring, ulysses)]
    for patch in patches:
        patch.start()
    q = torch.ones(8, 1, 4, 8, requires_grad=True)
    if mode == "ring":
        out = ring_attention(q, q, q, group, label="layer 3")
    else:
        grid = Grid.from_group(group, rows=int(rows), cols=int(cols), heads=int(heads))
        out = attention2d(q, q, q, grid, label="layer 3")
    out.sum().backward()
    raise AssertionError("no rank stopped")


if __name__ == "__main__":
    launch.PRELOAD = ()
    *arguments, _ = sys.argv[1:7]
    for exchange_number in sys.argv[6:]:
        began = time.monotonic()
        code = launch.run_local(2, stop_in, [*arguments, exchange_number])
        print(exchange_number, code, time.monotonic() - began, flush=True)
        print("====", file=sys.stderr, flush=True)
