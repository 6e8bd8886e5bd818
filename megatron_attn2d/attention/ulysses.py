"""Sequence for heads: the third axis of the grid (DeepSpeed-Ulysses, arXiv 2309.14509) in the zigzag layout.

The U ranks of a Ulysses group hold neighbouring zigzag shards. After the exchange each rank holds all of their tokens
for 1/U of the heads, as one zigzag shard of the R x C grid: lower chunks by ascending rank, then upper chunks by
descending rank, are in the order of the sequence.

    rank 0: lower 0, upper 7      U = 2      rank 0: lower 0, lower 1, upper 6, upper 7   first half of the heads
    rank 1: lower 1, upper 6     ------>     rank 1: lower 0, lower 1, upper 6, upper 7   second half

Each rank receives (U-1)/U of its shard's size per tensor, which hardly grows with U.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_attn2d.attention.checks import check_first_derivative
from megatron_attn2d.attention.grid import Grid
from megatron_attn2d.attention.messages import Lists, launch, nothing
from megatron_attn2d.attention.packing import Packing


def spread_heads(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, label: str, packing: Packing | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Shards [s/cp, b, heads, d] -> [U * s/cp, b, heads/U, d], zigzag shards of the R x C grid.

    Where sequences are packed, the rows of both are by sequence.

    Where there are fewer key/value heads than U, they are repeated, so that each rank has those of its query heads.
    Autograd sums their gradients.
    """
    repeats = grid.ulysses_size // min(k.size(2), grid.ulysses_size)
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    spread: tuple[Tensor, Tensor, Tensor] = _SpreadHeads.apply((grid, label, packing), q, k, v)
    return spread


def collect_heads(out: Tensor, grid: Grid, label: str, packing: Packing | None = None) -> Tensor:
    """The way back: [U * s/cp, b, heads/U, d] -> [s/cp, b, heads, d]."""
    (collected,) = _CollectHeads.apply((grid, label, packing), out)
    return collected


type _Call = tuple[Grid, str, Packing | None]


class _SpreadHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        return tuple(_to_heads(shards, *call))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        return (None, *_to_sequence(grads, *ctx.call))


class _CollectHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        return tuple(_to_sequence(shards, *call))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        return (None, *_to_heads(grads, *ctx.call))


def _to_heads(shards: Sequence[Tensor], grid: Grid, label: str, packing: Packing | None) -> list[Tensor]:
    # [2n, b, heads, d] -> per rank of the group the contiguous [2, n, b, heads/U, d] that it receives
    if packing is None or packing.one:
        parts = [torch.stack(x.unflatten(0, (2, -1)).chunk(grid.ulysses_size, dim=3)) for x in shards]
    else:
        packing.order_rows(2, 2 * grid.ulysses_size)
        shape = grid.ulysses_size, 2, packing.tokens, 1
        rows = packing.spread_rows(grid.ulysses_size)
        parts = [_parts_of_rows(x, grid.ulysses_size).index_select(0, rows).view(*shape, -1, x.size(3)) for x in shards]
    results = [part.new_empty((2, grid.ulysses_size, *part.shape[2:])) for part in parts]
    _exchange([_by_half(part) for part in parts], [_in_sequence(result) for result in results], grid, label)
    if packing is not None:
        return [packing.by_sequence(result.flatten(0, 1)) for result in results]
    return [result.flatten(0, 2) for result in results]


def _to_sequence(shards: Sequence[Tensor], grid: Grid, label: str, packing: Packing | None) -> list[Tensor]:
    if packing is not None:
        shards = [packing.by_slot(x, 2 * grid.ulysses_size).flatten(0, 1) for x in shards]
    wide = [x.contiguous().unflatten(0, (2, grid.ulysses_size, -1)) for x in shards]
    results = [x.new_empty((grid.ulysses_size, 2, *x.shape[2:])) for x in wide]
    _exchange([_in_sequence(x) for x in wide], [_by_half(result) for result in results], grid, label)
    # [U, 2, n, b, heads/U, d] -> [2n, b, heads, d]
    if packing is not None and not packing.one:
        rows = packing.collected_rows(grid.ulysses_size)
        return [
            x.flatten(0, 3).flatten(1).index_select(0, rows).view(2 * packing.tokens, 1, -1, x.size(5)) for x in results
        ]
    return [result.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(0, 1) for result in results]


def _parts_of_rows(x: Tensor, parts: int) -> Tensor:
    """[t, 1, heads, d] -> [t * parts, heads/parts * d]."""
    return x.reshape(x.size(0) * parts, -1)


type _Chunks = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Lower chunks by rank of the group, and upper ones."""


def _by_half(parts: Tensor) -> _Chunks:
    """Chunks of [U, 2, n, ...]."""
    chunks = parts.flatten(0, 1).unbind()
    return chunks[0::2], chunks[1::2]


def _in_sequence(wide: Tensor) -> _Chunks:
    """Chunks of [2, U, n, ...], whose tokens are in the order of the sequence."""
    chunks = wide.flatten(0, 1).unbind()
    parts = wide.size(1)
    return chunks[:parts], chunks[: parts - 1 : -1]


def _exchange(outgoing: Sequence[_Chunks], incoming: Sequence[_Chunks], grid: Grid, label: str) -> None:
    """Exchange the chunks of each tensor: send the outgoing ones, receive into the incoming ones."""
    assert grid.ulysses_group is not None
    me = grid.ulysses_group.rank()
    what = f"{label}, Ulysses group of ranks {list(grid.ulysses_peers)}: exchanging sequence for heads or back"
    both = [each for pair in zip(outgoing, incoming, strict=True) for each in zip(*pair, strict=True)]
    rounds: list[Lists] = [(_without(sends, me), _without(receives, me)) for sends, receives in both]
    pending = launch(grid.ulysses_group, rounds, 0, what)
    torch._foreach_copy_([receives[me] for _, receives in both], [sends[me] for sends, _ in both])
    pending.wait()


def _without(tensors: Sequence[Tensor], rank: int) -> list[Tensor]:
    return [*tensors[:rank], nothing(tensors[0]), *tensors[rank + 1 :]]
