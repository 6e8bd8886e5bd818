from fractions import Fraction

import pytest

from megatron_attn2d.planner import best_grid, communication_cost, factorisations


@pytest.mark.parametrize(
    ("size", "queries_per_kv_head", "grid"),
    [
        (1, 1, (1, 1)),
        (4, 1, (2, 2)),
        (16, 1, (4, 4)),
        (64, 1, (8, 8)),
        (64, 8, (16, 4)),
        (16, 16, (16, 1)),  # few K/V heads: gathering them alone is cheapest
        (2, 1, (1, 2)),  # 5 units for a second column, 6 for a second row
        (7, 1, (1, 7)),
        (7, 8, (7, 1)),
        (60, 6, (20, 3)),  # as cheap as 15 x 4
    ],
)
def test_best_grid(size, queries_per_kv_head, grid):
    assert best_grid(size, queries_per_kv_head) == grid


def test_no_factorisation_is_cheaper_and_of_equal_ones_the_fewest_columns_win():
    for size in range(1, 200):
        for g in (1, 2, 3, 4, 6, 8, 12, 16):
            exact = {grid: 5 * (grid[1] - 1) + Fraction(6 * (grid[0] - 1), g) for grid in factorisations(size)}
            cheapest = [grid for grid, cost in exact.items() if cost == min(exact.values())]
            assert best_grid(size, g) == min(cheapest, key=lambda grid: grid[1])


def test_cost_is_the_sum_of_forward_and_backward():
    rows, columns, g = 16, 4, 8
    forward = 2 * (columns - 1) + 2 * (rows - 1) / g
    backward = 3 * (columns - 1) + 4 * (rows - 1) / g
    assert communication_cost(rows, columns, g) == pytest.approx(forward + backward)


def test_factorisations_are_all_and_only_the_pairs():
    assert factorisations(12) == [(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]


@pytest.mark.parametrize(("size", "g"), [(0, 1), (-4, 1), (4, 0)])
def test_refuses_what_is_no_size(size, g):
    with pytest.raises(ValueError, match=f"size {size} and queries_per_kv_head {g} must be at least 1"):
        best_grid(size, g)
