"""Tells before the first long step has ended how long a micro-batch takes, and so a step and the whole run.

A step of a million tokens takes minutes per micro-batch. A user wants to know before it ends whether the run is as fast
as planned, and how much of the time was compilation.
"""

from __future__ import annotations

import functools
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

LONG_S = 20.0
"""Shortest micro-batch, in seconds, that is told of; shorter steps end soon."""


class FirstStep:
    """Measures the first micro-batches after a start, on a rank of the last pipeline stage.

    Args:
        args: Megatron's arguments, as it has read them.
        tell: prints a line.
    """

    def __init__(self, args: Namespace, tell: Callable[[str], None]) -> None:
        self._args, self._tell = args, tell
        self._watching = False
        self._began: float | None = None
        self._seconds: list[float] = []

    def watched(self, forward_step: Any, micro_batches: int, steps: int) -> Any:
        """`forward_step`, wrapped so that each call marks the begin of a micro-batch.

        By then the backward pass of the micro-batch before has ended.

        Args:
            forward_step: of Megatron's schedule.
            micro_batches: per step.
            steps: that the run still has to make, this one included.
        """
        self._began = None
        # In the interleaved schedule calls overlap, and a replayed CUDA graph makes none.
        apart = self._args.virtual_pipeline_model_parallel_size is None and self._args.cuda_graph_impl == "none"
        self._watching = apart and len(self._seconds) < _ENOUGH
        if not self._watching:
            return forward_step

        @functools.wraps(forward_step)
        def watch(*args: Any, **kwargs: Any) -> Any:
            self.mark(micro_batches, steps)
            return forward_step(*args, **kwargs)

        return watch

    def mark(self, micro_batches: int, steps: int) -> None:
        """Note that a micro-batch begins, or that the step has ended, and tell of the micro-batch before."""
        if not self._watching or len(self._seconds) >= _ENOUGH:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._began is not None:
            self._seconds.append(now - self._began)
            if min(self._seconds) >= LONG_S:
                self._tell(self._sentence(micro_batches, steps))
        self._began = now

    def _sentence(self, micro_batches: int, steps: int) -> str:
        first, *second = self._seconds
        said = f"micro-batch {len(self._seconds)} took {_span(self._seconds[-1])}"
        if not second:
            return (
                f"{said}, with what is compiled and allocated once; a step of {micro_batches} takes at most "
                f"{_span(first * micro_batches)}"
            )
        once, step = max(0.0, first - second[0]), second[0] * micro_batches
        return (
            f"{said}; compilation and first allocations took {_span(once)}; a step of {micro_batches} takes about "
            f"{_span(step)}, {steps} of them {_span(step * steps)}"
        )


_ENOUGH = 2
"""Micro-batches that are told of: the first, which compiles and allocates, and the second, which does not."""


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
