"""YAML 1.2, in and out."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_attn2d.config import ConfigError
from megatron_attn2d.config.yaml_io import dump, parse
from tests.config.base import unhurried


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E3", 1500.0),
        ("-.5", -0.5),
        (".inf", float("inf")),
        ("no", "no"),
        ("on", "on"),
        ("010", 10),
        ("0x10", 16),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'4'", "4"),
        ("True", True),
        ("~", None),
        ("", None),
        ("1.2.3", "1.2.3"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    assert parse(text, "test") == value
    assert type(parse(text, "test")) is type(value)


scalars = st.none() | st.booleans() | st.integers(-(10**29), 10**29) | st.floats(allow_nan=False) | st.text()


trees = st.recursive(scalars, lambda sub: st.lists(sub) | st.dictionaries(st.text(), sub), max_leaves=10)


@unhurried
@given(st.dictionaries(st.text(), trees))
def test_what_is_dumped_reads_back(content):
    assert parse(dump(content), "test") == content


@unhurried
@given(st.text() | st.text(alphabet="{}[]:,-#&*!|>'\"%@` \n\tab.=1"))
def test_any_text_is_parsed_or_refused(text):
    with contextlib.suppress(ConfigError):  # any other exception fails the test
        parse(text, "test")
