"""ATTENTION2D: exact attention over a sequence that is spread on an R x C grid of ranks (Elango, arXiv 2503.15758).

    forward                                          backward
    1 gather Q in the row, K and V in the column     1 gather Q, dO, LSE, delta in the row, K and V in the column
    2 attend the tile                                2 differentiate the tile
    3 return partial O, LSE in the row               3 return partial dQ in the row, dK and dV in the column
    4 merge by log-sum-exp                           4 sum

With x query heads per key head, a rank receives 2(C-1) + 2(R-1)/x shards of Q's size forward and 3(C-1) + 4(R-1)/x
backward, where a ring moves 2(P-1)/x and 4(P-1)/x. delta = rowsum(dO * O), a number per row, is gathered instead of O.

How messages and kernels are ordered so that they hide each other: `passes`.

Legend: s tokens of the whole sequence, cp ranks, n = s / (2 cp) tokens of a chunk, b batch, h query heads, g key heads,
d head dim, dv the values' head dim.
"""

from __future__ import annotations

from math import gcd, sqrt
from typing import Any

import torch
from torch import Tensor

from megatron_attn2d.attention.agreement import check_agreement, facts_of
from megatron_attn2d.attention.checks import check_first_derivative, check_sink, packed, request_of, sequences_of
from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.exchange import axes
from megatron_attn2d.attention.grid import Grid
from megatron_attn2d.attention.kernels import Kernel, choose_kernel
from megatron_attn2d.attention.layout import Band
from megatron_attn2d.attention.local import Whole, local_attention
from megatron_attn2d.attention.merge import apply_sink
from megatron_attn2d.attention.packing import Packing, Totals
from megatron_attn2d.attention.passes import Plan, backward, forward
from megatron_attn2d.attention.saved import without_neighbours
from megatron_attn2d.attention.tile import Scores, Tile
from megatron_attn2d.attention.ulysses import check_heads, collect_heads, spread_heads


@torch.compiler.disable  # the messages cut it into pieces anyway; and buffers are merged in place
def attention2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    sink: Tensor | None = None,
    dropout: Dropout | None = None,
    cu_seqlens: Totals | None = None,
    cu_seqlens_padded: Totals | None = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    head_groups: int = 1,
    label: str = "attention2d",
) -> Tensor:
    """Attention of the whole sequence, from and to shards in the zigzag layout.

    Args:
        q: [s/cp, b, h, d], bf16, fp16, fp32 or fp64, as the kernel allows: this rank's lower chunk, then its upper
            chunk (see `layout`).
        k: [s/cp, b, g, d], h a multiple of g; without mask and window s may be another than that of q.
        v: [s/cp, b, g, dv].
        grid: the ranks' grid; each rank passes its own view.
        causal: causal mask over the whole sequence, or none.
        window: how many tokens before and after it a token sees, -1 or None for all; under `causal` none after it.
        sink: [h], for each of this rank's heads the score of one more key, of value 0, that every row sees.
        dropout: of probabilities, the same in every layout of ranks (`attention.dropout.Dropout`).
        cu_seqlens: running totals [0, s1, s1 + s2, ...] of the lengths of packed sequences. q, k and v are then
            [t/cp, heads, d], by sequence: both chunks of the first, of the second, ... (see `packing`). A tensor on a
            GPU is not read: its numbers are not checked, and chunks that hold nothing but padding travel too. Pass a
            new tensor for each batch, or change it by operations of torch: a broadcast into one that an earlier call
            has had goes unnoticed.
        cu_seqlens_padded: the same with padding, where sequences are padded to multiples of 2 * cp.
        max_seqlen: tokens of the longest of them with its padding, or more; for totals on a GPU.
        softmax_scale: factor on the scores; 1/sqrt(d) by default.
        backend: attention kernel, see `choose_kernel`.
        head_groups: in how many groups of heads communication and kernels overlap; must divide g. Where a grid
            spreads heads, as many of them as divide what a rank is left with. Each group starts kernels and messages of
            its own, which costs more than it hides over NVLink; over slow links a planner knows better (`planner`).
        label: names the call, a layer say, in errors.

    Returns:
        [s/cp, b, h, dv], like q; [t/cp, h, dv] if packed, 0 where padding is.

    Raises:
        ValueError: for shapes, dtypes or devices that don't fit each other, or a backend that can't serve them; in the
            first call on a grid also on every rank, if ranks pass what differs.
        ExchangeError: on CPU ranks, when a peer hangs beyond its group's timeout or is gone.
        RuntimeError: in the backward pass, when second derivatives are asked for.
    """
    if not isinstance(grid, Grid):
        raise ValueError(f"grid is a {type(grid).__name__}, no Grid: Grid.from_group(group, rows=R, cols=C) makes one")
    packing = packed(cu_seqlens, cu_seqlens_padded, max_seqlen, (q, k, v), grid.size)
    if packing is not None:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    dropout = Dropout.of_call(dropout)
    sequences, band, kernel = _planned(q, k, v, grid, causal, window, dropout, backend, packing)
    if head_groups < 1 or k.size(2) % head_groups:
        raise ValueError(f"head_groups={head_groups} does not divide the {k.size(2)} key/value heads of this rank")
    check_heads(q.size(2), k.size(2), grid.heads)
    check_sink(sink, q)
    scale = 1.0 / sqrt(q.size(3)) if softmax_scale is None else softmax_scale
    facts = facts_of(q, k, v, sequences, band, scale, sink, dropout, head_groups)
    check_agreement((grid.head_group, grid.kv_group, grid.q_group), facts, q.device, label)
    if grid.heads > 1:
        q, k, v = spread_heads(q, k, v, grid, label, packing)
        first = grid.head_rank * q.size(2)
        sink = None if sink is None else sink[first : first + q.size(2)]
        dropout = None if dropout is None else dropout.starting(first)
    q, k, v = without_neighbours(q, k, v)
    scores = Scores(kernel, scale, dropout)
    if sequences.ranks == 1:
        out = local_attention(q, k, v, sink, Whole(sequences, band, scores))
    else:
        groups = gcd(head_groups, k.size(2))  # fewer where the head axis leaves a rank fewer heads
        plan, row, column = axes(grid, sequences.mask(band), label)
        tile = Tile(plan, sequences, band, grid.rank)
        out = _Attention2D.apply(q, k, v, sink, Plan(tile, row, column, scores, groups))
    if grid.heads > 1:
        out = collect_heads(out, grid, label, packing)
    return out if packing is None else out.squeeze(1)


def _planned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    dropout: Dropout | None,
    backend: str,
    packing: Packing | None,
) -> tuple[Packing, Band, Kernel]:
    """Sequences, who sees whom, and the kernel of a call; checked and worked out once for all calls of its kind."""

    def work_out() -> tuple[Packing, Band, Kernel]:
        sequences, band = sequences_of(q, k, v, causal, window, grid.rows * grid.cols, grid.heads, packing)
        return sequences, band, choose_kernel(backend, request_of(q, v, sequences, band, dropout))

    if packing is not None or not (window is None or isinstance(window, tuple)):
        return work_out()
    tensors = [(type(x), x.shape, x.dtype, x.device) for x in (q, k, v)]
    deterministic = torch.are_deterministic_algorithms_enabled()
    kind = (*tensors, causal, window, dropout is None, backend, deterministic)
    found: tuple[Packing, Band, Kernel] | None = grid.calls.get(kind)
    if found is None:
        if len(grid.calls) >= _MOST_KINDS:  # tests and evaluations may go through many lengths
            grid.calls.clear()
        found = grid.calls[kind] = work_out()
    return found


_MOST_KINDS = 64


class _Attention2D(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, plan: Plan) -> Tensor:
        out, lse = forward(q, k, v, plan)
        if sink is not None:
            apply_sink(out, lse, sink)
        ctx.save_for_backward(q, k, v, out, lse, sink)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        q, k, v, out, lse, sink = ctx.saved_tensors
        return (*backward(grads[0], q, k, v, out, lse, sink, ctx.plan), None)
