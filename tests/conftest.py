"""Fixtures of the whole suite."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_attn2d.launch import ranks
from tests.pool import RankPool, call

LIGHT = {"commands", "config", "data", "planner", "preview", "run"}
"""Folders of tests that take seconds per file. They come last: where processes share the files out, none is left
waiting for another's long file."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(here).parts[0] in LIGHT)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Ranks shared by every test of the session."""
    shared = RankPool()
    yield shared
    shared.close()


@pytest.fixture
def in_pool(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that a command starts on this machine are the pool's processes."""

    def run_local(nprocs: int, target: Any, args: list[str], device: str) -> int:
        pool.run(call, nprocs, target, list(args), init_group=False)
        return 0

    monkeypatch.setattr(ranks, "run_local", run_local)
