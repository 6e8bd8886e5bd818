"""New tokens of a batch of sequences pass the layers: their keys and values are kept, their queries attend the cache.

    Fill, the first tokens    attention2d on the run's grid, each sequence in its zigzag; every rank keeps its own keys
    Fill, further tokens      queries of the chunk are gathered by all ranks; each attends its shard, returns the
                              partial results to the queries' owners, and they merge them: attention2d with one row
    Decode, one token each    every rank has all queries, attends its shard, and merges the partial results of all

Legend: B sequences, P context ranks, t tokens that this rank computes in a pass, h query heads, g key heads, d head
dim, dv the values' head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.attention.kernels import Kernel, choose_kernel
from megatron_attn2d.attention.kernels.base import Request
from megatron_attn2d.attention.layout import FULL
from megatron_attn2d.attention.merge import accumulation_dtype
from megatron_attn2d.inference import partial
from megatron_attn2d.inference.cache import Cache, Place
from megatron_attn2d.inference.shards import Piece
from megatron_attn2d.megatron.core_attention import ContextParallelAttention

_EXPANDED = 8192
"""Keys of latent attention that are made for all heads at once."""


class Fill:
    """A pass over a chunk of known tokens: this rank computes its two parts of each piece.

    Attributes:
        positions: of this rank's tokens in their sequences, padding included, [t] int64.
    """

    def __init__(self, cache: Cache, chunk: Sequence[Piece]) -> None:
        """The cache must have room for the pieces of `chunk`."""
        needed = max(cache.filled[p.sequence][rank] + p.kept(rank) for p in chunk for rank in range(cache.ranks))
        assert needed <= cache.capacity, f"room for {needed} tokens of a sequence, there is {cache.capacity}"
        self.cache, self.chunk = cache, chunk
        device = cache.positions.device
        # Padding takes the place of the last token: it must be one that the model has positions for.
        held = [piece.start + min(row, piece.length - 1) for piece in chunk for row in piece.rows(cache.rank)]
        self.positions = torch.tensor(held, device=device)
        self._orders: dict[int, tuple[Tensor, Tensor]] = {}
        offset = 0
        for piece in chunk:
            for row, place in self._kept(piece, offset):
                cache.positions[piece.sequence, place] = self.positions[row]
            offset += 2 * piece.part

    def _kept(self, piece: Piece, offset: int) -> list[tuple[slice, slice]]:
        """Which rows of the pass go to which places of the cache, a run of tokens after the other."""
        place, runs = self.cache.filled[piece.sequence][self.cache.rank], []
        for half, (_, number) in enumerate(piece.spans(self.cache.rank)):
            begin = offset + half * piece.part
            runs.append((slice(begin, begin + number), slice(place, place + number)))
            place += number
        return runs

    def attend(self, layer: ContextParallelAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Pass`."""
        at: list[Place] = []
        offset = 0
        for piece in self.chunk:
            at += [(rows, piece.sequence, places) for rows, places in self._kept(piece, offset)]
            offset += 2 * piece.part
        self.cache.keep(layer, k, v, at)
        if any(self.cache.lengths[piece.sequence] for piece in self.chunk):
            return self._attend_cached(layer, q)
        return layer.attend(q, k, v, causal=True, **self._totals()).unflatten(-1, (q.size(1), -1))

    def _totals(self) -> dict[str, list[int]]:
        real, padded = [0], [0]
        for piece in self.chunk:
            real.append(real[-1] + piece.length)
            padded.append(padded[-1] + piece.padded)
        return {"cu_seqlens": real, "cu_seqlens_padded": padded}

    def _attend_cached(self, layer: ContextParallelAttention, q: Tensor) -> Tensor:
        """All queries to this rank's shard, and the results back to their ranks: [t, h, dv]."""
        cache = self.cache
        gathered = _gathered(q, cache.group)  # [P, t, h, d]
        size, tokens, heads, _ = gathered.shape
        out = q.new_zeros(size, tokens, heads, layer.head_dims[1])
        lse = q.new_full((size, heads, tokens), -torch.inf, dtype=accumulation_dtype(q.dtype))
        offset = 0
        for piece in self.chunk:
            ranks, rows = self._order(piece, offset)
            result = partial.Rows(gathered[ranks, rows], layer.head_dims[1])
            self._attend_shard(layer, piece, result)
            out[ranks, rows] = result.out.to(out.dtype)
            lse[ranks, :, rows] = result.lse.t()
            offset += 2 * piece.part
        merged, total = partial.merged([_exchanged(out, cache.group)], [_exchanged(lse, cache.group)])
        partial.add_sink(merged, total, layer.softmax_offset)
        return merged.to(q.dtype)

    def _order(self, piece: Piece, offset: int) -> tuple[Tensor, Tensor]:
        """Rank and row, among the gathered queries, of each token of a piece, in the order of positions."""
        if offset not in self._orders:  # the same in all layers
            places = torch.tensor([piece.place(token) for token in range(piece.length)], device=self.positions.device)
            self._orders[offset] = places[:, 0], places[:, 1] + offset
        return self._orders[offset]

    def _attend_shard(self, layer: ContextParallelAttention, piece: Piece, rows: partial.Rows) -> None:
        """Adds to all rows of a piece what they find in this rank's shard of its sequence."""
        filled = self.cache.filled[piece.sequence][self.cache.rank]
        scale, window = layer.softmax_scale or 1 / sqrt(rows.queries.size(-1)), _window_of(layer)
        if window is not None:
            end = filled + piece.kept(self.cache.rank)
            positions = self.cache.positions[piece.sequence, :end]
            for keys, values, places in self._blocks(layer, piece.sequence, 0, end):
                rows.attend_window(piece.start, keys, values, positions[places], window, scale)
            return
        kernel: Kernel | None = None
        for keys, values, _ in self._blocks(layer, piece.sequence, 0, filled):
            kernel = kernel or _kernel(rows.queries, values)
            rows.attend(slice(None), keys, values, FULL, kernel, scale)
        place = filled
        for first, number in piece.spans(self.cache.rank):
            for keys, values, places in self._blocks(layer, piece.sequence, place, place + number):
                kernel = kernel or _kernel(rows.queries, values)
                rows.attend_piece(first + places.start - place, keys, values, kernel, scale)
            place += number

    def _blocks(
        self, layer: ContextParallelAttention, sequence: int, begin: int, end: int
    ) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Keys [n, g, d] and values [n, g, dv] of places of the cache; those of latent attention are made by blocks."""
        keys, values = (x[sequence] for x in self.cache.layer(layer))
        latent = self.cache.latents.get(layer.layer_number)
        step = max(1, end - begin) if latent is None else _EXPANDED
        for first in range(begin, end, step):
            places = slice(first, min(first + step, end))
            found = (keys[places], values[places]) if latent is None else latent.expanded(keys[places])
            yield *found, places

    def count(self) -> None:
        """See `Pass`."""
        new = [[0] * self.cache.ranks for _ in self.cache.filled]
        for piece in self.chunk:
            new[piece.sequence] = [piece.kept(rank) for rank in range(self.cache.ranks)]
        self.cache.count_filled(new)


class Decode:
    """A pass over one token of each sequence, computed by all ranks alike.

    All of it is worked out on the cache's device, so that a CUDA graph of the pass serves all steps.

    Attributes:
        positions: of the tokens, [B] int64.
    """

    def __init__(self, cache: Cache, active: Tensor) -> None:
        """For each sequence that is `active` [B], bool.

        The cache must have room (`Decoder` looks), and `Cache.count_decoded` must follow `Cache.finish`.
        """
        self.cache = cache
        counts, ranks = cache.counts, cache.ranks
        order = torch.arange(ranks, device=counts.device)[:, None]
        owner = (counts * ranks + order).argmin(0)  # as `shards.owner`: of ranks with as many tokens the first
        self.new = (owner == order) & active
        # What is added to an inactive sequence is kept nowhere; its position is one that the model has.
        self.positions = (counts.sum(0) - (~active).long()).clamp_(min=0)
        held, mine = counts[cache.rank], self.new[cache.rank]
        # A token that another rank keeps goes to the last place, which nobody sees.
        self.places = torch.where(mine, held, cache.capacity)
        self.ends = held + mine
        self.sequences = torch.arange(len(held), device=counts.device)
        cache.positions[self.sequences, self.places] = self.positions

    def attend(self, layer: ContextParallelAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Pass`."""
        self.cache.keep(layer, k, v, [(slice(None), self.sequences, self.places)])
        keys, values = self.cache.layer(layer)
        latent = self.cache.latents.get(layer.layer_number)
        asked = q if latent is None else latent.absorbed(q)
        scale = layer.softmax_scale or 1 / sqrt(q.size(-1))
        parts = _gathered(self.attend_shard(asked, keys, values, scale, _window_of(layer)), self.cache.group)
        if q.is_cuda:
            from megatron_attn2d.inference import triton_decode

            out, lse = _apart(triton_decode.merge(parts))
        else:
            outs, lses = _apart(parts)
            out, lse = partial.merged([outs], [lses])
        partial.add_sink(out, lse, layer.softmax_offset)
        return (out if latent is None else latent.output(out)).to(q.dtype)

    def attend_shard(self, q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
        """Output and log-sum-exp over this rank's keys in one tensor, [B, h, dv + 1]: one message."""
        cache = self.cache
        if q.is_cuda:
            from megatron_attn2d.inference import triton_decode

            return triton_decode.attend(q, keys, values, self.ends, scale, window, cache.positions, self.positions)
        seen = torch.arange(keys.size(1)) < self.ends[:, None]
        if window is not None:
            seen &= cache.positions >= (self.positions - window)[:, None]
        longest = int(self.ends.max())
        held = keys[:, :longest], values[:, :longest]
        out, lse = partial.masked(q.unsqueeze(1), *held, seen[:, None, :longest], scale)
        return torch.cat((out.squeeze(1), lse), -1)

    def count(self) -> None:
        """On the device; `Cache.count_decoded` does it on the host."""
        self.cache.counts.add_(self.new)


def _window_of(layer: ContextParallelAttention) -> int | None:
    """How far before itself a token of the layer sees; None: to the first."""
    left = layer.window[0] if layer.window else None
    return None if left is None or left < 0 else left


def _apart(x: Tensor) -> tuple[Tensor, Tensor]:
    """Output [..., B, h, dv] and log-sum-exp [..., h, B] of [..., B, h, dv + 1]."""
    return x[..., :-1], x[..., -1].mT


def _kernel(q: Tensor, v: Tensor) -> Kernel:
    """The kernel for rectangles and causal squares of q [t, h, d] and values [..., g, dv]."""
    grouped = v.size(-2) != q.size(1)
    return choose_kernel("auto", Request(q.device.type, q.dtype, q.size(2), v.size(-1), grouped=grouped))


def _gathered(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`x` of all ranks, [P, ...]."""
    if group is None:
        return x.unsqueeze(0)
    found = x.new_empty(group.size() * x.size(0), *x.shape[1:])
    dist.all_gather_into_tensor(found, x.contiguous(), group=group)
    return found.unflatten(0, (group.size(), -1))


def _exchanged(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x[i] of [P, ...] to rank i: what all ranks have for this one, [P, ...]."""
    if group is None:
        return x
    found = torch.empty_like(x)
    dist.all_to_all_single(found, x, group=group)
    return found
