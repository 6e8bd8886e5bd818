"""Sizes of blocks, how arguments are handed to the kernels, and the launch."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from megatron_attn2d.attention.segments import Segments

# Rows and keys of a block, warps and pipeline stages by the widest head dim, for 16-bit inputs; the fastest measured on
# H100, for 128 on H200 (`benchmarks/tune_triton.py`). Where an A100 lacks the shared memory it has a table of its own.
FORWARD = {64: (128, 64, 4, 3), 128: (64, 64, 4, 3), 256: (128, 64, 8, 2)}
FORWARD_AMPERE = {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 4, 1)}
BACKWARD_ROWS = {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 1)}
BACKWARD_ROWS_DROPPED = BACKWARD_ROWS | {128: (64, 64, 4, 2)}
BACKWARD_KEYS = {64: (64, 64, 4, 3), 128: (64, 128, 8, 3), 256: (64, 64, 8, 1)}
AMPERE_SHARED_BYTES = 163 * 1024

_stages: dict[tuple[Any, ...], int] = {}
"""Pipeline stages of kernels that did not fit with the number in their table."""

type Table = dict[int, tuple[int, int, int, int]]


def tuned(q: Tensor, v: Tensor, table: Table) -> tuple[tuple[int, ...], dict[str, Any]]:
    """M, N, D and DV for these inputs, and how to launch."""
    columns = [max(16, 1 << (x.size(3) - 1).bit_length()) for x in (q, v)]
    rows, keys, warps, stages = table[max(64, *columns)]
    if q.dtype == torch.float32:  # twice the bytes, and no tensor cores
        rows, keys, stages = max(16, rows // 4), max(16, keys // 2), 1
    return (rows, keys, *columns), {"num_warps": warps, "num_stages": stages}


def forward_table(q: Tensor) -> Table:
    """Forward's table for the device of q."""
    if not q.is_cuda:  # the interpreter
        return FORWARD
    return FORWARD if shared_bytes(q.device) > AMPERE_SHARED_BYTES else FORWARD_AMPERE


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def run(
    kernel: Any,
    programs: tuple[int, int],
    arguments: tuple[Any, ...],
    blocks: tuple[int, ...],
    how: dict[str, Any],
    q: Tensor,
    dropout: bool,
) -> None:
    """Launch a kernel with the pipeline stages of its table, or as many as fit into shared memory.

    With dropout Triton before 3.6 takes up to 68 KiB more shared memory.

    Raises:
        OutOfResources: one stage does not fit either.
    """
    if programs[0] == 0:
        return
    case = (kernel, blocks, q.dtype, q.device, dropout)
    for stages in range(_stages.get(case, how["num_stages"]), 0, -1):
        try:
            kernel[programs](*arguments, *blocks, precision(q), **how | {"num_stages": stages})
            return
        except OutOfResources:
            if stages == 1:
                raise
            _stages[case] = stages - 1


def precision(q: Tensor) -> str:
    """The precision of products: fp32 inputs are multiplied without tensor cores."""
    return "ieee" if q.dtype == torch.float32 else "tf32"  # 16-bit inputs ignore it


def with_strides(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor [n, b, heads, d] as kernels take it."""
    assert x.stride(-1) == 1, "the last dim is contiguous"
    return x, x.stride()[:3]


def blocks_of_rows(table: Segments | None, rows: int, step: int) -> tuple[int, tuple[Any, ...] | None]:
    """See `_blocks_of`: blocks of query rows."""
    if table is None:
        return -(-rows // step), None
    return _blocks_of(table, table.q_lengths, table.most_q, rows, step)


def blocks_of_keys(table: Segments | None, keys: int, step: int) -> tuple[int, tuple[Any, ...] | None]:
    """See `_blocks_of`: blocks of keys."""
    if table is None:
        return -(-keys // step), None
    return _blocks_of(table, table.k_lengths, table.most_k, keys, step)


def _blocks_of(table: Segments, lengths: Tensor, most: int, rows: int, step: int) -> tuple[int, tuple[Any, ...]]:
    """An upper bound of the number of blocks of `step` rows, and the table as kernels take it.

    A kernel finds its segment among the running totals of blocks. Their number is known on the device alone.
    """
    count = lengths.size(0)
    ends = ((lengths + (step - 1)) // step).cumsum(0, dtype=torch.int32)
    programs = min(rows // step + count, count * -(-most // step))
    return programs, (ends, count, table.q_starts, table.q_lengths, table.k_starts, table.k_lengths)
