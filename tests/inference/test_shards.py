"""How tokens are spread over ranks, by counting them."""

import random

import pytest

from megatron_attn2d.inference import shards
from megatron_attn2d.inference.shards import Piece


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 5, 16, 37])
def test_a_piece_is_computed_once_and_kept_once(length: int, ranks: int) -> None:
    piece = Piece(0, 100, length, ranks)
    computed = [row for rank in range(ranks) for row in piece.rows(rank)]
    kept = [first + i for rank in range(ranks) for first, number in piece.spans(rank) for i in range(number)]
    assert sorted(computed) == list(range(piece.padded))
    assert sorted(kept) == list(range(length))
    assert [piece.kept(rank) for rank in range(ranks)] == [
        sum(row < length for row in piece.rows(rank)) for rank in range(ranks)
    ]
    for token in range(length):
        rank, row = piece.place(token)
        assert piece.rows(rank)[row] == token


def test_chunks_hold_all_tokens_and_no_more_than_they_may() -> None:
    draw = random.Random(0)
    for _ in range(50):
        ranks, tokens = draw.choice([1, 2, 4]), draw.randint(1, 40)
        starts = [draw.choice([0, 7]) for _ in range(draw.randint(1, 4))]
        lengths = [draw.randint(1, 60) for _ in starts]
        found: list[list[int]] = [[] for _ in starts]
        for chunk in shards.chunks(starts, lengths, tokens, ranks):
            assert chunk
            assert sum(piece.padded for piece in chunk) <= max(tokens, 2 * ranks)
            assert len({piece.sequence for piece in chunk}) == len(chunk)
            for piece in chunk:
                found[piece.sequence] += range(piece.start, piece.start + piece.length)
        assert found == [list(range(s, s + n)) for s, n in zip(starts, lengths, strict=True)]


def test_new_tokens_go_to_the_least_full_rank() -> None:
    filled = [3, 1, 1]
    owners = []
    for _ in range(7):
        owners.append(shards.owner(filled))
        filled[owners[-1]] += 1
    assert owners == [1, 2, 1, 2, 0, 1, 2]


def test_capacity_is_what_the_fullest_rank_needs() -> None:
    assert shards.capacity([12], 3, 8, 2) == 8  # 6 and 6 of the prompt, and one of them gets two of three
    assert shards.capacity([1, 5], 0, 8, 4) == 2
    assert shards.capacity([1], 100, 8, 4) == 26
    assert shards.capacity([1000], 0, 64, 1) == 1000
    assert shards.capacity([4], 3, 8, 2, [[6, 2]]) == 8  # two more each, and the three go to the emptier rank
