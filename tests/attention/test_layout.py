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
    Call,
    Chunk,
    Mask,
    TilePlan,
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
        for start, stop, first, last, band in plan.parts[0].calls:
            assert band == FULL
            for query in plan.queries[start:stop]:
                seen.update((query.position(size), key.position(size)) for key in plan.keys[first:last])
        if plan.diagonal:
            seen.update((Chunk(own, half).position(size),) * 2 for half in (LOWER, UPPER))
        if plan.own_joined:
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
    assert max(len(plan.parts[0].calls) for _, plan in tiles(grid(*shape, order), True)) <= 4
    assert {len(plan.parts[0].calls) for _, plan in tiles(grid(*shape, order), False)} == {1}


@pytest.mark.parametrize("order", ["columns", "rows", "shuffled"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_nothing_is_gathered_that_nobody_sees(shape: tuple[int, int], order: str) -> None:
    for _, plan in tiles(grid(*shape, order), True):
        assert max((call.last for call in plan.parts[0].calls), default=0) == len(plan.keys)
        assert {slot for call in plan.parts[0].calls for slot in range(call.start, call.stop)} == set(
            range(len(plan.queries))
        )


@pytest.mark.parametrize("order", ["columns", "rows", "shuffled"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_what_travels_back_comes_from_one_call(shape: tuple[int, int], order: str) -> None:
    for _, plan in tiles(grid(*shape, order), True):
        ranges = [(c.first, c.last) if shape[1] == 1 else (c.start, c.stop) for c in plan.parts[0].calls]
        covered = [slot for start, stop in ranges for slot in range(start, stop)]
        assert covered == list(range(len(plan.keys if shape[1] == 1 else plan.queries)))
        assert plan.keys_apart == (1 in shape)


@pytest.mark.parametrize("order", ["columns", "rows", "shuffled"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if 1 in s], ids=lambda s: f"{s[0]}x{s[1]}")
def test_where_one_kind_travels_the_own_chunks_are_one_sequence(shape: tuple[int, int], order: str) -> None:
    for own, plan in tiles(grid(*shape, order), True):
        assert plan.own_joined
        assert len(plan.parts[0].calls) <= 2
        travels = plan.keys if shape[1] == 1 else plan.queries
        assert own not in {chunk.rank for chunk in travels}
    assert not any(plan.own_joined for _, plan in tiles(grid(*shape, order), False))


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


@pytest.mark.parametrize("order", ["columns", "rows"])
@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (2, 2), (3, 2), (4, 4)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_slots_are_those_of_the_plan(shape: tuple[int, int], order: str) -> None:
    size = shape[0] * shape[1]
    whole = tuple(2 * size * n for n in (3, 1, 4))
    padded = (whole[0] - 1, 0, whole[2])
    masks = [Mask(band, size, (3, 1, 4), whole) for band in (FULL, CAUSAL, Band(4, 0), Band(9, 2))]
    masks += [Mask(band, size, (3, 1, 4), padded) for band in (FULL, CAUSAL, Band(4, 0))]
    for mask in masks:
        ranks = grid(*shape, order)
        for row in ranks:
            for column in zip(*ranks, strict=True):
                plan = tile_plan(tuple(row), tuple(column), mask)
                assert tile_slots(tuple(row), tuple(column), mask) == (plan.queries, plan.keys)


def test_packed_sequences_are_less_work() -> None:
    """Sequences of 1/2, 1/4 and 1/4 of the tokens: the sum of their squares of one sequence's work."""
    whole, packed = (tile_plan((0,), (0, 1), Mask(CAUSAL, 2, chunks)) for chunks in ((8,), (4, 2, 2)))
    assert whole.own_squares == 2
    assert packed.own_squares == 2 * (1 / 4 + 1 / 16 + 1 / 16)
    assert (whole.squares, packed.squares) == (4, 4 * (1 / 4 + 1 / 16 + 1 / 16))
    window = tile_plan((0, 2), (0, 1), Mask(Band(1, 0), 4, (4,)))
    assert window.own_squares == 2 * (0.5 - 0.5**2 / 2)


def test_a_row_and_a_column_share_one_rank() -> None:
    with pytest.raises(AssertionError, match="share one rank"):
        tile_plan((0, 1), (0, 1), Mask(CAUSAL))


WINDOWS = [Band(left, right) for left in (0, 1, 3, 4, 9, None) for right in (0, 2, 4, None)]


def pairs_of(plan: TilePlan, own: int, size: int) -> Counter[tuple[int, int, int]]:
    """How often (sequence, query token, key token) is attended."""
    seen: Counter[tuple[int, int, int]] = Counter()
    for number, part in enumerate(plan.parts):
        n = part.chunk
        queries = [chunk.position(size) * n + i for chunk in plan.queries for i in range(n)]
        keys = [chunk.position(size) * n + i for chunk in plan.keys for i in range(n)]
        for start, stop, first, last, band in part.calls:
            assert 0 <= start < stop <= len(queries)
            assert 0 <= first < last <= len(keys)
            assert all(side is None or side >= 0 for side in band)
            for i, row in enumerate(queries[start:stop]):
                visible = [
                    key for j, key in enumerate(keys[first:last]) if sees(band, j - i - (last - first) + (stop - start))
                ]
                assert visible, "a row without a key: kernels differ on those"
                seen.update((number, row, key) for key in visible)
        if part.diagonal is not None:
            for half in (LOWER, UPPER):
                at = Chunk(own, half).position(size) * n
                seen.update((number, at + i, at + j) for i in range(n) for j in range(n) if sees(part.diagonal, j - i))
            if plan.own_joined:
                lower, upper = (Chunk(own, half).position(size) * n for half in (LOWER, UPPER))
                seen.update((number, upper + i, lower + j) for i in range(n) for j in range(n))
    return seen


def sees(band: Band, ahead: int) -> bool:
    return (band.left is None or -band.left <= ahead) and (band.right is None or ahead <= band.right)


@pytest.mark.parametrize("lengths", [None, (13,), (24, 9), (0, 24)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 4), (4, 1), (3, 2)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_bands_and_padding_token_by_token(shape: tuple[int, int], lengths: tuple[int, ...] | None) -> None:
    size = shape[0] * shape[1]
    chunks = (3,) if lengths is None else (3, 2)[: len(lengths)]
    tokens = [2 * size * n for n in chunks]
    real = tuple(map(min, lengths or tokens, tokens))
    for band in [FULL, CAUSAL, *WINDOWS]:
        seen: Counter[tuple[int, int, int]] = Counter()
        ranks = grid(*shape, "columns")
        for row in ranks:
            for own, column in zip(row, zip(*ranks, strict=True), strict=True):
                mask = Mask(band, size, chunks, None if lengths is None else real)
                plan = tile_plan(tuple(row), tuple(column), mask)
                seen += pairs_of(plan, own, size)
                if mask.windows or mask.padded:  # all that is gathered is used
                    used = {(c.first // p.key_chunk, -(-c.last // p.key_chunk)) for p in plan.parts for c in p.calls}
                    assert {slot for first, last in used for slot in range(first, last)} == set(range(len(plan.keys)))
        expected = {
            (number, i, j)
            for number, length in enumerate(real)
            for i in range(length)
            for j in range(length)
            if sees(band, j - i)
        }
        assert set(seen) == expected, band
        assert set(seen.values()) == {1}


@pytest.mark.parametrize("window", [8, 32, 64])
def test_keys_outside_the_window_are_not_gathered(window: int) -> None:
    """64 ranks on 8 x 8, chunks of 8 tokens: a rank's work and its messages stay with the window, not the sequence."""
    ranks = grid(8, 8, "columns")
    columns = list(zip(*ranks, strict=True))
    for row in ranks:
        for column in columns:
            plan, whole = (
                tile_plan(tuple(row), tuple(column), Mask(band, 64, (8,))) for band in (Band(window - 1, 0), CAUSAL)
            )
            needed = {
                key
                for key in whole.keys
                for query in (Chunk(rank, half) for rank in row for half in (LOWER, UPPER))
                if 0 <= query.position(64) - key.position(64) <= -(-(window - 1) // 8)
            }
            assert set(plan.keys) <= needed
    parts = [
        tile_plan(tuple(row), tuple(column), Mask(Band(window - 1, 0), 64, (8,))).parts[0]
        for row in ranks
        for column in columns
    ]
    squares = [Call(0, 8, 0, 8, part.diagonal) for part in parts for _ in range(2) if part.diagonal is not None]
    total = sum(call.pairs for part in parts for call in part.calls) + sum(call.pairs for call in squares)
    tokens = 128 * 8
    visible = tokens * window - window * (window - 1) / 2
    assert total == visible
