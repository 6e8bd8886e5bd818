"""Tables of segments for kernels that return new tensors: which rows a table has, and how to copy results there."""

from __future__ import annotations

import torch
from torch import Tensor


def inside(starts: Tensor, lengths: Tensor, rows: int) -> Tensor:
    """Which rows of a buffer are in a segment, bool [rows]; no number is read back from the device."""
    steps = torch.zeros(rows + 1, dtype=torch.int32, device=lengths.device)
    begins, ones = starts[:-1].long(), torch.ones_like(lengths)
    steps.index_add_(0, begins, ones).index_add_(0, begins + lengths, ones, alpha=-1)
    return steps[:-1].cumsum(0) > 0


def put(into: Tensor, found: Tensor, rows: Tensor) -> None:
    """Copies the rows [n, ...] of `found` that a table has, and leaves all others of `into` as they are."""
    torch.where(rows.view(-1, *[1] * (found.dim() - 1)), found, into, out=into)


def running(lengths: Tensor) -> Tensor:
    """Running totals from 0 on, [S + 1] int32."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
