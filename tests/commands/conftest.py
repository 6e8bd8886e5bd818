"""Fixtures of the tests of the command line."""

import os

import pytest


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No launcher's environment, and a scratch directory to write to."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_")) or name in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
