"""Dropout by position: the words of rows and keys, made once per call, and the decision on each pair of them.

The arithmetic is that of `dropout`, bit for bit.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from megatron_attn2d.attention.dropout import KeepMask

_BLOCK = 256


@triton.jit
def _mixed(state, number):
    """`dropout._mixed`, on unsigned numbers."""
    x = state + (number.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _words(seed, sequences, heads, rows, keys, multipliers, offsets, key_words, count, sq, sk, BLOCK: tl.constexpr):
    """One block of rows of one head or, as the head after the last, of keys."""
    batch, head = tl.program_id(1) // (count + 1), tl.program_id(1) % (count + 1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    state = _mixed(tl.load(seed).to(tl.uint64), tl.load(sequences + batch))
    if head < count:
        state = _mixed(state, tl.load(heads + head))
        states = _mixed(state, tl.load(rows[0] + batch * rows[1] + i, i < sq, other=0))
        at = (batch * count + head).to(tl.int64) * sq + i
        tl.store(multipliers + at, (states | 1).to(tl.int32), i < sq)
        tl.store(offsets + at, (states >> 32).to(tl.int32), i < sq)
    else:
        state = _mixed(state, tl.full((), -1, tl.int64))
        x = tl.load(keys[0] + batch * keys[1] + i, i < sk, other=0).to(tl.uint32) ^ state.to(tl.uint32)
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        tl.store(key_words + batch.to(tl.int64) * sk + i, (x ^ (x >> 16)).to(tl.int32), i < sk)


@triton.jit
def kept(multipliers, offsets, key_words, bound):
    """Whether a probability is kept; words of rows and of keys broadcast."""
    x = key_words * multipliers + offsets
    high = (x.to(tl.uint32, bitcast=True) >> 16).to(tl.int32, bitcast=True)
    return (x ^ high) * multipliers >= bound


def drop_arguments(dropout: KeepMask | None) -> tuple[Any, ...] | None:
    """Multipliers and offsets of rows [b, h, sq], words of keys [b, sk], sq, sk, bound and 1 / (1 - p)."""
    if dropout is None:
        return None
    (batch, sq), sk, heads = dropout.rows.shape, dropout.keys.size(1), dropout.heads.size(0)
    device = dropout.rows.device
    seed = torch.as_tensor(dropout.dropout.seed, device=device).view(1)
    multipliers, offsets = torch.empty((2, batch, heads, sq), dtype=torch.int32, device=device)
    key_words = torch.empty((batch, sk), dtype=torch.int32, device=device)
    rows, keys = (
        (x, x.stride(0)) for x in (x if x.stride(1) == 1 else x.contiguous() for x in (dropout.rows, dropout.keys))
    )
    _words[-(-max(sq, sk) // _BLOCK), batch * (heads + 1)](
        seed, dropout.sequences, dropout.heads, rows, keys, multipliers, offsets, key_words, heads, sq, sk, _BLOCK
    )
    return multipliers, offsets, key_words, sq, sk, dropout.bound, 1 / (1 - dropout.dropout.p)
