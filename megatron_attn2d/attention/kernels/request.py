"""What a call of attention asks of a kernel; in a module of its own, since kernels and their choice both need it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Request:
    """One call's demands, for `choose_kernel` and each kernel's `refusal`.

    Attributes:
        device: type of the device, "cpu" or "cuda".
        dtype: of queries, keys and values.
        head_dim: of queries and keys.
        v_head_dim: of values.
        windows: bands occur besides the full rectangle and the causal square. They come with left and right None or
            not negative, on rectangles too, and leave no row without a key.
        dropout: probabilities are dropped.
        grouped: there are fewer key heads than query heads.
        segments: calls come as tables of segments, for packed sequences and for windows on a grid.
        deterministic: two backward passes must agree bit for bit.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    windows: bool = False
    dropout: bool = False
    deterministic: bool = False
    grouped: bool = False
    segments: bool = False

    def __str__(self) -> str:
        extras = [
            name for name in ("windows", "dropout", "deterministic", "grouped", "segments") if getattr(self, name)
        ]
        return ", ".join(
            (f"device {self.device}", str(self.dtype), f"head dims {self.head_dim} and {self.v_head_dim}", *extras)
        )
