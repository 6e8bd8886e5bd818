"""How the tokens of sequences are spread over context ranks while they are cached: integers alone.

A prompt is filled in by chunks. Of each chunk a rank computes the two pieces that the zigzag layout gives it, and it
keeps the keys and values that it computed. Generated tokens are computed by every rank alike; their keys and values go
to the rank that keeps the fewest tokens of the sequence, the first of several.

    P = 2, a prompt of 12 tokens in chunks of 8, then 3 new tokens

    position   0  1  2  3  4  5  6  7 | 8  9 10 11 | 12 13 14
    rank       0  0  1  1  1  1  0  0 | 0  1  1  0 |  0  1  0

A chunk of a sequence is padded to a multiple of 2 P tokens, as the zigzag layout wants it; padding is never kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """What one chunk holds of one sequence.

    Attributes:
        sequence: its place in the batch.
        start: position of the first token.
        length: how many tokens.
        ranks: P.
    """

    sequence: int
    start: int
    length: int
    ranks: int

    @property
    def part(self) -> int:
        """Tokens of one of the 2 P parts of the zigzag."""
        return -(-self.length // (2 * self.ranks))

    @property
    def padded(self) -> int:
        """Tokens with padding, all ranks together."""
        return 2 * self.ranks * self.part

    def rows(self, rank: int) -> list[int]:
        """Places in the piece of the 2 * part tokens that `rank` computes, padding included, in ascending order."""
        return [part * self.part + i for part in (rank, 2 * self.ranks - 1 - rank) for i in range(self.part)]

    def place(self, token: int) -> tuple[int, int]:
        """The rank that computes a token of the piece, and in which of its rows of the piece."""
        part, within = divmod(token, self.part)
        if part < self.ranks:
            return part, within
        return 2 * self.ranks - 1 - part, self.part + within

    def spans(self, rank: int) -> list[tuple[int, int]]:
        """The same as (first, number) of each run of tokens that are no padding."""
        runs = []
        for part in (rank, 2 * self.ranks - 1 - rank):
            first = part * self.part
            if (number := min(self.part, self.length - first)) > 0:
                runs.append((first, number))
        return runs

    def kept(self, rank: int) -> int:
        """Tokens that `rank` keeps."""
        return sum(number for _, number in self.spans(rank))


def chunks(starts: Sequence[int], lengths: Sequence[int], tokens: int, ranks: int) -> Iterator[list[Piece]]:
    """Cuts new tokens of sequences into chunks of at most `tokens` each, or of 2 * `ranks` if that is more.

    Args:
        starts: tokens of each sequence that are cached already.
        lengths: new tokens of each sequence.
        tokens: of a chunk, all ranks together, with padding.
        ranks: P.
    """
    most = max(1, tokens // (2 * ranks)) * 2 * ranks
    chunk: list[Piece] = []
    room = most
    for sequence, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        done = 0
        while done < length:
            piece = Piece(sequence, start + done, min(length - done, room), ranks)
            chunk.append(piece)
            done, room = done + piece.length, room - piece.padded
            if room < 2 * ranks:
                yield chunk
                chunk, room = [], most
    if chunk:
        yield chunk


def owner(filled: Sequence[int]) -> int:
    """The rank that keeps the next generated token; `filled` holds the tokens of the sequence that each rank keeps."""
    return min(range(len(filled)), key=lambda rank: (filled[rank], rank))


def capacity(
    lengths: Sequence[int], new: int, tokens: int, ranks: int, filled: Sequence[Sequence[int]] | None = None
) -> int:
    """The most tokens of one sequence that a rank keeps once `lengths` and then `new` single tokens are added to each.

    Args:
        lengths: tokens of each sequence that are filled in by chunks.
        new: single tokens of each that follow.
        tokens: of a chunk, as of `chunks`.
        ranks: P.
        filled: tokens of each sequence that each rank keeps before, [B][P]; None: none.
    """
    kept = [list(held) for held in filled or [[0] * ranks] * len(lengths)]
    for chunk in chunks(list(map(sum, kept)), lengths, tokens, ranks):
        for piece in chunk:
            for rank in range(ranks):
                kept[piece.sequence][rank] += piece.kept(rank)
    return max((max(*held, -(-(sum(held) + new) // ranks)) for held in kept), default=0)
