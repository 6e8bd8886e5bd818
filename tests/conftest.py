"""Fixtures of the whole suite."""

from collections.abc import Iterator

import pytest

from tests.pool import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Ranks shared by every test of the session."""
    ranks = RankPool()
    yield ranks
    ranks.close()
