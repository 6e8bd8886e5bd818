"""Keys and values of a batch of sequences, spread over the context ranks; `passes` adds to them and attends them.

Keys are kept after rotary positions were applied. Memory per rank is the cache over P. A rank's shard of a sequence is
in the order of positions, but for single tokens that were decoded; where they stand is in `positions`.

Legend: B sequences, P context ranks, t tokens that this rank computes in a pass, h query heads, g key heads, d head
dim, dv the values' head dim, r + p the width of latent attention (`latent`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.inference import shards
from megatron_attn2d.inference.latent import Latent
from megatron_attn2d.megatron.core_attention import ContextParallelAttention

type Place = tuple[slice, int | Tensor, slice | Tensor]
"""Rows of a pass, the sequence or sequences that they belong to, and where they are kept."""


class Pass(Protocol):
    """New tokens on their way through the layers; see `passes`."""

    def attend(self, layer: ContextParallelAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps k [t, g, d] and v [t, g, dv] of the layer, and attends q [t, h, d]; [t, h, dv] in the dtype of q."""

    def count(self) -> None:
        """Counts the new tokens, once all layers have them."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """How far a cache was filled; see `Cache.roll_back`."""

    filled: list[list[int]]
    """The cache knows its snapshots by this very list."""
    logits: Tensor | None


class Cache:
    """The keys and values of B sequences.

    Attributes:
        filled: tokens of each sequence that each rank keeps, [B][P].
        capacity: tokens of one sequence for which a rank has room.
        positions: where the kept tokens stand in their sequence, [B, capacity + 1], int64.
        layers: keys [B, capacity + 1, g, d] and values [..., dv] of this rank by the layer's number, in the parameters'
            dtype; of latent attention one tensor, [B, capacity + 1, 1, r + p].
        logits: of the token after the last one of each sequence, [B, vocabulary], fp32; None before the first pass.
    """

    def __init__(
        self,
        sequences: int,
        capacity: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        latents: Mapping[int, Latent],
    ) -> None:
        """Empty; keys and values are allocated layer by layer in the first pass.

        Args:
            sequences: B.
            capacity: tokens of one sequence that a rank should have room for, until `grow`.
            group: the context-parallel group; None for one rank.
            device: where keys and values are.
            latents: of the layers with latent attention, by number.
        """
        self.group, self.latents = group, latents
        self.rank, self.ranks = (0, 1) if group is None else (group.rank(), group.size())
        self.capacity = capacity
        self.filled = [[0] * self.ranks for _ in range(sequences)]
        self.positions = torch.zeros(sequences, capacity + 1, dtype=torch.long, device=device)
        self.logits: Tensor | None = None
        self.layers: dict[int, tuple[Tensor, ...]] = {}
        self._counts: Tensor | None = None
        # `Snapshot.filled`, each of more tokens than the one before it. Not their logits, which would all live as long.
        self._snapshots: list[list[list[int]]] = []
        self._pass: Pass | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, all ranks together."""
        return [sum(kept) for kept in self.filled]

    @property
    def bytes(self) -> int:
        """Of the keys and values that this rank has allocated."""
        return sum(x.numel() * x.element_size() for layer in self.layers.values() for x in layer)

    def snapshot(self) -> Snapshot:
        """What `roll_back` needs to come back here: no keys are copied."""
        if not self._snapshots or self._snapshots[-1] != self.filled:
            self._snapshots.append([list(kept) for kept in self.filled])
        return Snapshot(self._snapshots[-1], self.logits)

    def roll_back(self, snapshot: Snapshot) -> None:
        """Forgets all tokens that were added after `snapshot`, so that others may follow: one text, many questions.

        Raises:
            ValueError: it is of another cache, or this one has been rolled back behind it since.
        """
        place = next((i for i, filled in enumerate(self._snapshots) if filled is snapshot.filled), None)
        if place is None:
            raise ValueError(
                "the snapshot holds tokens that the cache has forgotten: take a new one after rolling back"
            )
        del self._snapshots[place + 1 :]
        self.filled, self._counts = [list(kept) for kept in snapshot.filled], None
        self.logits = snapshot.logits

    def begin[P: Pass](self, new: P) -> P:
        """Begins a pass, which is returned; `finish` ends it."""
        self._pass = new
        return new

    @property
    def counts(self) -> Tensor:
        """`filled` on the device, [P, B] int64; single tokens are counted there too."""
        if self._counts is None:
            self._counts = torch.tensor(self.filled, device=self.positions.device).T.contiguous()
        return self._counts

    def count_filled(self, tokens: Sequence[Sequence[int]]) -> None:
        """Counts `tokens` of each sequence that each rank has kept more, [B][P]."""
        self.filled = [[*map(sum, zip(*both, strict=True))] for both in zip(self.filled, tokens, strict=True)]
        self._counts = None

    def count_decoded(self, active: Sequence[bool]) -> None:
        """Counts on the host what a pass over single tokens has counted on the device."""
        for kept, on in zip(self.filled, active, strict=True):
            if on:
                kept[shards.owner(kept)] += 1

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

    def layer(self, layer: ContextParallelAttention) -> tuple[Tensor, Tensor]:
        """Room for keys and values of a layer, [B, capacity + 1, g, d]; what is not to be kept goes to the last place.

        Of latent attention both are views of [B, capacity + 1, 1, r + p].
        """
        latent = self.latents.get(layer.layer_number)
        if layer.layer_number not in self.layers:
            heads, widths = (1, [latent.width]) if latent else (layer.kept_heads, layer.head_dims)
            shape = len(self.filled), self.capacity + 1, heads
            like = {"dtype": layer.config.params_dtype, "device": self.positions.device}
            # zeros: what was never written is masked, but NaN times 0 is NaN
            self.layers[layer.layer_number] = tuple(torch.zeros(*shape, width, **like) for width in widths)
        held = self.layers[layer.layer_number]
        return (held[0], held[0][..., : latent.rank]) if latent else (held[0], held[1])

    def keep(self, layer: ContextParallelAttention, key: Tensor, value: Tensor, at: Sequence[Place]) -> None:
        """Keeps rows of key [t, g, d] and value [t, g, dv] at places of the cache."""
        latent = self.latents.get(layer.layer_number)
        news = [key, value] if latent is None else [latent.kept(key)]
        self.layer(layer)
        for held, new in zip(self.layers[layer.layer_number], news, strict=True):
            for rows, sequence, places in at:
                held[sequence, places] = new[rows].to(held.dtype)

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` tokens of one sequence on each rank, layer by layer; what is kept is copied."""
        more = capacity - self.capacity
        for number, held in self.layers.items():
            self.layers[number] = tuple(_longer(x, more) for x in held)
        self.positions = _longer(self.positions, more)
        self.capacity = capacity


def _longer(x: Tensor, more: int) -> Tensor:
    grown = x.new_zeros(x.size(0), x.size(1) + more, *x.shape[2:])
    grown[:, : x.size(1)] = x
    return grown
