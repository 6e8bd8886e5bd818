"""Run the kernel calls of tables of segments, forward and backward.

Rows are [rows, b, h, d] and [keys, b, g, d], by sequence (see `packing`); log-sum-exps and deltas are [b, h, rows]. A
kernel takes a batch as more heads of one sequence, except under dropout, where the number of the sequence matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_attn2d.attention.kernels.base import BackwardRows, Softmax
from megatron_attn2d.attention.merge import accumulation_dtype
from megatron_attn2d.attention.tables import KeyGroup, TileTables

if TYPE_CHECKING:
    from megatron_attn2d.attention.tile import AttentionOp

FEW_CALLS = 4
"""Gradients of keys may be added up in 16 bits, as they come, if at most so many calls contribute."""

type Positions = tuple[Tensor, Tensor] | None
"""Where the rows and keys stand in the whole pack, [1, rows] and [1, keys]; None without dropout."""

type _Pick = Callable[[Tensor], Tensor]


def attend_tables(
    tables: TileTables, op: AttentionOp, positions: Positions, q: Tensor, k: Tensor, v: Tensor, zeros: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs [rows, b, h, dv] and log-sum-exps [b, h, rows] of each layer of the tables.

    A row that no call of the layer has gets the log-sum-exp -inf. Its output is 0 with `zeros`, else anything.
    """
    rows, batch, heads, _ = q.shape
    wide = accumulation_dtype(q.dtype)
    shape = (rows, batch, heads, v.size(3))
    outs = [q.new_zeros(shape) if zeros and not covered else q.new_empty(shape) for covered in tables.covered]
    lses = [
        q.new_empty((batch, heads, rows), dtype=wide)
        if covered
        else q.new_full((batch, heads, rows), -torch.inf, dtype=wide)
        for covered in tables.covered
    ]
    for call in tables.calls:
        for of_rows, of_numbers, softmax in _sequences(op, positions, q):
            into = of_rows(outs[call.layer]), of_numbers(lses[call.layer])
            op.kernel.forward_segments(of_rows(q), of_rows(k), of_rows(v), call.segments, softmax, into)
    return outs, lses


def differentiate_tables(
    tables: TileTables,
    op: AttentionOp,
    positions: Positions,
    rows: BackwardRows,
    keys: list[Tensor],
    add: Callable[[KeyGroup, list[Tensor]], None],
) -> list[Tensor]:
    """Gradients of queries of each layer, [rows, b, h, d]; 0 for rows that no call of the layer has.

    Args:
        tables, op, positions: as in `attend_tables`.
        rows: all rows, q [rows, b, h, d].
        keys: k and v, [keys, b, g, d]; the list is emptied after the last call, as memory is short.
        add: is given the gradients of k and v once per group of calls, and empties their list.
    """
    dqs = [_room(rows.q, covered) for covered in tables.covered]
    for group in tables.groups:
        k, v = keys
        gradients = [_room(x, group.covered) for x in keys]
        for call in group.calls:
            for of_rows, of_numbers, softmax in _sequences(op, positions, rows.q):
                op.kernel.backward_segments(
                    rows.each(of_rows, of_numbers),
                    of_rows(k),
                    of_rows(v),
                    call.segments,
                    softmax,
                    (of_rows(dqs[call.layer]), of_rows(gradients[0]), of_rows(gradients[1])),
                )
        if group is tables.groups[-1]:
            keys.clear()
        del k, v
        add(group, gradients)
    return dqs


def _room(like: Tensor, covered: bool) -> Tensor:
    """A contiguous buffer for gradients; zeros where calls leave rows out."""
    return like.new_empty(like.shape) if covered else like.new_zeros(like.shape)


def _sequences(op: AttentionOp, positions: Positions, q: Tensor) -> Iterator[tuple[_Pick, _Pick, Softmax]]:
    """Per kernel call: how to take [rows, heads, d] and [heads, rows] out of a batch's tensors, and its softmax."""
    batch, heads = q.shape[1:3]
    if op.dropout is None or positions is None:
        yield lambda x: x.flatten(1, 2), lambda x: x.flatten(0, 1), Softmax(op.scale)
        return
    for i in range(batch):
        number = torch.arange(i, i + 1, device=q.device)
        softmax = Softmax(op.scale, op.dropout.at(number, heads, *positions))
        yield lambda x, i=i: x[:, i], lambda x, i=i: x[i], softmax  # type: ignore[misc]
