"""Ranks that may use CUDA, for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.gpu.ranks import GpuRanks


@pytest.fixture(scope="session")
def pool() -> Iterator[GpuRanks]:
    ranks = GpuRanks()
    yield ranks
    ranks.close()
