"""The examples train, with context parallelism as without. Megatron-Bridge's runs in tests/gpu/test_bridge.py."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.pool import RankPool

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def device_mesh(rank: int, rows: int, cols: int, steps: int) -> list[float]:
    losses: list[float] = runpy.run_path(str(EXAMPLES / "device_mesh.py"))["train"](rows, cols, steps)
    return losses


@pytest.fixture(scope="module")
def without(pool: RankPool) -> list[float]:
    """Losses of four replicas without context parallelism."""
    return pool.run(device_mesh, 4, 1, 1, 12)[0]


@pytest.mark.parametrize(("rows", "cols"), [(1, 4), (4, 1), (2, 1)])
def test_device_mesh_trains_as_without_context_parallelism(
    pool: RankPool, without: list[float], rows: int, cols: int
) -> None:
    for losses in pool.run(device_mesh, 4, rows, cols, 12):
        assert losses == pytest.approx(without, abs=1e-5)


def test_device_mesh_learns_and_begins_as_without_context_parallelism(pool: RankPool, without: list[float]) -> None:
    for losses in pool.run(device_mesh, 4, 2, 2, 70):
        assert losses[:12] == pytest.approx(without, abs=1e-5)
        assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("path", EXAMPLES.glob("*.py"), ids=lambda path: path.stem)
def test_it_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 120
