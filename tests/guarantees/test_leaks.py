"""What a grid makes is gone when its groups are destroyed; the drill builds a thousand, `gpu/test_leaks.py` on GPUs."""

from tests.guarantees.drill import build_grids
from tests.pool import RankPool


def test_grids_leave_nothing_behind(pool: RankPool) -> None:
    for groups, handles, threads, memory in pool.run(build_grids, 4, 40):
        assert (groups, max(handles, 0), max(threads, 0)) == (0, 0, 0)
        assert memory < 8


def test_grids_that_are_not_destroyed_are_found(pool: RankPool) -> None:
    for groups, handles, threads, _ in pool.run(build_grids, 4, 5, destroys=False):
        assert groups == 10  # a row and a column each
        assert min(handles, threads) > 0
