"""The ranks' side of a watched program (`watched.Watched`): work through cases, all ranks alike, and record each."""

from __future__ import annotations

import json
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

type Attempt = tuple[dict[str, float], str]
"""What was measured of a case, and why it could not be, or nothing."""


def run_cases(args: Namespace, attempt: Callable[[dict[str, Any]], Attempt]) -> Iterator[tuple[int, bool]]:
    """Attempt `args.cases` from `args.first` on; yields after each its place, and whether it failed on some rank.

    What cannot end before `args.deadline`, by the clock of rank 0, is recorded as not run.
    """
    agreement = dist.new_group(backend="gloo")
    for i, case in enumerate(args.cases):
        if i < args.first:
            continue
        late = [time.time() + case["expected_s"] > args.deadline]
        dist.broadcast_object_list(late, 0, agreement)  # by one clock
        if late[0]:
            record(args, {"end": i, "failed": "not run: out of time"})
            continue
        record(args, {"begin": i})
        begin = time.time()
        row, error = attempt(case)
        errors: list[str | None] = [None] * args.ranks
        dist.all_gather_object(errors, error, agreement)
        failed = next((f"{e} (rank {r})" for r, e in enumerate(errors) if e), None)
        record(args, {"end": i, "took_s": time.time() - begin, **({"failed": failed} if failed else row)})
        yield i, failed is not None


def told(error: Exception) -> str:
    """The first line of an error, or its kind; the traceback of rank 0 goes into the log."""
    if dist.get_rank() == 0:
        traceback.print_exc()
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def record(args: Namespace, what: dict[str, Any]) -> None:
    """Append a line to `args.rows`, on rank 0."""
    if dist.get_rank() == 0:
        with args.rows.open("a") as rows:
            rows.write(json.dumps(what) + "\n")
