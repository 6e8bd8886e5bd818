"""The zigzag layout from a caller's side: a rank's shard of a tensor, the whole tensor again, positions of its tokens.

    from megatron_attn2d import Grid, attention2d, zigzag

    q, k, v = (zigzag.shard(x, grid) for x in (q, k, v))              # [s, b, heads, d] -> [s/cp, b, heads, d]
    out = zigzag.unshard(attention2d(q, k, v, grid), grid)            # [s, b, heads, d], on every rank
    angles = zigzag.positions(s, grid)[:, None] * frequencies         # what rotary positions start from

The sequence is cut into 2P chunks; rank i of P holds chunk i and chunk 2P-1-i, in this order (picture: `layout`).
Each of several packed sequences is cut this way, and a rank holds both chunks of the first, both of the second, ... A
plain slice `x.chunk(P)[rank]` is another layout: attention would mask the wrong keys without an error.

`place` is the ranks' Grid, or the process group of `ring_attention`.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.attention.grid import Grid
from megatron_attn2d.attention.packing import Packing, Totals

Place = Grid | dist.ProcessGroup


def indices(tokens: int, place: Place, *, cu_seqlens: Totals | None = None) -> Tensor:
    """The indices of the tokens that this rank holds, in the order of its shard: [tokens / cp], int64, on the CPU.

    Args:
        tokens: of the whole sequence, or of the whole pack.
        place: the ranks' Grid, or their process group.
        cu_seqlens: running totals [0, s1, s1 + s2, ...] of packed sequences: the padded ones, where there is padding. A
            tensor on a GPU is read, and waited for.

    Raises:
        ValueError: a sequence can't be cut into 2 * cp chunks.
    """
    rank, ranks = _rank(place)
    return torch.cat([start + _own(length, rank, ranks) for start, length in _sequences(tokens, ranks, cu_seqlens)])


def positions(tokens: int, place: Place, *, cu_seqlens: Totals | None = None) -> Tensor:
    """The positions in their own sequence of the tokens that this rank holds: [tokens / cp], int64, on the CPU.

    Without `cu_seqlens` they are `indices`; arguments and errors are those of `indices`.
    """
    rank, ranks = _rank(place)
    return torch.cat([_own(length, rank, ranks) for _, length in _sequences(tokens, ranks, cu_seqlens)])


def shard(x: Tensor, place: Place, *, dim: int = 0, cu_seqlens: Totals | None = None) -> Tensor:
    """This rank's part of `x`, whose dim `dim` runs over all tokens; [s, b, ...] -> [s/cp, b, ...].

    It copies, and gradients flow back to `x`. Other arguments and errors are those of `indices`.
    """
    return x.index_select(dim, indices(x.size(dim), place, cu_seqlens=cu_seqlens).to(x.device))


@torch.no_grad()
def unshard(x: Tensor, place: Place, *, dim: int = 0, cu_seqlens: Totals | None = None) -> Tensor:
    """The whole tensor of all ranks' shards `x`, on every rank; [s/cp, b, ...] -> [s, b, ...].

    Every rank must call it, with shards of one shape and dtype. No gradient flows through it: it is meant for looking
    at results. Other arguments and errors are those of `indices`.
    """
    _, ranks = _rank(place)
    sequences = _sequences(x.size(dim) * ranks, ranks, cu_seqlens)
    whole = x.new_empty([*x.shape[:dim], x.size(dim) * ranks, *x.shape[dim:][1:]])
    for rank, part in enumerate(_all_shards(x.contiguous(), place)):
        held = torch.cat([start + _own(length, rank, ranks) for start, length in sequences])
        whole.index_copy_(dim, held.to(x.device), part)
    return whole


def _rank(place: Place) -> tuple[int, int]:
    """The calling process's context-parallel rank, and how many there are."""
    return (place.context_rank, place.size) if isinstance(place, Grid) else (place.rank(), place.size())


def _sequences(tokens: int, ranks: int, cu_seqlens: Totals | None) -> list[tuple[int, int]]:
    """Start and length of each sequence; tokens after the last of a pack are one more."""
    if cu_seqlens is None:
        chunks = 2 * ranks
        if tokens < 1 or tokens % chunks:
            fits = " or ".join(str(n) for n in (tokens // chunks * chunks, tokens // chunks * chunks + chunks) if n)
            raise ValueError(f"{tokens} tokens can't be cut into 2 * cp = {chunks} chunks: choose {fits}")
        return [(0, tokens)]
    totals = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    lengths = Packing.of(totals, None, tokens, ranks, torch.device("cpu")).padded_lengths
    return list(zip(accumulate(lengths, initial=0), lengths, strict=False))


def _own(tokens: int, rank: int, ranks: int) -> Tensor:
    """Positions in a sequence of `tokens` of what `rank` holds."""
    chunk = tokens // (2 * ranks)
    lower, upper = rank * chunk, (2 * ranks - 1 - rank) * chunk
    return torch.cat([torch.arange(start, start + chunk) for start in (lower, upper)])


def _all_shards(x: Tensor, place: Place) -> list[Tensor]:
    """`x` of all ranks, by context-parallel rank."""
    if not isinstance(place, Grid):
        return _gathered(x, place)
    lines = [x]  # of the ranks between whom heads are spread, then of the column's, then of the row's
    for group, peers in (
        (place.ulysses_group, place.ulysses_peers),
        (place.kv_group, place.kv_peers),
        (place.q_group, place.q_peers),
    ):
        if group is not None:
            members = dist.get_process_group_ranks(group)
            held = _gathered(torch.stack(lines), group)
            lines = [part for peer in peers for part in held[members.index(peer)]]
    ranks = [place.ranks[row][column] for column in range(place.cols) for row in range(place.rows)]
    order = [rank * place.ulysses_size + head for rank in ranks for head in range(place.ulysses_size)]
    return [part for _, part in sorted(zip(order, lines, strict=True), key=lambda pair: pair[0])]


def _gathered(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x, group=group)
    return parts
