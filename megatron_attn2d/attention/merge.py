"""Partial results of several tiles become one: log-sum-exp merge of outputs, sums of gradients, and delta.

With l_c the log-sum-exp of a row's scores in tile c and O_c its output there, the row over all tiles is

    L = log sum_c exp(l_c)        O = sum_c exp(l_c - L) O_c

(Milakov & Gimelshein, arXiv 1805.02867). A tile in which a row sees no key has l_c = -inf and contributes nothing.
Everything is accumulated in fp32 (fp64 for fp64 inputs) in the order of the arguments, and rounded once.

The functions here are plain torch, for any device and dtype. On GPUs each of them runs one Triton kernel instead.

Legend: n tokens of a chunk, b batch, h heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-sum-exps, merges and sums: fp32 for anything narrower."""
    return torch.promote_types(dtype, torch.float32)


def merge_partials(
    outs: Sequence[Sequence[Tensor]], lses: Sequence[Sequence[Tensor]], out: Sequence[Tensor], lse: Sequence[Tensor]
) -> None:
    """Merge the partial attention outputs of chunks.

    Args:
        outs: for each chunk its partial outputs, [n, b, h, d] or stacks of such, [ranks, n, b, h, d].
        lses: their log-sum-exps, [b, h, n] or stacks, fp32 or fp64; -inf where a row saw no key (its output is then
            ignored).
        out: receives each chunk's merged output [n, b, h, d]; zero for a row that saw no key at all.
        lse: receives the merged log-sum-exp [b, h, n]; -inf for such a row.
    """
    if on_gpu(out[0]):
        from megatron_attn2d.attention.kernels.triton import merges

        return merges.merge_partials(outs, lses, out, lse)
    for chunk in zip(outs, lses, out, lse, strict=True):
        _merge_chunk(*chunk)


def _merge_chunk(outs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor) -> None:
    outs = _each(outs, out.dim())
    stacked = torch.stack(_each(lses, lse.dim()))
    highest = stacked.amax(0)
    # A row without any key keeps -inf: subtracting it from itself would give NaN.
    reference = torch.where(highest == -torch.inf, torch.zeros_like(highest), highest)
    weights = torch.exp(stacked - reference)
    total = weights.sum(0)
    lse.copy_(reference + total.log())
    weights /= torch.where(total == 0, torch.ones_like(total), total)
    merged = torch.zeros_like(out, dtype=stacked.dtype)
    for weight, partial, empty in zip(weights, outs, stacked == -torch.inf, strict=True):
        column, unseen = (x.permute(2, 0, 1).unsqueeze(-1) for x in (weight, empty))
        # A kernel may leave anything in the output of an empty row, NaN included: it does not count. NaN in a row that
        # saw keys does count, even where the row's weight underflows to 0: it must not be lost here.
        merged += torch.where(unseen, torch.zeros_like(column), partial * column)
    out.copy_(merged)


def sum_partials(partials: Sequence[Sequence[Tensor]], totals: Sequence[Tensor]) -> None:
    """Sum the partial gradients of each chunk into its total [n, b, h, d], rounding once.

    Partial gradients have the shape of the total or are stacks [ranks, n, b, h, d]. All totals have one shape and
    stride.
    """
    if on_gpu(totals[0]):
        from megatron_attn2d.attention.kernels.triton import merges

        return merges.sum_partials(partials, totals)
    for chunk, total in zip(partials, totals, strict=True):
        first, *others = _each(chunk, total.dim())
        accumulator = first.to(accumulation_dtype(first.dtype), copy=True)
        for part in others:
            accumulator += part
        total.copy_(accumulator)


def _each(partials: Sequence[Tensor], dims: int) -> list[Tensor]:
    """Partial results of so many dims; those of a stack one by one."""
    return [each for x in partials for each in (x.unbind() if x.dim() > dims else (x,))]


def row_statistics(dout: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """What the backward pass needs of each row: its log-sum-exp and delta = rowsum(dout * out).

    Args:
        dout, out: [2, n, b, h, d].
        lse: [2, b, h, n].

    Returns:
        [2, 2, b, h, n]: by half, log-sum-exp then delta.
    """
    if on_gpu(out):
        from megatron_attn2d.attention.kernels.triton import merges

        return merges.row_statistics(dout, out, lse)
    delta = (dout.to(lse.dtype) * out).sum(-1).permute(0, 2, 3, 1)
    return torch.stack((lse, delta), 1)


def apply_sink(out: Tensor, lse: Tensor, sink: Tensor) -> None:
    """Let every row see one more key, of score `sink` [h] and value 0; changes `out` and `lse`.

    Args:
        out: output over the keys, [tokens, b, h, d].
        lse: its log-sum-exp, [b, h, tokens] or, by half of the tokens, [2, b, h, n].
    """
    with_sink = torch.logaddexp(lse, sink.to(lse.dtype).unsqueeze(-1))
    share = _ratio(lse, with_sink)
    share = share.permute(2, 0, 1) if lse.dim() == 3 else share.permute(0, 3, 1, 2).flatten(0, 1)
    out.copy_(out * share.unsqueeze(-1))
    lse.copy_(with_sink)


def sink_gradient(lse: Tensor, delta: Tensor, sink: Tensor) -> Tensor:
    """Gradient of the sinks [h]: their probability times -delta, over all rows; lse and delta [..., h, n]."""
    gradient = (_ratio(sink.to(lse.dtype).unsqueeze(-1), lse) * delta).sum(-1).flatten(0, -2).sum(0)
    return gradient.neg_().to(sink.dtype)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """exp(part - whole); 0 where the whole is -inf: in a row of padding whose sink is -inf."""
    return torch.exp(part - torch.where(whole == -torch.inf, torch.zeros_like(whole), whole))


def surrogate_out(dout: Tensor, delta: Tensor) -> Tensor:
    """An output for kernels that derive delta from it: O' = dO delta / |dO|^2, so that rowsum(dO * O') = delta.

    Delta is all that a backward kernel takes from the output, and gathering delta moves 1/d of the bytes. |O'| is at
    most |O| (Cauchy-Schwarz), so it fits the dtype. Rows with dO = 0 have delta = 0 and get 0.

    Args:
        dout: [slots, n, b, h, d].
        delta: [slots, b, h, n].
    """
    if on_gpu(dout):
        from megatron_attn2d.attention.kernels.triton import merges

        return merges.surrogate_out(dout, delta)
    wide = dout.to(delta.dtype)
    norm = wide.square().sum(-1)
    ratio = torch.where(norm == 0, torch.zeros_like(norm), delta.permute(0, 3, 1, 2) / norm)
    return (wide * ratio.unsqueeze(-1)).to(dout.dtype)


def on_gpu(x: Tensor) -> bool:
    """Whether Triton's kernels serve the tensor."""
    # They accumulate in fp32: float64, which only tests use, stays with torch.
    return x.is_cuda and x.dtype != torch.float64 and _have_triton()


@cache
def _have_triton() -> bool:
    return find_spec("triton") is not None
