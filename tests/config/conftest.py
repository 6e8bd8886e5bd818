"""Fixtures of the tests of the configuration."""

import pytest

from tests.config.base import BASE


@pytest.fixture
def base(tmp_path):
    """A file that holds `BASE`."""
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path
