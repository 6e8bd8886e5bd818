"""Ranks that may use CUDA: started afresh, for a process forked from one that has touched CUDA can't."""

from collections.abc import Iterator

import pytest

from tests.pool import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    ranks = RankPool("spawn")
    yield ranks
    ranks.close()
