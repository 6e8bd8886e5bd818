"""Fixtures of the tests of launches."""

import os

import pytest

from tests.launch.cluster import Cluster


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
            monkeypatch.delenv(name)
    stubs = Cluster(tmp_path)
    for name, value in stubs.environ.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return stubs
