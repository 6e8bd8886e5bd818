"""Ranks of which one stops: `python -m tests.guarantees.targets SECONDS MODE ROWS COLS HEADS WHERE...`.

There is a launch for each WHERE, the number of the exchange, from 0, in which rank 1 stops. After it a line with its
exit code and the seconds it took goes to stdout; what the launcher says goes to stderr.

`python -m tests.guarantees.targets training SECONDS RANKS WHERE ...` is one launch that trains.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention import messages, ring
from megatron_attn2d.launch import ranks
from megatron_attn2d.training.guards import same_start


def stop_in(args: Sequence[str]) -> None:
    """Attention forward and backward over all ranks; rank 1 stops when it starts its exchange number `where`."""
    seconds, mode, rows, cols, heads, where = args
    dist.init_process_group("gloo")
    group = dist.new_group(timeout=timedelta(seconds=float(seconds)))
    assert isinstance(group, dist.ProcessGroup)
    _stop_in_exchange(int(where), lambda: dist.get_rank() == 1)
    q = torch.ones(8, 1, 4, 8, requires_grad=True)
    if mode == "ring":
        out = ring_attention(q, q, q, group, label="layer 3")
    else:
        grid = Grid.from_group(group, rows=int(rows), cols=int(cols), ulysses_size=int(heads))
        out = attention2d(q, q, q, grid, label="layer 3")
    out.sum().backward()
    raise AssertionError("no rank stopped")


def _stop_in_exchange(where: int, counts: Callable[[], bool]) -> None:
    """Makes this process stop when it starts its exchange number `where` of those with messages while `counts()`."""
    launches, original = 0, messages.send_receive

    def launch_or_stop(group: Any, sends: Any, receives: Any, *rest: Any, **named: Any) -> Any:
        nonlocal launches
        if counts() and (sends or receives):
            if launches == where:
                os.kill(os.getpid(), signal.SIGSTOP)
            launches += 1
        return original(group, sends, receives, *rest, **named)

    for module in (messages, ring):
        mock.patch.object(module, "send_receive", launch_or_stop).start()


def stop_in_training(args: Sequence[str], *, where: int, seconds: float) -> None:
    """Trains; in step 2 rank 1 stops when it starts its exchange number `where`. Groups wait for `seconds`.

    With -1 it stops before the ranks are compared.
    """
    from megatron_attn2d.training import pretrain_gpt

    def parsed() -> Any:
        arguments, config = original()
        arguments.distributed_timeout_minutes = seconds / 60
        return arguments, config

    def counts() -> bool:
        from megatron.training import get_args

        return dist.get_rank() == 1 and getattr(get_args(), "curr_iteration", 0) == 1

    def compare(mine: Any) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        check_agreement(mine)

    original, check_agreement = pretrain_gpt.parsed, same_start.check_agreement
    if where == -1:
        mock.patch.object(same_start, "check_agreement", compare).start()
    mock.patch.object(pretrain_gpt, "parsed", parsed).start()
    _stop_in_exchange(where, counts)
    pretrain_gpt.main(args)
    raise AssertionError("no rank stopped")


def process_groups() -> int:
    """How many process groups this process has made and not destroyed; torch has no public count of the living."""
    return len(dist.distributed_c10d._world.pg_map)


def train_counting_groups(args: Sequence[str], *, directory: Path) -> None:
    """Trains; each rank writes its number of process groups after step 1 and whenever it has changed after a step."""
    from megatron.training import training

    from megatron_attn2d.training import pretrain_gpt

    counts: list[int] = []

    def step(*given: Any, **named: Any) -> Any:
        try:
            return original(*given, **named)
        finally:
            if counts[-1:] != [process_groups()]:
                counts.append(process_groups())
                (directory / f"groups-{dist.get_rank()}").write_text("\n".join(map(str, counts)))

    original = training.train_step
    with mock.patch.object(training, "train_step", step):
        pretrain_gpt.main(args)


if __name__ == "__main__":
    if sys.argv[1] == "training":
        stopping = functools.partial(stop_in_training, seconds=float(sys.argv[2]), where=int(sys.argv[4]))
        sys.exit(ranks.run_local(int(sys.argv[3]), stopping, sys.argv[5:]))
    ranks.PRELOAD = ()
    *arguments, _ = sys.argv[1:7]
    for exchange_number in sys.argv[6:]:
        began = time.monotonic()
        code = ranks.run_local(2, stop_in, [*arguments, exchange_number])
        print(exchange_number, code, time.monotonic() - began, flush=True)
        print("====", file=sys.stderr, flush=True)
