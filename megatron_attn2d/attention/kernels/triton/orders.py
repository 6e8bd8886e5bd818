"""Orders of the rows of packed sequences, made on the device in one launch."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256
_MOST_COUNTS = 3


@triton.jit(do_not_specialize=["sequences", "steps", "tokens", "first", "second", "third"])  # others in every step
def _row_orders(offsets, chunks, orders, sequences, steps, tokens, first, second, third, BLOCK: tl.constexpr):
    """A block of rows of `first`, `second` or `third` chunks per rank, by the second axis of programs."""
    slots = first
    if tl.program_id(1) == 1:
        slots, orders = second, orders + 2 * first * tokens
    if tl.program_id(1) == 2:
        slots, orders = third, orders + 2 * (first + second) * tokens
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # by sequence
    inside = row < slots * tokens
    sequence = tl.zeros((BLOCK,), tl.int32)
    for i in range(steps):  # the last sequence that does not start behind the row: empty ones come before it
        later = sequence + (1 << (steps - 1 - i))
        known = later < sequences  # rows behind the last must not lead beyond the offsets
        sequence = tl.where(known & (slots * tl.load(offsets + later, known, other=0) <= row), later, sequence)
    offset, chunk = tl.load(offsets + sequence), tl.load(chunks + sequence)
    within = row - slots * offset
    there = (within // chunk) * tokens + offset + within % chunk
    tl.store(orders + slots * tokens + row, there, inside)
    tl.store(orders + there, row, inside & (there >= 0) & (there < slots * tokens))


def row_orders(offsets: Tensor, chunks: Tensor, tokens: int, counts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """`Packing.slot_rows` and `Packing.sequence_rows` of each of these numbers of chunks, at most three.

    `offsets` and `chunks` are those of the packing, [J] int32.
    """
    rows = [slots * tokens for slots in counts]
    orders = offsets.new_empty(2 * sum(rows))
    sequences = len(offsets)
    _row_orders[(-(-max(rows) // _BLOCK), len(counts))](
        *(offsets, chunks, orders, sequences, sequences.bit_length(), tokens),
        *(*counts, 0, 0)[:_MOST_COUNTS],
        BLOCK=_BLOCK,
    )
    pieces = orders.split([n for n in rows for _ in range(2)])
    return list(zip(pieces[::2], pieces[1::2], strict=True))
