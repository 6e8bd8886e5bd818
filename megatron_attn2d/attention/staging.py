"""Copies of small tables of numbers from the host to a GPU, for which nobody waits."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_NUMBERS = 2**20


def to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """A copy of whole numbers on `device`, int32 of the same shape.

    Raises:
        RuntimeError: a CUDA graph is being captured. Its replays would read memory that holds other numbers by then.
    """
    if device.type != "cuda":
        return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int32))
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "packed sequences of new lengths can't be planned in a CUDA graph: call once before, or pass "
            "cu_seqlens as a tensor on the GPU"
        )
    return _staging(device).copy(numbers)


class _Staging:
    """Pinned memory that is used again and again: allocating it anew would wait for the GPU.

    Numbers go to one half of it, then to the other half, whose last copies have ended by then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._halves = torch.empty(2, _NUMBERS // 2, dtype=torch.int32, pin_memory=True)
        self._ended: list[torch.cuda.Event | None] = [None, None]
        self._half = self._next = 0

    def copy(self, numbers: np.ndarray) -> Tensor:
        """See `to_device`."""
        count = numbers.size
        if count > self._halves.size(1):
            return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int32)).to(self._device)
        if self._next + count > self._halves.size(1):
            self._turn()
        room = self._halves[self._half, self._next : self._next + count]
        room.numpy()[:] = numbers.ravel()
        self._next += count
        return room.to(self._device, non_blocking=True).view(numbers.shape)

    def _turn(self) -> None:
        self._ended[self._half] = torch.cuda.current_stream(self._device).record_event()
        self._half, self._next = 1 - self._half, 0
        ended = self._ended[self._half]
        if ended is not None:
            ended.synchronize()


@lru_cache(maxsize=16)
def _staging(device: torch.device) -> _Staging:
    return _Staging(device)
