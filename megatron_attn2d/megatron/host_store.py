"""Tensors that wait in the host's memory, copied there and back while the GPU computes.

Copies run on a stream of their own, through pinned buffers that are kept for the next step. What is stored together is
loaded together, and loading one bundle starts the copies of the bundle stored before it: a backward pass asks in the
reverse order, so that each layer's tensors arrive while the layer above is differentiated. On CPU ranks, which have one
memory, the same code copies from tensor to tensor: nothing saved, but the way that training takes on GPUs.
"""

from __future__ import annotations

import weakref
from collections import defaultdict

import torch
from torch import Tensor


class HostStore:
    """Bundles of tensors in the host's memory."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._newest: weakref.ref[Bundle] | None = None
        self.bytes = 0
        """Of all buffers, in use or free."""

    def bundle(self) -> Bundle:
        """A bundle to fill, stored after all others."""
        made = Bundle(self, self._newest)
        self._newest = weakref.ref(made)
        return made

    def _take_buffer(self, like: Tensor) -> Tensor:
        free = self._free[like.shape, like.dtype]
        if free:
            return free.pop()
        self.bytes += like.nbytes
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)

    def _give_buffer(self, buffer: Tensor) -> None:
        self._free[buffer.shape, buffer.dtype].append(buffer)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class Bundle:
    """Tensors stored together, each loaded once, in any order; made by `HostStore.bundle`."""

    def __init__(self, store: HostStore, before: weakref.ref[Bundle] | None) -> None:
        self._store, self._before = store, before
        self._waiting: list[_Waiting | None] = []

    def __del__(self) -> None:
        for one in self._waiting:  # of a pass whose backward never came
            if one is not None:
                self._store._give_buffer(one.buffer)

    def put(self, tensor: Tensor) -> int:
        """Starts to copy `tensor` to the host; the number by which `take` knows it. The caller may drop it at once."""
        self._waiting.append(_Waiting(self._store, tensor))
        return len(self._waiting) - 1

    def take(self, number: int) -> Tensor:
        """The tensor, on its device again. The kernels queued from now on see it whole."""
        one = self._waiting[number]
        assert one is not None, "a stored tensor is loaded once"
        self.prefetch()
        self._waiting[number] = None
        before = None if self._before is None else self._before()
        if before is not None:
            before.prefetch()
        return one.arrived()

    def prefetch(self) -> None:
        """Starts to copy back what has not been loaded yet."""
        for one in self._waiting:
            if one is not None:
                one.prefetch()


class _Waiting:
    """One tensor in its buffer on the host, and on its way back."""

    def __init__(self, store: HostStore, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self._store, self._device = store, tensor.device
        self.buffer = store._take_buffer(tensor)
        self._loaded: Tensor | None = None
        self._event: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self.buffer.copy_(tensor)
            return
        stream = store._stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self.buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is used again only after the copy

    def prefetch(self) -> None:
        if self._loaded is not None:
            return
        # Allocated by the stream that computes, whose earlier kernels may still read this memory.
        self._loaded = torch.empty_like(self.buffer, device=self._device, pin_memory=False)
        if self._device.type != "cuda":
            self._loaded.copy_(self.buffer)
            return
        stream = self._store._stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._loaded.copy_(self.buffer, non_blocking=True)
        self._event = stream.record_event()

    def arrived(self) -> Tensor:
        """The loaded tensor; the buffer goes back to the store, whose stream keeps later copies after this one."""
        loaded = self._loaded
        assert loaded is not None
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
        self._store._give_buffer(self.buffer)
        return loaded
