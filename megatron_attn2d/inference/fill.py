"""Known tokens into a cache, by chunks, so that memory is bounded; and what the model thinks of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_attn2d.inference import shards
from megatron_attn2d.inference.cache import Cache
from megatron_attn2d.inference.model import Model
from megatron_attn2d.inference.passes import Fill
from megatron_attn2d.inference.shards import Piece

_LOGITS = 1 << 26
"""Of which so many are looked at in fp64 at once: 512 MiB."""


class _Row(NamedTuple):
    """A row of a pass whose logits are asked for: those after token `place` of the new ones of `sequence`."""

    row: int
    sequence: int
    place: int


def fill(
    model: Model,
    cache: Cache,
    tokens: Sequence[Sequence[int]],
    chunk: int,
    first: Sequence[int] | None = None,
    size: int | None = None,
) -> list[Tensor]:
    """Adds new tokens to each sequence of `cache`, whose logits are then those after the last of them.

    Args:
        model: computes them; every rank of the replica calls.
        cache: receives their keys and values.
        tokens: of each sequence, at least one.
        chunk: of so many tokens per rank a pass is made.
        first: from which of its new tokens on each sequence is scored; None: no token is.
        size: ids that the tokenizer has, of which the likeliest is one; None: all.

    Returns:
        With `first`, for each sequence the log probability of each token that is scored and 1 where it was the
        likeliest, [n, 2] on the CPU; the same on all ranks. Else nothing.
    """
    starts, before = cache.lengths, cache.logits
    ends = [len(new) - 1 for new in tokens]
    last: list[Tensor | None] = [None] * len(tokens)
    scores = [torch.zeros(len(new), 2, dtype=torch.float64, device=model.device) for new in tokens]
    for pieces in shards.chunks(starts, list(map(len, tokens)), chunk * cache.ranks, cache.ranks):
        step = cache.begin(Fill(cache, pieces))
        held, rows = _rows(pieces, cache.rank, tokens, starts, first)
        asked = torch.tensor([row for row, _, _ in rows] or [0], device=model.device)
        logits = model.logits(cache, torch.tensor(held, device=model.device), step.positions, asked)
        cache.finish()
        if logits is None:
            continue
        followed: dict[int, list[tuple[int, int]]] = {}  # by sequence: row of the logits, place of the next token
        for i, (_, sequence, place) in enumerate(rows):
            if place == ends[sequence]:
                last[sequence] = logits[i]
            else:
                followed.setdefault(sequence, []).append((i, place + 1))
        for sequence, pairs in followed.items():
            at, places = zip(*pairs, strict=True)
            scores[sequence][list(places)] = _scored(logits, at, [tokens[sequence][place] for place in places], size)
    if model.last:
        cache.logits = model.last_logits(last)
    if first is None:
        return []
    if model.last:
        for found in scores:
            model.sum_over_context(found)
        if before is not None:  # what the text before says of the first token, on every context rank
            for found, row, new in zip(scores, before, tokens, strict=True):
                found[0] = _scored(row[None], [0], [new[0]], size)[0]
    return [model.broadcast(found)[begin:].cpu() for found, begin in zip(scores, first, strict=True)]


def _rows(
    pieces: Sequence[Piece],
    rank: int,
    tokens: Sequence[Sequence[int]],
    starts: Sequence[int],
    first: Sequence[int] | None,
) -> tuple[list[int], list[_Row]]:
    """The tokens that a rank computes in a pass, and which of its rows' logits are needed."""
    held: list[int] = []
    rows: list[_Row] = []
    for piece in pieces:
        new, begin = tokens[piece.sequence], piece.start - starts[piece.sequence]
        for row in piece.rows(rank):
            place = begin + min(row, piece.length - 1)
            ends = place == len(new) - 1
            scores = first is not None and place + 1 >= first[piece.sequence]
            if row < piece.length and (ends or scores):
                rows.append(_Row(len(held), piece.sequence, place))
            held.append(new[place])
    return held, rows


def _scored(logits: Tensor, rows: Sequence[int], targets: Sequence[int], size: int | None) -> Tensor:
    """Log probability of a target per row of logits [n, vocabulary], and 1 where it is the likeliest, [rows, 2].

    As in training, the probabilities are those of all ids; the likeliest is one of the tokenizer's `size`.
    """
    at, aimed = (torch.tensor(x, device=logits.device, dtype=torch.long) for x in (rows, targets))
    step = max(1, _LOGITS // logits.size(-1))
    found = []
    for some, wanted in zip(at.split(step), aimed.split(step), strict=True):
        part = logits[some].double()
        logprob = part.gather(-1, wanted[:, None])[:, 0] - part.logsumexp(-1)
        found.append(torch.stack((logprob, (part[:, :size].argmax(-1) == wanted).double()), -1))
    return torch.cat(found)
