"""Fixtures of the tests that generate."""

from tests.megatron.conftest import text

__all__ = ["text"]
