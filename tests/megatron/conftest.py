"""Fixtures of the tests that train."""

from pathlib import Path

import pytest

from megatron_attn2d import data, launch
from tests import pool as rank_pool
from tests.megatron import runs
from tests.pool import RankPool

rank_pool.PRELOAD.extend(module for module in launch.PRELOAD if module not in rank_pool.PRELOAD)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of some of the standard library's sources."""
    return data.build(data.standard_library_sources()[:20], tmp_path_factory.mktemp("text") / "text")


@pytest.fixture(scope="session")
def start(pool: RankPool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after one step on one rank: weights drawn afresh depend on the tensor and pipeline ranks."""
    directory = tmp_path_factory.mktemp("start")
    runs.train(pool, 1, directory / "run", data_path=text, exit_interval=1, save=directory / "checkpoint")
    return directory / "checkpoint"
