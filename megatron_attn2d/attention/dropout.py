"""Dropout of attention probabilities by a hash of their position, so that no layout changes the mask.

Whether the probability of a query and a key is dropped depends on the seed, the sequence in the batch, the head among
all heads of the layer and the positions of both tokens in the whole sequence, and on nothing else. So the forward and
the backward pass, every grid and every tensor-parallel layout agree without messages and without a stored mask.

On a GPU a pair of query and key must cost few instructions, and a 64-bit multiplication takes several. The strong
hashes are therefore computed once per row and once per key, and only a short mix per pair:

    row     multiplier m (odd) and offset a: 64 bits that seed, sequence, head and position decide, each mixed into the
            hash of those before it by the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)
    key     word b: the position, scrambled by a permutation of 32 bits (the finaliser of MurmurHash3) that seed and
            sequence choose, so that no two keys share a word
    pair    x = m b + a;  x = m (x ^ x >> 16);  dropped where x < p 2^32

The mix of a pair is modulo 2^32. After one multiplication, rows whose words share low bits would be correlated, and so
would keys whose words do. The second multiplication, by a number that differs from row to row, removes this. Integers
of torch wrap around, as unsigned numbers do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_LOW = (1 << 32) - 1
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64


@dataclass(frozen=True)
class Dropout:
    """Dropout of one call of attention.

    Attributes:
        p: the chance that a probability is dropped; the others are divided by 1 - p.
        seed: the same on every rank, and different in every call. With a tensor [1] of int64 nobody waits for the GPU.
        first_head: the number of this rank's first query head among all heads of the layer, under tensor parallelism.
    """

    p: float
    seed: int | Tensor
    first_head: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"dropout p={self.p} is no probability below 1: choose 0 <= p < 1")
        if isinstance(self.seed, Tensor):
            if self.seed.numel() != 1 or self.seed.dtype != torch.int64:
                raise ValueError(
                    f"dropout seed is {self.seed.dtype} of shape {list(self.seed.shape)}: choose an int or a tensor "
                    "[1] of int64"
                )
        elif not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"dropout seed={self.seed} does not fit into int64: choose 0 <= seed < 2**63")

    @classmethod
    def of_call(cls, dropout: Dropout | None) -> Dropout | None:
        """The dropout with the seed that it has now, even if its tensor changes before the backward pass.

        None for p = 0.

        Raises:
            ValueError: `dropout` is no Dropout: a probability alone, for example, has no seed.
        """
        if dropout is not None and not isinstance(dropout, cls):
            raise ValueError(f"dropout={dropout!r} is no Dropout: pass attention.dropout.Dropout(p, seed)")
        if dropout is None or dropout.p == 0:
            return None
        return replace(dropout, seed=dropout.seed.clone()) if isinstance(dropout.seed, Tensor) else dropout

    def starting(self, head: int) -> Dropout:
        """The dropout of the heads from `head` on."""
        return replace(self, first_head=self.first_head + head)

    def at(self, sequences: Tensor, heads: int, rows: Tensor, keys: Tensor) -> KeepMask:
        """The mask of one kernel call; arguments as the attributes of `KeepMask`."""
        return KeepMask(self, sequences, self.first_head + torch.arange(heads, device=rows.device), rows, keys)


@dataclass(frozen=True)
class KeepMask:
    """Which probabilities of one kernel call are kept.

    Attributes:
        dropout: probability and seed.
        sequences: numbers of the sequences in the batch, [b].
        heads: numbers of the heads in the layer, [h].
        rows, keys: positions of queries and keys in the whole sequence, [b, sq] and [b, sk].
    """

    dropout: Dropout
    sequences: Tensor
    heads: Tensor
    rows: Tensor
    keys: Tensor

    @property
    def bound(self) -> int:
        """The least number of a pair, read as int32, with which it is kept."""
        return min(round(self.dropout.p * 2**32), _LOW) - 2**31

    def row_words(self) -> tuple[Tensor, Tensor]:
        """Multiplier and offset of each row and head, int32 [b, h, sq]."""
        state = _mixed(self._sequence_states()[:, None], self.heads)
        state = _mixed(state[:, :, None], self.rows[:, None, :])
        return (state | 1).to(torch.int32), (state >> 32).to(torch.int32)

    def key_words(self) -> Tensor:
        """Word of each key, int32 [b, sk]."""
        state = _mixed(self._sequence_states(), -1)  # no head has this number
        return _scrambled((self.keys ^ state[:, None]) & _LOW).to(torch.int32)

    def factors(self, dtype: torch.dtype) -> Tensor:
        """0 where a probability is dropped, 1 / (1 - p) where it is kept, [b, h, sq, sk]."""
        multipliers, offsets = (words.unsqueeze(-1) for words in self.row_words())
        x = multipliers * self.key_words()[:, None, None, :] + offsets
        kept = (x ^ ((x >> 16) & 0xFFFF)) * multipliers >= self.bound
        return kept.to(dtype) / (1 - self.dropout.p)

    def _sequence_states(self) -> Tensor:
        """Hash of seed and sequence, [b]."""
        return _mixed(torch.as_tensor(self.dropout.seed, device=self.rows.device).view(1), self.sequences)


def _mixed(state: Tensor, number: Tensor | int) -> Tensor:
    """`state`, int64, with a number mixed in."""
    x = state + (number + 1) * _GOLDEN
    x = (x ^ _shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, filled with zeros: int64's own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _scrambled(x: Tensor) -> Tensor:
    """A permutation of the numbers below 2^32, held in int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    return x ^ (x >> 16)
