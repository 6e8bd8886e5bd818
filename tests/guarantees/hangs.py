"""The drill of hangs: a rank stops in each of our collectives in turn, while a model trains."""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.guarantees.jobs import Failed, job
from tests.guarantees.targets import stop_in_training
from tests.megatron.runs import arguments, context_parallel

ROW, COLUMN = "queries in the row of ranks", "keys and values in the column of ranks"
GATHER, RETURN = "gathering", "returning results"
TILED = {**context_parallel("attention2d", 2, 2), "hierarchical_context_parallel_sizes": [1, 2, 2, 1]}
HEADS = "Ulysses group of ranks [0, 1]: exchanging sequence for heads or back"

CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("1x2", context_parallel("attention2d", 1, 2), [f"{ROW} [0, 1]: {what}" for what in (GATHER, RETURN) * 2]),
    ("2x1", context_parallel("attention2d", 2, 1), [f"{COLUMN} [0, 1]: {what}" for what in (GATHER, GATHER, RETURN)]),
    (
        "ring",
        context_parallel("p2p", 1, 2),
        [
            f"ring of ranks [0, 1]: {what}"
            for what in (
                "k, v at step 0",
                "k, v at step 0 of the backward pass",
                "dk, dv at step 1 of the backward pass",
            )
        ],
    ),
    ("all_gather", context_parallel("all_gather", 1, 2), [f"{COLUMN} [0, 1]: {GATHER}"]),
    ("ulysses", {**context_parallel("a2a", 1, 2), "num_query_groups": 4}, [HEADS] * 4),
    (
        "1x2 with PP2",
        {**context_parallel("attention2d", 1, 2), "pipeline_model_parallel_size": 2, "num_layers": 2},
        [f"{ROW} [0, 1]: {GATHER}"],
    ),
    (
        "1x2 with TP2",
        {**context_parallel("attention2d", 1, 2), "tensor_model_parallel_size": 2, "sequence_parallel": True},
        [f"{ROW} [1, 3]: {GATHER}"],
    ),
    (
        "2x2 in tiles 1x2",
        TILED,
        [
            f"{COLUMN} [1, 3]: {GATHER}",
            f"{ROW} [0, 1]: {GATHER}",
            f"{ROW} [0, 1]: {RETURN}",
            f"{COLUMN} [1, 3]: {GATHER}",
            f"{ROW} [0, 1]: {GATHER}",
            f"{ROW} [0, 1]: {RETURN}",
            f"{COLUMN} [1, 3]: {RETURN}",
        ],
    ),
]
"""Name, options and, for each exchange of a layer, forward and backward, what is to be said about it."""


def hangs(seconds: int) -> str:
    """SIGSTOP of rank 1 in each exchange of step 2, and in the comparison at start-up; groups wait for `seconds`."""
    asked = [("start-up", CASES[0][1], -1, "comparing how all 2 ranks were started failed on rank 0")]
    for name, options, told in CASES:
        for where, what in enumerate(told):
            asked.append((name, options, where, f"ExchangeError: layer 1, {what} failed on rank "))
    slowest, failed = 0.0, []
    for name, options, where, expected in asked:
        try:
            slowest = max(slowest, _stopped(options, where, expected, seconds))
            print(f"located: {name}, exchange {where}", file=sys.stderr, flush=True)
        except Failed as failure:  # the other exchanges are tried nevertheless
            failed.append(f"{name}, exchange {where}: {failure}")
            print(f"FAILED: {failed[-1]}", file=sys.stderr, flush=True)
    if failed:
        raise Failed(f"{len(failed)} of {len(asked)}: {'; '.join(failed)}")
    names, number = ", ".join(["start-up", *(name for name, *_ in CASES)]), len(asked)
    return f"{number} of {number} located, the slowest job ended {slowest:.0f} s after the step before ({names})"


def _stopped(options: dict[str, Any], where: int, expected: str, seconds: int) -> float:
    """Seconds from the end of step 1, or at start-up from the launch, to the end of the job."""
    stages = options.get("pipeline_model_parallel_size", 1) * options.get("tensor_model_parallel_size", 1)
    target = functools.partial(stop_in_training, where=where, seconds=seconds)
    with tempfile.TemporaryDirectory() as scratch:
        args = arguments(**{"run_dir": scratch, "mock_data": True, "num_layers": 1, "train_iters": 5, **options})
        with job(options["context_parallel_size"] * stages, args, Path(scratch, "output"), target) as training:
            if where >= 0:
                training.until(lambda: "step 1/" in training.said())
            began = time.monotonic()
            code = training.wait(seconds + 60)
            said = training.said()
            if code != 1 or expected not in said or not said.endswith("may have waited for it: rank 1\n"):
                raise Failed(f"exit code {code}, not told {expected!r} and that rank 1 was waited for: {said[-600:]!r}")
            return time.monotonic() - began
