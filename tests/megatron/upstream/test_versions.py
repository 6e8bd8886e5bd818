"""What differs between minor versions of Megatron-Core is named where none is known."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from megatron_attn2d.megatron import refusals
from megatron_attn2d.megatron.upstream import versions
from megatron_attn2d.megatron.upstream.patching import UpstreamChangedError


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """The version is looked up anew in each test, and after the last."""
    versions.minor.cache_clear()
    yield
    versions.minor.cache_clear()


@pytest.mark.parametrize(("installed", "found"), [("0.19.2", 19), ("0.20.0rc1", 20), ("0.20.1", 20)])
def test_the_function_of_the_installed_version(installed: str, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: installed)
    assert versions.of_this_version("count", {"0.19": 19, "0.20": 20}) == found


def test_a_version_without_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.21.0")
    message = r"Megatron-Core 0.21: no way is known to count; install one of 0.19, 0.20 \(docs/next_versions.md\)"
    with pytest.raises(UpstreamChangedError, match=message):
        versions.of_this_version("count", {"0.19": 19, "0.20": 20})


def test_another_layout_of_tokens_than_the_zigzag_is_refused() -> None:
    """A field of 0.20: with `contiguous` each rank would mask by positions that its tokens do not have."""
    refusals.check_model(SimpleNamespace(attention_cp_layout="zigzag"))
    message = r"attention_cp_layout contiguous is not supported .* choose zigzag"
    with pytest.raises(ValueError, match=message):
        refusals.check_model(SimpleNamespace(attention_cp_layout="contiguous"))
