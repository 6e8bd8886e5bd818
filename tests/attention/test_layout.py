"""The tile plans as properties: every visible pair exactly once, equal work, few calls, nothing needless moved."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from megatron_attn2d.attention.layout import (
    CAUSAL,
    FULL,
    LOWER,
    UPPER,
    Band,
    Chunk,
    Mask,
    tile_plan,
    tile_slots,
    visible_prefix,
)

SHAPES = [(r, c) for r in range(1, 9) for c in range(1, 9) if r * c <= 36]


def grid(rows: int, cols: int, order: str) -> list[list[int]]:
    """Context-parallel ranks [row][column]: columns contiguous, rows contiguous, or anyhow."""
    if order == "columns":
        return [[c * rows + r for c in range(cols)] for r in range(rows)]
    ranks = list(range(rows * cols))
    if order == "shuffled":
        random.Random(rows * 100 + cols).shuffle(ranks)
    return [ranks[r * cols : (r + 1) * cols] for r in range(rows)]


def tiles(ranks: list[list[int]], causal: bool):
    columns = list(zip(*ranks, strict=True))
    for row in ranks:
        for c, column in enumerate(columns):
            yield row[c], tile_plan(tuple(row), tuple(column), Mask(CAUSAL if causal else FULL))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("order", ["columns", "rows", "shuffled"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_visible_pair_is_attended_exactly_once(shape: tuple[int, int], order: str, causal: bool) -> None:
    size = shape[0] * shape[1]
    seen: Counter[tuple[int, int]] = Counter()
    for own, plan in tiles(grid(*shape, order), causal):
        for start, stop, first, last in plan.rectangles:
            for query in plan.queries[start:stop]:
                seen.update((query.position(size), key.position(size)) for key in plan.keys[first:last])
        if plan.diagonal:
            seen.update((Chunk(own, half).position(size),) * 2 for half in (LOWER, UPPER))
        if plan.diagonal_joined:
            seen[Chunk(own, UPPER).position(size), Chunk(own, LOWER).position(size)] += 1
    visible = {(i, j) for i in range(2 * size) for j in range(2 * size) if j <= i or not causal}
    assert set(seen) == visible
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("order", ["columns", "rows", "shuffled"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_tiles_have_equal_work(shape: tuple[int, int], order: str) -> None:
    size = shape[0] * shape[1]
    for causal, total in ((True, (2 * size) ** 2 / 2), (False, (2 * size) ** 2)):
        assert {plan.squares for _, plan in tiles(grid(*shape, order), causal)} == {total / size}


@pytest.mark.parametrize("order", ["columns", "rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_at_most_four_rectangles(shape: tuple[int, int], order: str) -> None:
    assert max(len(plan.rectangles) for _, plan in tiles(grid(*shape, order), True)) <= 4
    assert {len(plan.rectangles) for _, plan in tiles(grid(*shape, order), False)} == {1}


@pytest.mark.parametrize("order", ["columns", "rows", "shuffled"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_nothing_is_gathered_that_nobody_sees(shape: tuple[int, int], order: str) -> None:
    for _, plan in tiles(grid(*shape, order), True):
        seen = {slot for r in plan.rectangles for slot in range(r.first, r.last)}
        assert not plan.keys_travel or seen == set(range(len(plan.keys)))
        seeing = {slot for r in plan.rectangles for slot in range(r.start, r.stop)}
        assert not plan.queries_travel or seeing == set(range(len(plan.queries)))


@pytest.mark.parametrize("order", ["columns", "rows", "shuffled"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_what_travels_back_comes_from_one_call(shape: tuple[int, int], order: str) -> None:
    for _, plan in tiles(grid(*shape, order), True):
        assert (plan.queries_travel, plan.keys_travel) == (shape[1] > 1, shape[0] > 1)
        ranges = [(r.first, r.last) if shape[1] == 1 else (r.start, r.stop) for r in plan.rectangles]
        covered = [slot for start, stop in ranges for slot in range(start, stop)]
        assert covered == list(range(len(plan.keys if shape[1] == 1 else plan.queries)))


@pytest.mark.parametrize("order", ["columns", "rows", "shuffled"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if 1 in s], ids=lambda s: f"{s[0]}x{s[1]}")
def test_where_one_kind_travels_the_own_chunks_are_one_sequence(shape: tuple[int, int], order: str) -> None:
    for own, plan in tiles(grid(*shape, order), True):
        assert plan.diagonal_joined
        assert len(plan.rectangles) <= 2
        others = plan.keys if shape[1] == 1 else plan.queries
        assert own not in {chunk.rank for chunk in others}
    assert not any(plan.diagonal_joined for _, plan in tiles(grid(*shape, order), False))


def test_the_picture_in_the_docstring() -> None:
    plan = tile_plan((0, 2), (0, 1), Mask(CAUSAL))
    assert plan.keys == (Chunk(0, LOWER), Chunk(1, LOWER), Chunk(1, UPPER))
    assert plan.queries == (Chunk(2, LOWER), Chunk(2, UPPER), Chunk(0, UPPER))
    assert plan.rectangles == ((0, 2, 0, 2), (2, 3, 0, 3))
    assert plan.diagonal


@pytest.mark.parametrize(
    ("query", "expected"), [((1, LOWER), 1), ((1, UPPER), 2), ((0, LOWER), 0), ((0, UPPER), 3), ((3, UPPER), 2)]
)
def test_visible_prefix(query: tuple[int, int], expected: int) -> None:
    assert visible_prefix(Chunk(*query), (0, 1), True) == expected
    assert visible_prefix(Chunk(*query), (0, 1), False) == 4


@pytest.mark.parametrize("order", ["columns", "rows"])
@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (2, 2), (3, 2), (4, 4)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_slots_are_those_of_the_plan(shape: tuple[int, int], order: str) -> None:
    size = shape[0] * shape[1]
    masks = [Mask.of_one(band, size, 3) for band in (FULL, CAUSAL, Band(4, 0), Band(9, 2))]
    masks += [Mask(FULL, size, used=2 * size - 1), Mask(CAUSAL, size, used=3)]
    for mask in masks:
        ranks = grid(*shape, order)
        for row in ranks:
            for column in zip(*ranks, strict=True):
                plan = tile_plan(tuple(row), tuple(column), mask)
                assert tile_slots(tuple(row), tuple(column), mask) == (plan.queries, plan.keys)


def test_a_row_and_a_column_share_one_rank() -> None:
    with pytest.raises(AssertionError, match="share one rank"):
        tile_plan((0, 1), (0, 1), Mask(CAUSAL))


@pytest.mark.parametrize("window", [8, 9, 32, 64])
@pytest.mark.parametrize("shape", [(8, 8), (64, 1), (1, 64)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_keys_outside_the_window_are_not_gathered(shape: tuple[int, int], window: int) -> None:
    """64 ranks, chunks of 8 tokens: a rank talks to those that its window touches, however many ranks there are."""
    ranks = grid(*shape, "columns")
    reach = -(-(window - 1) // 8)
    for row in ranks:
        for column in zip(*ranks, strict=True):
            plan = tile_plan(tuple(row), tuple(column), Mask.of_one(Band(window - 1, 0), 64, 8))
            queries, keys = (
                [Chunk(rank, half) for rank in ranks for half in (LOWER, UPPER)] for ranks in (row, column)
            )
            near = [(q, k) for q in queries for k in keys if 0 < q.position(64) - k.position(64) <= reach]
            assert not plan.keys_travel or set(plan.keys) == {key for _, key in near}
            assert not plan.queries_travel or set(plan.queries) == {query for query, _ in near}


@pytest.mark.parametrize(("used", "seen"), [(3, 0), (4, 1), (5, 2), (8, 2)])
def test_queries_do_not_travel_to_keys_of_padding(used: int, seen: int) -> None:
    """Rank 3 of 4 in one row holds chunks 3 and 4."""
    plan = tile_plan((0, 1, 2, 3), (3,), Mask(FULL, 4, used=used))
    assert (len(plan.queries), len(plan.keys)) == (used if seen else 0, 2)
    assert [r.last for r in plan.rectangles] == ([seen] if seen else [])


def test_chunks_of_padding_are_not_gathered() -> None:
    plan = tile_plan((0, 2), (0, 1), Mask(CAUSAL, 4, used=6))
    assert plan.keys == (Chunk(0, LOWER), Chunk(1, LOWER))
    assert plan.queries == (Chunk(2, LOWER), Chunk(2, UPPER))
    assert plan.rectangles == ((0, 2, 0, 2),)
