"""One tile of the score matrix on one device: run its plan's kernel calls forward and backward.

Legend: n tokens of a chunk, b batch, h query heads, g key heads, d head dim, Q and K slots of the plan.
Log-sum-exps and deltas are kept by chunk, [slots, b, h, n], so that a chunk's part is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_attn2d.attention.kernels import Kernel
from megatron_attn2d.attention.layout import TilePlan


@dataclass(frozen=True)
class Queries:
    """Query chunks, and in the backward pass what the gradient of their attention needs.

    Attributes:
        q: queries [slots, n, b, h, d].
        dout: gradient of their output, like q.
        lse, delta: log-sum-exp over all keys and rowsum(dout * out), [slots, b, h, n].
        out: the output over all keys or `merge.stand_in`, like q; None where the kernel does not ask for it.
    """

    q: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor
    out: Tensor | None

    def starting(self, slot: int) -> Queries:
        """The chunks from `slot` on."""
        out = None if self.out is None else self.out[slot:]
        return Queries(self.q[slot:], self.dout[slot:], self.lse[slot:], self.delta[slot:], out)


@dataclass(frozen=True)
class Partials:
    """Partial outputs of one tile, by query slot: `outs` [n, b, h, d] and `lses` [b, h, n]."""

    outs: list[Tensor]
    lses: list[Tensor]


@dataclass(frozen=True)
class PartialGradients:
    """Partial gradients of one tile: dq by query slot, dk and dv by key slot, [n, b, heads, d]."""

    dq: list[Tensor]
    dk: list[Tensor]
    dv: list[Tensor]


def attend(plan: TilePlan, kernel: Kernel, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Partials:
    """The tile's rectangles: q [Q, n, b, h, d], k and v [K, n, b, g, d]."""
    n = q.size(1)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for start, stop, keys in plan.rectangles:
        out, lse = kernel.forward(_rows(q[start:stop]), _rows(k[:keys]), _rows(v[:keys]), causal=False, scale=scale)
        outs += out.unflatten(0, (-1, n)).unbind()
        lses += lse.unflatten(2, (-1, n)).permute(2, 0, 1, 3).contiguous().unbind()
    return Partials(outs, lses)


def attend_diagonal(plan: TilePlan, kernel: Kernel, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Partials:
    """The caller's own chunks [2, n, b, heads, d] on their diagonal, by half; nothing where the plan has none."""
    if not plan.diagonal:
        return Partials([], [])
    out, lse = kernel.forward(*map(_side_by_side, (q, k, v)), causal=True, scale=scale)
    return Partials(_halves(out, 1), _halves(lse, 0))


def differentiate(
    plan: TilePlan, kernel: Kernel, scale: float, queries: Queries, k: Tensor, v: Tensor
) -> PartialGradients:
    """Gradients of the tile's rectangles; arguments as in `attend`."""
    n = k.size(1)
    dq: list[Tensor] = []
    buffers: tuple[Tensor, Tensor] | None = None
    # The longest prefix comes first: its dk and dv are the buffers into which the shorter ones are added.
    for start, stop, keys in reversed(plan.rectangles):
        part_q, *parts = kernel.backward(
            _rows(queries.dout[start:stop]),
            _rows(queries.q[start:stop]),
            _rows(k[:keys]),
            _rows(v[:keys]),
            None if queries.out is None else _rows(queries.out[start:stop]),
            _per_row(queries.lse[start:stop]),
            _per_row(queries.delta[start:stop]),
            causal=False,
            scale=scale,
        )
        dq = [*part_q.unflatten(0, (-1, n)).unbind(), *dq]
        if buffers is None:
            buffers = (parts[0], parts[1])
        else:
            for buffer, part in zip(buffers, parts, strict=True):
                buffer[: keys * n] += part
    assert buffers is not None, "every upper chunk sees the lower chunks of a column: no tile is empty"
    dk, dv = (list(buffer.unflatten(0, (-1, n)).unbind()) for buffer in buffers)
    return PartialGradients(dq, dk, dv)


def differentiate_diagonal(
    plan: TilePlan, kernel: Kernel, scale: float, queries: Queries, k: Tensor, v: Tensor
) -> PartialGradients:
    """Gradients of `attend_diagonal`, by half."""
    if not plan.diagonal:
        return PartialGradients([], [], [])
    gradients = kernel.backward(
        _side_by_side(queries.dout),
        _side_by_side(queries.q),
        _side_by_side(k),
        _side_by_side(v),
        None if queries.out is None else _side_by_side(queries.out),
        queries.lse.flatten(0, 1),
        queries.delta.flatten(0, 1),
        causal=True,
        scale=scale,
    )
    return PartialGradients(*(_halves(part, 1) for part in gradients))


def _rows(chunks: Tensor) -> Tensor:
    """[slots, n, b, h, d] -> [slots * n, b, h, d], a view."""
    return chunks.flatten(0, 1)


def _per_row(chunks: Tensor) -> Tensor:
    """[slots, b, h, n] -> [b, h, slots * n]."""
    return chunks.permute(1, 2, 0, 3).flatten(2)


def _side_by_side(halves: Tensor) -> Tensor:
    """[2, n, b, h, d] -> [n, 2b, h, d]: both diagonal squares as one batch; a view for b = 1."""
    return halves.transpose(0, 1).flatten(1, 2)


def _halves(batch: Tensor, dim: int) -> list[Tensor]:
    """Undo `_side_by_side`: the lower and the upper half of a batch dim."""
    lower, upper = batch.unflatten(dim, (2, -1)).unbind(dim)
    return [lower, upper]
