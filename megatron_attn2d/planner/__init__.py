"""Chooses the grid of context-parallel ranks by the bytes that attention sends."""


def communication_cost(rows: int, columns: int, queries_per_kv_head: int = 1) -> float:
    """The amount that a rank receives in a layer's forward and backward pass, in units of its own shard of Q.

    Queries and partial outputs cross a row, 2(C-1) forward and 3(C-1) backward; keys and values cross a column,
    2(R-1)/g forward and 4(R-1)/g backward, g being `queries_per_kv_head`.
    """
    return 5 * (columns - 1) + 6 * (rows - 1) / queries_per_kv_head


def factorisations(size: int) -> list[tuple[int, int]]:
    """Every (rows, columns) with rows * columns == size, fewest columns first."""
    return [(size // columns, columns) for columns in range(1, size + 1) if size % columns == 0]


def best_grid(size: int, queries_per_kv_head: int = 1, tile: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """The (rows, columns) of `size` ranks with the least communication, of those that `tile` fills if there are any.

    Of two equal grids the one with fewer columns is chosen: the gathered queries and their partial outputs, N/R tokens
    each, then take less memory.

    Raises:
        ValueError: `size` or `queries_per_kv_head` is less than 1.
    """
    if size < 1 or queries_per_kv_head < 1:
        raise ValueError(f"size {size} and queries_per_kv_head {queries_per_kv_head} must be at least 1")
    grids = factorisations(size)
    filled = [grid for grid in grids if not (grid[0] % tile[0] or grid[1] % tile[1])]
    # In integers (times g), so that equal costs compare equal; min() keeps the first of them.
    return min(filled or grids, key=lambda grid: 5 * grid[1] * queries_per_kv_head + 6 * grid[0])
