"""Sizes of blocks, how arguments are handed to the kernels, and the launch."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from megatron_attn2d.attention.dropout import BITS, KeepMask

# Rows and keys of a block, warps and pipeline stages by the widest head dim, for 16-bit inputs; the fastest measured on
# H100. Those of forward's blocks that need more shared memory than an A100 has give way to smaller ones there.
FORWARD = {64: (128, 64, 4, 3), 128: (128, 128, 8, 3), 256: (128, 64, 8, 2)}
FORWARD_AMPERE = {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 4, 1)}
BACKWARD_ROWS = {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 1)}
BACKWARD_KEYS = {64: (64, 64, 4, 3), 128: (64, 128, 8, 3), 256: (64, 64, 8, 1)}
AMPERE_SHARED_BYTES = 163 * 1024

_stages: dict[tuple[Any, ...], int] = {}
"""Pipeline stages of what did not fit with those of its table."""

type Table = dict[int, tuple[int, int, int, int]]


def tuned(q: Tensor, v: Tensor, table: Table) -> tuple[tuple[int, ...], dict[str, Any]]:
    """M, N, D and DV for these inputs, and how to launch."""
    columns = [max(16, triton.next_power_of_2(x.size(3))) for x in (q, v)]
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
) -> None:
    """Launches a kernel with the pipeline stages of its table, or as many as shared memory has room for.

    With dropout Triton before 3.6 takes up to 68 KiB more of it.

    Raises:
        OutOfResources: one stage does not fit either.
    """
    case = (kernel, blocks, q.dtype, q.device, arguments[-1] is None)  # dropout comes last
    for stages in range(_stages.get(case, how["num_stages"]), 0, -1):
        try:
            kernel[programs](*arguments, *blocks, precision(q), **how | {"num_stages": stages})
            return
        except OutOfResources:
            if stages == 1:
                raise
            _stages[case] = stages - 1


def precision(q: Tensor) -> str:
    """How products are formed: fp32 inputs without tensor cores."""
    return "ieee" if q.dtype == torch.float32 else "tf32"  # 16-bit inputs ignore it


def with_strides(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor [n, b, heads, d] as kernels take it."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x, x.stride()[:3]


def drop_arguments(dropout: KeepMask | None) -> tuple[Any, ...] | None:
    """Seed, sequences, heads, positions of rows and of keys with the strides of their batch, bound and factor."""
    if dropout is None:
        return None
    seed = torch.as_tensor(dropout.dropout.seed, device=dropout.rows.device).view(1)
    rows, keys = (x if x.stride(1) == 1 else x.contiguous() for x in (dropout.rows, dropout.keys))
    p = dropout.dropout.p
    return (
        seed,
        dropout.sequences,
        dropout.heads,
        rows,
        rows.stride(0),
        keys,
        keys.stride(0),
        round(p * (1 << BITS)),
        1 / (1 - p),
    )
