"""Counts documents and their tokens by length, in buckets that double, and draws them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_attn2d.pictures import COLOURS, blank, ruled, save

_BAR = 32
"""Length of the longest bar, in characters."""
_CONTEXT_RANKS = (4, 16, 64)


@dataclass(frozen=True)
class Bucket:
    """Documents of `first` to `last` tokens."""

    first: int
    last: int
    documents: int
    tokens: int


def buckets(lengths: np.ndarray) -> list[Bucket]:
    """Buckets by powers of two, from the shortest document to the longest.

    Args:
        lengths: tokens of each document, at least 1.
    """
    powers = np.frexp(lengths)[1] - 1  # exact, as lengths are integers below 2^53
    low, high = int(powers.min()), int(powers.max())
    documents = np.bincount(powers - low)
    tokens = np.bincount(powers - low, weights=lengths)
    return [
        Bucket(1 << power, (2 << power) - 1, int(documents[power - low]), int(tokens[power - low]))
        for power in range(low, high + 1)
    ]


def lines(lengths: np.ndarray) -> Iterator[str]:
    """Yields a line with a bar per bucket, and a line on the padding where context ranks share each document."""
    found = buckets(lengths)
    places = [f"{bucket.first:,} to {bucket.last:,}" for bucket in found]
    width, most = max(map(len, places)), max(bucket.documents for bucket in found)
    total = sum(bucket.tokens for bucket in found)
    yield "documents by tokens, and their share of all tokens:"
    for place, bucket in zip(places, found, strict=True):
        bar = "#" * -(-_BAR * bucket.documents // most)
        yield f"  {place:>{width}}  {bucket.documents:>12,}  {bucket.tokens / total:>6.1%}  {bar}".rstrip()
    shares = ", ".join(f"{padding(lengths, 2 * ranks):.1%} on {ranks}" for ranks in _CONTEXT_RANKS)
    yield f"padding as sequences of their own, by context ranks: {shares}"


def padding(lengths: np.ndarray, multiple: int) -> float:
    """The share of padding, 0 to 1, where each document takes a multiple of `multiple` tokens."""
    taken = int((-(-lengths.astype(np.int64) // multiple) * multiple).sum())
    return 1 - int(lengths.sum(dtype=np.int64)) / taken


def draw(lengths: np.ndarray, title: str, output: Path) -> None:
    """Draw the buckets into the PNG `output`: shares of the documents beside shares of the tokens."""
    from matplotlib.ticker import PercentFormatter

    found = buckets(lengths)
    figure = blank(8, 4.5)
    axes = figure.subplots()
    at = np.arange(len(found))
    for offset, colour, name in ((-0.2, COLOURS[0], "documents"), (0.2, COLOURS[1], "tokens")):
        numbers = np.array([getattr(bucket, name) for bucket in found])
        axes.bar(at + offset, numbers / numbers.sum(), 0.4, label=f"{numbers.sum():,} {name}", color=colour, zorder=3)
    axes.set_xticks(at, [f"{bucket.first:,}" for bucket in found], rotation=45, ha="right")
    axes.set_xlabel("tokens of a document, from this number on")
    axes.set_ylabel("share")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(title, loc="left", fontweight="bold")
    ruled(axes)
    axes.legend(frameon=False)
    save(figure, output)
