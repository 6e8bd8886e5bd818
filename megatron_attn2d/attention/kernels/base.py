"""What a kernel is, what a call asks of it, and its arguments.

Legend: sq rows of queries, sk of keys, b batch, h query heads, g key heads, d head dim, dv the values' head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_attn2d.attention.dropout import KeepMask
from megatron_attn2d.attention.layout import Band
from megatron_attn2d.attention.merge import surrogate_out
from megatron_attn2d.attention.segments import Segments


class Softmax(NamedTuple):
    """How the scores of one kernel call become probabilities.

    Attributes:
        scale: factor on the scores.
        dropout: which probabilities are kept; None keeps all.
    """

    scale: float
    dropout: KeepMask | None = None


class BackwardRows(NamedTuple):
    """Rows of queries and what the gradient of their attention needs.

    Shapes are those of a kernel call; under a table of segments rows are [rows, h, d] and statistics [h, rows], and a
    tile has slots before these dims.

    Attributes:
        q: queries, [sq, b, h, d].
        dout: gradient of their output over all keys, [sq, b, h, dv].
        lse: log-sum-exp over all keys, [b, h, sq].
        delta: rowsum(dout * output), like lse; may be None where the kernel derives it from `out`.
        out: the output over all keys or `merge.surrogate_out`, like dout; may be None unless the kernel needs it.
    """

    q: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor | None
    out: Tensor | None

    @classmethod
    def of(cls, kernel: Kernel, statistics: Tensor, q: Tensor, dout: Tensor, out: Tensor | None = None) -> BackwardRows:
        """The rows with what the kernel needs: delta, or an output, which is a surrogate if `out` is None.

        Args:
            kernel: the one that differentiates.
            statistics: [slots, 1 or 2, b, h, n], log-sum-exps and deltas; without deltas if the kernel takes `out`.
            q, dout, out: [slots, n, b, h, head dim].
        """
        lse, *delta = statistics.unbind(1)
        if not kernel.needs_out:
            return cls(q, dout, lse, delta[0], None)
        return cls(q, dout, lse, None, surrogate_out(dout, delta[0]) if out is None else out)

    def each(self, rows: Callable[[Tensor], Tensor], statistics: Callable[[Tensor], Tensor]) -> BackwardRows:
        """The same with `rows` applied to q, dout and out, and `statistics` to lse and delta."""
        return BackwardRows(
            rows(self.q),
            rows(self.dout),
            statistics(self.lse),
            None if self.delta is None else statistics(self.delta),
            None if self.out is None else rows(self.out),
        )


type Outputs = tuple[Tensor, Tensor]
"""Output and log-sum-exp."""

type Gradients = tuple[Tensor, Tensor, Tensor]
"""dq, dk and dv."""


class Kernel(Protocol):
    """One implementation of attention on one device."""

    @property
    def name(self) -> str:
        """The name by which a user asks for it."""
        ...

    @property
    def needs_out(self) -> bool:
        """Whether `backward` wants the output, to derive delta from it; else delta suffices."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether two backward passes agree bit for bit under torch.use_deterministic_algorithms."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, band: Band, softmax: Softmax) -> Outputs:
        """Attend q [sq, b, h, d] to k [sk, b, g, d] and v [sk, b, g, dv], h a multiple of g.

        `band` says who sees whom; CAUSAL comes with sq = sk only. Returns the output [sq, b, h, dv] and the log-sum-exp
        [b, h, sq] of the scaled scores, natural logarithm, fp32 (fp64 for fp64 inputs). Probabilities are those over
        all keys of a row, dropped ones included.
        """
        ...

    def backward(self, rows: BackwardRows, k: Tensor, v: Tensor, band: Band, softmax: Softmax) -> Gradients:
        """Gradients of the scores between rows and these keys, like q, k and v."""
        ...

    def forward_segments(
        self, q: Tensor, k: Tensor, v: Tensor, table: Segments, softmax: Softmax, into: Outputs
    ) -> None:
        """Attend the segments of a table, for kernels that serve requests with `segments`.

        Args:
            q, k, v: [rows, h, d], [keys, g, d] and [keys, g, dv], the last dim contiguous.
            table: who attends whom; its band is FULL, CAUSAL on squares, or for requests with `windows` any.
            softmax: a mask of dropout is that of one sequence, the rows and keys being all of the two buffers.
            into: receives the results of the table's query rows and keeps all others; out [rows, h, dv] and lse
                [h, rows], fp32 (fp64 for fp64 inputs), the last dim contiguous.
        """
        ...

    def backward_segments(
        self, rows: BackwardRows, k: Tensor, v: Tensor, table: Segments, softmax: Softmax, into: Gradients
    ) -> None:
        """Gradients of a table's segments; arguments as in `forward_segments`.

        `into`, like q, k and v, receives those of the table's query rows and key rows and keeps all others.
        """
        ...


@dataclass(frozen=True)
class Request:
    """What a call asks of a kernel, for `choose_kernel` and each kernel's `refusal`.

    Attributes:
        device: type of the device, "cpu" or "cuda".
        dtype: of queries, keys and values.
        head_dim: of queries and keys.
        v_head_dim: of values.
        windows: bands occur besides the full rectangle and the causal square, on rectangles too. Their left and right
            are None or not negative, and they leave no row without a key.
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
