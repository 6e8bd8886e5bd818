"""Keys and values of a batch of sequences, spread over the context ranks, and attention to them.

    fill the first tokens     attention2d on the run's grid, each sequence in its zigzag; every rank keeps its own keys
    fill further tokens       queries of the chunk are gathered by all ranks; each attends its shard, returns the
                              partial results to the queries' owners, and they merge them: attention2d with one row
    decode one token each     every rank has all queries, attends its shard, and merges the partial results of all

Keys are kept after rotary positions were applied. Memory per rank is the cache over P. A rank's shard of a sequence is
in the order of positions, but for single tokens that were decoded; where they stand is in `positions`.

Legend: B sequences, P context ranks, t tokens that this rank computes in a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.attention.kernels import Kernel, choose_kernel
from megatron_attn2d.attention.kernels.base import Request
from megatron_attn2d.attention.layout import FULL
from megatron_attn2d.inference import partial, shards
from megatron_attn2d.inference.shards import Piece
from megatron_attn2d.megatron.core_attention import ContextParallelAttention


@dataclass(frozen=True)
class Snapshot:
    """How far a cache was filled; see `Cache.roll_back`."""

    filled: tuple[tuple[int, ...], ...]
    logits: Tensor | None


class Cache:
    """The keys and values of B sequences.

    Attributes:
        filled: tokens of each sequence that each rank keeps, [B][P].
        capacity: tokens of one sequence for which a rank has room.
        positions: where the kept tokens stand in their sequence, [B, capacity + 1].
        logits: of the token after the last one of each sequence, [B, vocabulary], fp32; None before the first pass.
    """

    def __init__(self, sequences: int, capacity: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        """Empty; keys and values are allocated layer by layer in the first pass.

        Args:
            sequences: B.
            capacity: tokens of one sequence that a rank should have room for; it grows where that is too few.
            group: the context-parallel group; None for one rank.
            device: where keys and values are.
        """
        self.group = group
        self.rank, self.ranks = (0, 1) if group is None else (group.rank(), group.size())
        self.capacity = capacity
        self.filled = [[0] * self.ranks for _ in range(sequences)]
        self.positions = torch.zeros(sequences, capacity + 1, dtype=torch.long, device=device)
        self.logits: Tensor | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._pass: _Fill | _Decode | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, all ranks together."""
        return [sum(kept) for kept in self.filled]

    @property
    def bytes(self) -> int:
        """Of the keys and values that this rank has allocated."""
        return sum(x.numel() * x.element_size() for layer in self._layers.values() for x in layer)

    def snapshot(self) -> Snapshot:
        """What `roll_back` needs to come back here: no keys are copied."""
        return Snapshot(tuple(map(tuple, self.filled)), self.logits)

    def roll_back(self, snapshot: Snapshot) -> None:
        """Forgets all tokens that were added after `snapshot`, so that others may follow: one text, many questions.

        Raises:
            ValueError: the cache has been rolled back behind that point since.
        """
        if any(
            then > now
            for before, after in zip(snapshot.filled, self.filled, strict=True)
            for then, now in zip(before, after, strict=True)
        ):
            raise ValueError(
                "the snapshot holds tokens that the cache has forgotten: take a new one after rolling back"
            )
        self.filled = [list(kept) for kept in snapshot.filled]
        self.logits = snapshot.logits

    def fill(self, chunk: Sequence[Piece]) -> _Fill:
        """Begins a pass over the tokens of a chunk; `finish` ends it."""
        needed = max(self.filled[p.sequence][rank] + p.kept(rank) for p in chunk for rank in range(self.ranks))
        self._grow(needed)
        self._pass = _Fill(self, chunk)
        return self._pass

    def decode(self, active: Sequence[bool]) -> _Decode:
        """Begins a pass over one more token of each active sequence, computed by all ranks alike."""
        self._grow(max(min(kept) + 1 for kept in self.filled))
        self._pass = _Decode(self, active)
        return self._pass

    def finish(self) -> None:
        """Ends the pass: the new tokens count."""
        assert self._pass is not None
        self._pass.count()
        self._pass = None

    def attend(self, layer: ContextParallelAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keeps key and value [t, 1, g, d] of the pass, and attends query [t, 1, h, d]; [t, 1, h * dv]."""
        assert self._pass is not None, "a pass has begun"
        out = self._pass.attend(layer, query.squeeze(1), key.squeeze(1), value.squeeze(1))
        return out.flatten(1).unsqueeze(1)

    def layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Room for keys and values of a layer, [B, capacity + 1, g, d]; what is not to be kept goes to the last place.

        `key` and `value` are some of that layer.
        """
        if number not in self._layers:
            shape = len(self.filled), self.capacity + 1
            # zeros: what was never written is masked, but NaN times 0 is NaN
            self._layers[number] = key.new_zeros(*shape, *key.shape[1:]), value.new_zeros(*shape, *value.shape[1:])
        return self._layers[number]

    def _grow(self, capacity: int) -> None:
        if capacity <= self.capacity:
            return
        more = max(capacity, self.capacity + self.capacity // 4) - self.capacity
        for number, held in self._layers.items():
            keys, values = (_longer(x, more) for x in held)
            self._layers[number] = keys, values
        self.positions = _longer(self.positions, more)
        self.capacity += more


def _longer(x: Tensor, more: int) -> Tensor:
    grown = x.new_zeros(x.size(0), x.size(1) + more, *x.shape[2:])
    grown[:, : x.size(1)] = x
    return grown


class _Fill:
    """A pass over a chunk of known tokens: this rank computes its two parts of each piece.

    Attributes:
        positions: of this rank's tokens in their sequences, padding included, [t].
    """

    def __init__(self, cache: Cache, chunk: Sequence[Piece]) -> None:
        self.cache, self.chunk = cache, chunk
        device = cache.positions.device
        # Padding takes the place of the last token: it must be one that the model has positions for.
        held = [piece.start + min(row, piece.length - 1) for piece in chunk for row in piece.rows(cache.rank)]
        self.positions = torch.tensor(held, device=device)
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
        keys, values = self.cache.layer(layer.layer_number, k, v)
        offset = 0
        for piece in self.chunk:
            for rows, places in self._kept(piece, offset):
                keys[piece.sequence, places], values[piece.sequence, places] = k[rows], v[rows]
            offset += 2 * piece.part
        if any(self.cache.lengths[piece.sequence] for piece in self.chunk):
            return self._attend_cached(layer, q, keys, values)
        return layer.attend(q, k, v, causal=True, **self._totals()).unflatten(-1, (q.size(1), -1))

    def _totals(self) -> dict[str, list[int]]:
        real, padded = [0], [0]
        for piece in self.chunk:
            real.append(real[-1] + piece.length)
            padded.append(padded[-1] + piece.padded)
        return {"cu_seqlens": real, "cu_seqlens_padded": padded}

    def _attend_cached(self, layer: ContextParallelAttention, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """All queries to this rank's shard, and back: [t, h, dv]."""
        cache = self.cache
        scale = layer.softmax_scale or 1 / sqrt(q.size(-1))
        kernel = None if layer.window else _kernel(q, values)
        gathered = _gathered(q, cache.group)  # [P, t, h, d]
        out = q.new_zeros(cache.ranks, q.size(0), q.size(1), values.size(-1))
        lse = q.new_full(
            (cache.ranks, q.size(0), q.size(1)), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32)
        )
        offset = 0
        for piece in self.chunk:
            ranks, rows = self._order(piece, offset)
            result = partial.Rows(gathered[ranks, rows], values.size(-1))
            self._attend_shard(layer, piece, result, keys[piece.sequence], values[piece.sequence], kernel, scale)
            out[ranks, rows], lse[ranks, rows] = result.out.to(out.dtype), result.lse
            offset += 2 * piece.part
        merged, total = partial.merged(_exchanged(out, cache.group).to(lse.dtype), _exchanged(lse, cache.group))
        return partial.with_sink(merged, total, layer.softmax_offset).to(q.dtype)

    def _order(self, piece: Piece, offset: int) -> tuple[Tensor, Tensor]:
        """Rank and row, among the gathered queries, of each token of a piece, in the order of positions."""
        places = torch.tensor([piece.place(token) for token in range(piece.length)], device=self.positions.device)
        return places[:, 0], places[:, 1] + offset

    def _attend_shard(
        self,
        layer: ContextParallelAttention,
        piece: Piece,
        rows: partial.Rows,
        keys: Tensor,
        values: Tensor,
        kernel: Kernel | None,
        scale: float,
    ) -> None:
        filled = self.cache.filled[piece.sequence][self.cache.rank]
        new = piece.kept(self.cache.rank)
        if kernel is None:
            assert layer.window is not None
            end = filled + new
            window = layer.window[0]
            positions = self.cache.positions[piece.sequence, :end]
            before = window if window is not None and window >= 0 else piece.start + piece.length
            rows.attend_window(piece.start, keys[:end], values[:end], positions, before, scale)
            return
        rows.attend(slice(None), keys[:filled], values[:filled], FULL, kernel, scale)
        place = filled
        for first, number in piece.spans(self.cache.rank):
            held = slice(place, place + number)
            rows.attend_piece(first, keys[held], values[held], kernel, scale)
            place += number

    def count(self) -> None:
        for piece in self.chunk:
            for rank, kept in enumerate(self.cache.filled[piece.sequence]):
                self.cache.filled[piece.sequence][rank] = kept + piece.kept(rank)


class _Decode:
    """A pass over one token of each sequence, computed by all ranks alike.

    Attributes:
        positions: of the tokens, [B].
    """

    def __init__(self, cache: Cache, active: Sequence[bool]) -> None:
        self.cache = cache
        device = cache.positions.device
        self.owners = [shards.owner(kept) if on else None for kept, on in zip(cache.filled, active, strict=True)]
        mine = [owner == cache.rank for owner in self.owners]
        held = [kept[cache.rank] for kept in cache.filled]
        self.positions = torch.tensor(cache.lengths, device=device)
        # A token that another rank keeps goes to the last place, which nobody sees.
        places = [place if own else cache.capacity for place, own in zip(held, mine, strict=True)]
        self.places = torch.tensor(places, device=device)
        self.sequences = torch.arange(len(held), device=device)
        self.ends = torch.tensor([place + own for place, own in zip(held, mine, strict=True)], device=device)
        self.longest = max(place + own for place, own in zip(held, mine, strict=True))
        cache.positions[self.sequences, self.places] = self.positions

    def attend(self, layer: ContextParallelAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.layer(layer.layer_number, k, v)
        keys[self.sequences, self.places], values[self.sequences, self.places] = k, v
        slots = torch.arange(self.longest, device=q.device)
        seen = slots < self.ends[:, None]
        if layer.window and layer.window[0] is not None and layer.window[0] >= 0:
            seen &= self.cache.positions[:, : self.longest] >= (self.positions - layer.window[0])[:, None]
        scale = layer.softmax_scale or 1 / sqrt(q.size(-1))
        held = keys[:, : self.longest], values[:, : self.longest]
        out, lse = partial.masked(q.unsqueeze(1), *held, seen.unsqueeze(1), scale)
        together = torch.cat((out.squeeze(1), lse.squeeze(1).unsqueeze(-1)), -1)  # one message
        outs, lses = _gathered(together, self.cache.group).split([out.size(-1), 1], -1)
        merged, total = partial.merged(outs, lses.squeeze(-1))
        return partial.with_sink(merged, total, layer.softmax_offset).to(q.dtype)

    def count(self) -> None:
        for kept, owner in zip(self.cache.filled, self.owners, strict=True):
            if owner is not None:
                kept[owner] += 1


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
