"""Measures how long a rank waits for attention's messages, in `Pending.wait`.

Messages that overlap with kernels cost no time there: this is the exposed communication, not all of it.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from megatron_attn2d.megatron.upstream.patching import Patch


class AttentionWait:
    """Adds up the time that this rank waits for messages: on GPUs the time of its compute stream, by events."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def patch(self) -> Patch:
        """The patch that measures waiting while it is applied."""
        return Patch("megatron_attn2d.attention.messages:Pending.wait", self._timed, "waiting for messages is measured")

    def take(self) -> float:
        """Seconds waited since the last call; on GPUs the host waits until the last message has arrived."""
        seconds = self._seconds
        for begin, end in self._spans:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1000
        self._seconds = 0.0
        self._spans.clear()
        return seconds

    def _timed(self, wait: Any) -> Any:
        @functools.wraps(wait)
        def timed(pending: Any) -> None:
            if not pending.works:
                wait(pending)
            elif torch.cuda.is_available():
                span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                span[0].record()
                wait(pending)
                span[1].record()
                self._spans.append(span)
            else:
                begin = time.perf_counter()
                wait(pending)
                self._seconds += time.perf_counter() - begin

        return timed
