"""Orders of the rows of packed sequences, made on the device in one launch."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


@triton.jit(do_not_specialize=["sequences", "steps", "tokens", "slots"])  # other numbers in every step
def _row_orders(offsets, chunks, slot_rows, sequence_rows, sequences, steps, tokens, slots, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # by sequence
    inside = row < slots * tokens
    sequence = tl.zeros((BLOCK,), tl.int32)
    for i in range(steps):  # the last sequence that does not start behind the row: empty ones come before it
        later = sequence + (1 << (steps - 1 - i))
        start = tl.load(offsets + later, later < sequences, other=tokens)
        sequence = tl.where(slots * start <= row, later, sequence)
    offset, chunk = tl.load(offsets + sequence), tl.load(chunks + sequence)
    within = row - slots * offset
    there = (within // chunk) * tokens + offset + within % chunk
    tl.store(sequence_rows + row, there, inside)
    tl.store(slot_rows + there, row, inside & (there >= 0) & (there < slots * tokens))


def row_orders(offsets: Tensor, chunks: Tensor, tokens: int, slots: int) -> tuple[Tensor, Tensor]:
    """`Packing.slot_rows` and `Packing.sequence_rows` of `slots` chunks, from `offsets` and `chunks` [J] int32."""
    rows = slots * tokens
    slot_rows, sequence_rows = offsets.new_empty((2, rows)).unbind()
    sequences = len(offsets)
    _row_orders[(-(-rows // _BLOCK),)](
        offsets,
        chunks,
        slot_rows,
        sequence_rows,
        sequences,
        sequences.bit_length(),
        tokens,
        slots,
        BLOCK=_BLOCK,
    )
    return slot_rows, sequence_rows
