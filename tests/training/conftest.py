"""Tests of training take the fixtures of the tests that train, and their ranks the same imports."""

from tests.megatron.conftest import text

__all__ = ["text"]
