"""What a run of long steps says before its first step has ended: how long a micro-batch takes, and so a step, and all.

A step of a million tokens takes minutes per micro-batch. Whoever starts one wants to know before the first step ends
whether it is as fast as planned, and how much of it was compilation.
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
"""Seconds of a micro-batch from which on its time is told; shorter steps are told soon enough."""


class FirstStep:
    """Follows the first micro-batches after a start, on a rank of the last pipeline stage."""

    def __init__(self, args: Namespace, tell: Callable[[str], None]) -> None:
        self._args, self._tell = args, tell
        self._watching = False
        self._began: float | None = None
        self._seconds: list[float] = []

    def watched(self, forward_step: Any, micro_batches: int, steps: int) -> Any:
        """`forward_step` of a step of so many micro-batches, the first of `steps`.

        The backward pass of a micro-batch has ended when the next one begins.
        """
        self._began = None
        # Neither in the interleaved schedule nor in a graph's replay does a call begin when the one before has ended.
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
        """A micro-batch begins, or the step has ended: tells of the one before, the first two of them."""
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
"""Micro-batches that are told of: one with what is done once, and one without."""


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
