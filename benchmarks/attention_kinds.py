"""The kinds of attention that benchmark_attention.py compares modes on: their sizes, and packs of documents."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

_K = 1024


@dataclass(frozen=True)
class Kind:
    """One kind of attention at one size.

    Attributes:
        family: what `--kinds` calls it.
        seq: tokens of the whole sequence, or of the whole pack.
        heads, kv_heads: query heads and key/value heads.
        head_dim, value_dim: of queries and keys, and of values.
        window: tokens before and after it that a token sees, if not all.
        sink: whether the softmax has a learnable sink.
        dropout: probability of dropout.
        documents: how many documents are packed; 0: one dense sequence.
        padded: whether documents end before the places that the pack sets apart for them do.
    """

    family: str
    seq: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    value_dim: int = 128
    causal: bool = True
    window: tuple[int, int] | None = None
    sink: bool = False
    dropout: float = 0.0
    documents: int = 0
    padded: bool = False

    @classmethod
    def read(cls, fields: dict[str, Any]) -> Kind:
        """From JSON."""
        window = fields["window"]
        return cls(**fields | {"window": None if window is None else tuple(window)})

    @property
    def label(self) -> str:
        """For people: what is special about it, without its sizes."""
        said = [
            _counted(self.documents, "document") + (" with padding" if self.padded else "") if self.documents else "",
            "" if self.causal else "bidirectional",
            "" if self.window is None else f"window {tokens(max(self.window) + 1)}",
            "sink" if self.sink else "",
            f"dropout {self.dropout}" if self.dropout else "",
            f"head dims {self.head_dim}/{self.value_dim}" if self.head_dim != self.value_dim else "",
        ]
        return ", ".join(part for part in said if part) or "causal"

    @property
    def sizes(self) -> str:
        """For people: `64K, 12/12 x 128`."""
        return f"{tokens(self.seq)}, {self.heads}/{self.kv_heads} x {self.head_dim}"

    def pack(self, ranks: int, seed: int = 0) -> Pack | None:
        """The documents, drawn with a seed; None for a dense sequence."""
        return Pack.drawn(self.seq, self.documents, ranks, seed, self.padded) if self.documents else None

    def for_ranks(self, ranks: int) -> Kind | None:
        """The same with tokens that divide by 2 * ranks; None where so many documents don't fit on so many ranks."""
        unit = 2 * ranks
        seq = self.seq // unit * unit
        return replace(self, seq=seq) if seq >= max(1, self.documents) * unit else None

    def for_cpu(self, ranks: int) -> Kind:
        """The same with so few tokens, heads and dims that CPU ranks run it at once."""
        seq = self.seq // _K * ranks
        window = None
        if self.window is not None:
            left, right = (min(side, max(1, side * ranks // _K)) for side in self.window)
            window = left, right
        return replace(
            self,
            seq=seq,
            heads=4,
            kv_heads=4 if self.heads == self.kv_heads else 2,
            head_dim=self.head_dim // 8,
            value_dim=self.value_dim // 8,
            window=window,
            documents=min(self.documents, seq // (2 * ranks) // 2),
        )


def tokens(count: int) -> str:
    """`64K`, or the number itself where it is no multiple of 1024."""
    return f"{count // _K}K" if count and count % _K == 0 else str(count)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _packed(seq: int, documents: int, **what: bool) -> Kind:
    return Kind("packed", seq, 12, 12, documents=documents, **what)


KINDS = (
    # What matters more comes first, as time may run out.
    Kind("dense", 64 * _K, 12, 12),
    _packed(64 * _K, 64),
    Kind("window", 64 * _K, 12, 12, window=(4 * _K - 1, 0)),
    Kind("dropout", 32 * _K, 12, 12, dropout=0.1),
    Kind("mla", 32 * _K, 16, 16, head_dim=192, value_dim=128),
    Kind("sink", 64 * _K, 64, 8, head_dim=64, value_dim=64, window=(127, 0), sink=True),
    Kind("dense", 16 * _K, 12, 12),
    _packed(64 * _K, 1024),
    _packed(64 * _K, 1),
    Kind("bidirectional", 32 * _K, 12, 12, causal=False),
    Kind("gqa", 64 * _K, 16, 2),
    Kind("window", 128 * _K, 16, 4, window=(_K - 1, 0)),
    _packed(64 * _K, 16),
    _packed(64 * _K, 256),
    *(_packed(32 * _K, documents) for documents in (64, 1024, 1, 256, 16)),
    Kind("window", 64 * _K, 12, 12, causal=False, window=(2 * _K - 1, 2 * _K - 1)),
    Kind("gqa", 16 * _K, 16, 2),
    Kind("dense", 32 * _K, 12, 12),
    _packed(64 * _K, 64, padded=True),
)
"""In this order."""

QUICK = (KINDS[0], KINDS[1], KINDS[2])
FAMILIES = tuple(dict.fromkeys(kind.family for kind in KINDS))


def choose(
    families: Sequence[str] | None,
    *,
    quick: bool = False,
    seq: Sequence[int] | None = None,
    heads: Sequence[str] | None = None,
    head_dim: int | None = None,
    documents: Sequence[int] | None = None,
) -> list[Kind]:
    """The kinds of these families, all by default; where sizes are given, each family at each of them.

    Args:
        heads: as people write them, query/key heads: 16/2.

    Raises:
        ValueError: documents are given for families that are not packed.
    """
    kinds = [kind for kind in (QUICK if quick else KINDS) if families is None or kind.family in families]
    if not (seq or heads or head_dim or documents):
        return kinds
    if documents and any(not kind.documents for kind in kinds):
        raise ValueError(f"documents={list(documents)}: only packs have documents, choose --kinds packed")
    found: dict[Kind, None] = {}
    for template in {kind.family: kind for kind in reversed(kinds)}.values():
        pairs = [tuple(map(int, pair.split("/"))) for pair in heads or [f"{template.heads}/{template.kv_heads}"]]
        dims = (template.head_dim, template.value_dim) if head_dim is None else (head_dim, head_dim)
        for length in seq or [template.seq]:
            for h, g in pairs:
                for count in documents or [template.documents]:
                    sizes = {"seq": length, "heads": h, "kv_heads": g, "head_dim": dims[0], "value_dim": dims[1]}
                    found[replace(template, **sizes, documents=count)] = None
    return list(found)


@dataclass(frozen=True)
class Pack:
    """Documents that follow each other.

    Attributes:
        lengths: tokens of each.
        places: tokens that are set apart for each, multiples of 2 * ranks.
    """

    lengths: tuple[int, ...]
    places: tuple[int, ...]

    @classmethod
    def drawn(cls, seq: int, documents: int, ranks: int, seed: int = 0, padded: bool = False) -> Pack:
        """Documents as real text has them, many short and a few long: log-normal, rounded to 2 * ranks tokens.

        Args:
            seq: tokens of the pack, at least 2 * ranks for each document.
            padded: documents end up to 2 * ranks tokens before their places do.
        """
        unit = 2 * ranks
        spare = seq // unit - documents
        assert spare >= 0, f"{documents} documents of at least {unit} tokens don't fit into {seq}"
        draw = random.Random(1000 * documents + seed)
        weights = [draw.lognormvariate(0.0, _SIGMA) for _ in range(documents)]
        units = [1 + int(spare * weight / sum(weights)) for weight in weights]
        units[max(range(len(units)), key=units.__getitem__)] += seq // unit - sum(units)  # what rounding left
        places = tuple(n * unit for n in units)
        return cls(tuple(n - draw.randrange(unit) for n in places) if padded else places, places)

    @property
    def cu_seqlens(self) -> list[int]:
        """Running totals of the lengths."""
        return [0, *accumulate(self.lengths)]

    @property
    def cu_seqlens_padded(self) -> list[int]:
        """Running totals of the places."""
        return [0, *accumulate(self.places)]


_SIGMA = 1.4
"""Of the logarithm of a document's length: a tenth of the documents then hold about half of the tokens."""
