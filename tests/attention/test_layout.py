"""The tile plans as properties: every visible pair exactly once, equal work, few calls, nothing needless moved."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from megatron_attn2d.attention.layout import CAUSAL, FULL, LOWER, UPPER, Chunk, Mask, tile_plan, visible_prefix

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
        for start, stop, first, keys, band in plan.parts[0].calls:
            assert (first, band) == (0, FULL)
            for query in plan.queries[start:stop]:
                seen.update((query.position(size), key.position(size)) for key in plan.keys[:keys])
        if plan.diagonal:
            seen.update((Chunk(own, half).position(size),) * 2 for half in (LOWER, UPPER))
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
    assert max(len(plan.parts[0].calls) for _, plan in tiles(grid(*shape, order), True)) <= 4
    assert {len(plan.parts[0].calls) for _, plan in tiles(grid(*shape, order), False)} == {1}


@pytest.mark.parametrize("order", ["columns", "rows", "shuffled"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_nothing_is_gathered_that_nobody_sees(shape: tuple[int, int], order: str) -> None:
    for _, plan in tiles(grid(*shape, order), True):
        assert max(call.last for call in plan.parts[0].calls) == len(plan.keys)
        covered = [slot for call in plan.parts[0].calls for slot in range(call.start, call.stop)]
        assert covered == list(range(len(plan.queries)))


def test_the_picture_in_the_docstring() -> None:
    plan = tile_plan((0, 2), (0, 1), Mask(CAUSAL))
    assert plan.keys == (Chunk(0, LOWER), Chunk(1, LOWER), Chunk(1, UPPER))
    assert plan.queries == (Chunk(2, LOWER), Chunk(2, UPPER), Chunk(0, UPPER))
    assert [call[:4] for call in plan.parts[0].calls] == [(0, 2, 0, 2), (2, 3, 0, 3)]
    assert plan.diagonal


@pytest.mark.parametrize(
    ("query", "expected"), [((1, LOWER), 1), ((1, UPPER), 2), ((0, LOWER), 0), ((0, UPPER), 3), ((3, UPPER), 2)]
)
def test_visible_prefix(query: tuple[int, int], expected: int) -> None:
    assert visible_prefix(Chunk(*query), (0, 1), True) == expected
    assert visible_prefix(Chunk(*query), (0, 1), False) == 4


def test_a_row_and_a_column_share_one_rank() -> None:
    with pytest.raises(AssertionError, match="share one rank"):
        tile_plan((0, 1), (0, 1), Mask(CAUSAL))
