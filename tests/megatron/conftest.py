"""Fixtures of the tests that train."""

from pathlib import Path

import pytest

from megatron_attn2d import data, launch
from tests import pool as rank_pool

rank_pool.PRELOAD.extend(module for module in launch.PRELOAD if module not in rank_pool.PRELOAD)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of some of the standard library's sources."""
    return data.build(data.standard_library_sources()[:20], tmp_path_factory.mktemp("text") / "text")
