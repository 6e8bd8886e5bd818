"""What is told of the first micro-batches: by a clock of the test's own."""

from __future__ import annotations

from argparse import Namespace
from unittest import mock

import pytest

from megatron_attn2d.training import first_step
from megatron_attn2d.training.first_step import FirstStep


def told(durations: list[float], micro_batches: int, **changes: object) -> list[str]:
    """What a start says of micro-batches that take so long, in steps of so many; the optimizer takes no time."""
    said: list[str] = []
    args = Namespace(**{"virtual_pipeline_model_parallel_size": None, "cuda_graph_impl": "none", **changes})
    first, clock = FirstStep(args, said.append), [0.0]

    def now() -> float:
        return clock[0]

    with mock.patch.object(first_step.time, "perf_counter", now):
        for step in range(len(durations) // micro_batches):
            rest = 10 - step
            forward_step = first.watched(lambda: None, micro_batches, rest)
            for duration in durations[step * micro_batches : (step + 1) * micro_batches]:
                forward_step()
                clock[0] += duration
            first.mark(micro_batches, rest)
            clock[0] += 1000  # a checkpoint
    return said


@pytest.mark.parametrize(
    ("durations", "micro_batches", "expected"),
    [
        (
            [300.0, 220.0, 220.0, 220.0] * 2,
            4,
            [
                "micro-batch 1 took 0:05:00, with what is compiled and allocated once; a step of 4 takes at most "
                "0:20:00",
                "micro-batch 2 took 0:03:40; compilation and first allocations took 0:01:20; a step of 4 takes about "
                "0:14:40, 10 of them 2:26:40",
            ],
        ),
        (
            [300.0, 220.0, 220.0],
            1,
            [
                "micro-batch 1 took 0:05:00, with what is compiled and allocated once; a step of 1 takes at most "
                "0:05:00",
                "micro-batch 2 took 0:03:40; compilation and first allocations took 0:01:20; a step of 1 takes about "
                "0:03:40, 9 of them 0:33:00",
            ],
        ),
        ([2.0, 1.0, 1.0, 1.0], 2, []),  # the steps' own lines come soon enough
    ],
)
def test_what_is_told(durations: list[float], micro_batches: int, expected: list[str]) -> None:
    assert told(durations, micro_batches) == expected


@pytest.mark.parametrize("changes", [{"virtual_pipeline_model_parallel_size": 2}, {"cuda_graph_impl": "local"}])
def test_nothing_is_told_where_calls_do_not_follow_each_other(changes: dict[str, object]) -> None:
    assert told([300.0, 220.0], 2, **changes) == []
