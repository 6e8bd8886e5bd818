"""Partial results of several tiles become one: log-sum-exp merge of outputs, sums of gradients.

With l_c the log-sum-exp of a row's scores in tile c and O_c its output there, the row over all tiles is

    L = log sum_c exp(l_c)        O = sum_c exp(l_c - L) O_c

(Milakov & Gimelshein, arXiv 1805.02867). A tile in which a row sees no key has l_c = -inf and contributes nothing.
Everything is accumulated in fp32 (fp64 for fp64 inputs) in the order of the arguments, and rounded once.

Legend: n tokens of a chunk, b batch, h heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-sum-exps, merges and sums: fp32 for anything narrower."""
    return torch.promote_types(dtype, torch.float32)


def merge_partials(outs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor) -> None:
    """Merge partial attention outputs.

    Args:
        outs: partial outputs [n, b, h, d].
        lses: their log-sum-exps [b, h, n], fp32 or fp64; -inf where a row saw no key (its output is then ignored).
        out: receives the merged output [n, b, h, d]; zero for a row that saw no key at all.
        lse: receives the merged log-sum-exp [b, h, n]; -inf for such a row.
    """
    stacked = torch.stack(list(lses))
    highest = stacked.amax(0)
    # A row without any key keeps -inf: subtracting it from itself would give NaN.
    reference = torch.where(highest == -torch.inf, torch.zeros_like(highest), highest)
    weights = torch.exp(stacked - reference)
    total = weights.sum(0)
    lse.copy_(reference + total.log())
    weights /= torch.where(total == 0, torch.ones_like(total), total)
    merged = torch.zeros_like(out, dtype=stacked.dtype)
    for weight, partial in zip(weights, outs, strict=True):
        column = weight.permute(2, 0, 1).unsqueeze(-1)
        # What a kernel leaves in the output of an empty row may be anything, NaN included: only weighted rows count.
        merged += torch.where(column > 0, partial * column, torch.zeros_like(column))
    out.copy_(merged)


def sum_partials(partials: Sequence[Tensor], total: Tensor) -> None:
    """Sum gradients [n, b, h, d] of one chunk into `total`, rounding once."""
    accumulator = partials[0].to(accumulation_dtype(partials[0].dtype), copy=True)
    for partial in partials[1:]:
        accumulator += partial
    total.copy_(accumulator)
