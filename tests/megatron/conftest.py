"""Fixtures of the tests that train."""

from pathlib import Path

import pytest

from megatron_attn2d.data import indexed
from megatron_attn2d.launch import ranks
from tests import pool as rank_pool

rank_pool.PRELOAD.extend(module for module in ranks.PRELOAD if module not in rank_pool.PRELOAD)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of some of the standard library's sources."""
    return indexed.build(indexed.standard_library_sources()[:20], tmp_path_factory.mktemp("text") / "text")
