"""Packed sequences (THD): several sequences one after the other, each of them spread over the ranks on its own.

Megatron and Transformer Engine give a rank both chunks of every sequence in turn. Attention wants the lower chunks of
all sequences, then the upper ones, so that a chunk is one message whatever is packed:

    shard of a rank      s1 lower, s1 upper, s2 lower, s2 upper, ...      each sequence in its own zigzag
    here                 s1 lower, s2 lower, ..., s1 upper, s2 upper, ...

A sequence may end before the tokens that are set apart for it do: the rest is padding, which sees and is seen by
nobody. Tokens after the last sequence are padding too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where sequences lie in a pack.

    Attributes:
        lengths: tokens of each sequence, padding left out.
        places: tokens set apart for each, a multiple of 2 * cp.
    """

    lengths: tuple[int, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, cu_seqlens: Sequence[int], cu_seqlens_padded: Sequence[int] | None, tokens: int, ranks: int) -> Packing:
        """From running totals as Megatron's PackedSeqParams have them.

        Args:
            cu_seqlens: [0, length of the first, of the first two, ...].
            cu_seqlens_padded: the same with padding, where there is any between sequences.
            tokens: of the whole pack, all ranks together.
            ranks: context-parallel size.

        Raises:
            ValueError: for totals that don't fit each other, the tokens or the ranks.
        """
        padded = cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded
        lengths, places = (tuple(b - a for a, b in pairwise(x)) for x in (cu_seqlens, padded))
        if len(lengths) != len(places) or not lengths or cu_seqlens[0] != 0 or padded[0] != 0:
            raise ValueError(f"cu_seqlens {_short(cu_seqlens)} and cu_seqlens_padded {_short(padded)} don't fit")
        for i, (length, place) in enumerate(zip(lengths, places, strict=True)):
            if not 0 <= length <= place:
                raise ValueError(f"packed sequence {i} has {length} tokens in a place of {place}")
            if place % (2 * ranks):
                lower = place // (2 * ranks) * 2 * ranks
                raise ValueError(
                    f"packed sequence {i} takes {place} tokens, no multiple of 2 * cp = {2 * ranks}: pad it to "
                    f"{lower + 2 * ranks} (cu_seqlens_padded){f' or cut it to {lower}' if lower else ''}"
                )
        rest = tokens - padded[-1]
        if rest < 0 or rest % (2 * ranks):
            raise ValueError(
                f"packed sequences take {padded[-1]} of {tokens} tokens: what is left must be a multiple of "
                f"2 * cp = {2 * ranks}"
            )
        if rest:
            lengths, places = (*lengths, 0), (*places, rest)
        # Places without a token are legal, and nothing.
        taken = [i for i, place in enumerate(places) if place]
        if not taken:
            raise ValueError(f"cu_seqlens {_short(cu_seqlens)} pack no token")
        return cls(tuple(lengths[i] for i in taken), tuple(places[i] for i in taken))

    def chunks(self, ranks: int) -> tuple[int, ...]:
        """Tokens of a chunk of each sequence, of `ranks` ranks."""
        return tuple(place // (2 * ranks) for place in self.places)

    def by_half(self, shard: Tensor, ranks: int) -> Tensor:
        """[t/cp, heads, d] by sequence -> [t/cp, 1, heads, d] by half."""
        pieces = shard.split([chunk for chunk in self.chunks(ranks) for _ in range(2)])
        return torch.cat(pieces[0::2] + pieces[1::2]).unsqueeze(1)

    def by_sequence(self, shard: Tensor, ranks: int) -> Tensor:
        """The way back."""
        lower, upper = (half.split(self.chunks(ranks)) for half in shard.squeeze(1).chunk(2))
        return torch.cat([piece for pair in zip(lower, upper, strict=True) for piece in pair])

    def over_heads(self, shard: Tensor, ranks: int, parts: int) -> Tensor:
        """What `parts` ranks brought together, each by sequence within its half, by sequence over all of them."""
        chunks = self.chunks(ranks)
        pieces = shard.unflatten(0, (2, parts, -1)).split(chunks, 2)
        return torch.cat([piece.flatten(1, 2) for piece in pieces], 1).flatten(0, 1)

    def over_ranks(self, shard: Tensor, ranks: int, parts: int) -> Tensor:
        """The way back."""
        chunks = self.chunks(ranks)
        pieces = shard.unflatten(0, (2, -1)).split([chunk * parts for chunk in chunks], 1)
        return torch.cat([piece.unflatten(1, (parts, -1)) for piece in pieces], 2).flatten(0, 2)


def _short(totals: Sequence[int]) -> str:
    shown = ", ".join(map(str, totals[:8]))
    return f"[{shown}{', ...' if len(totals) > 8 else ''}]"
