"""What of a text may be shown while its tokens come, and how it reads behind its prompt."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_attn2d.config.schema import Data
from megatron_attn2d.data import tokenizers
from megatron_attn2d.data.tokenizers import TokenizerChoice
from megatron_attn2d.inference.text import TextStream, Tokenizer
from tests.data.conftest import choice

__all__ = ["choice"]


@pytest.mark.parametrize(
    ("text", "stop", "shown", "whole"),
    [
        ("abc", (), ["a", "b", "c"], "abc"),
        ("aéz", (), ["a", "", "é", "z"], "aéz"),
        ("ab\n\nc", ("\n\n",), ["a", "b", "", ""], "ab"),
        ("ab\nc", ("\n\n",), ["a", "b", "", "\nc"], "ab\nc"),
        ("abcd", ("bcd", "c"), ["a", "", "b"], "ab"),
        ("ab", ("bc",), ["a", ""], "ab"),
        ("abéz", ("bé",), ["a", "", "", ""], "a"),
    ],
)
def test_text_is_shown_as_far_as_it_is_sure(text: str, stop: tuple[str, ...], shown: list[str], whole: str) -> None:
    stream = TextStream(lambda tokens: bytes(tokens).decode(errors="replace"), stop)
    found = []
    for byte in text.encode():
        found.append(stream.add(byte))
        if stream.stopped:
            break
    assert found == shown
    assert stream.text == whole
    assert "".join(found) + stream.rest() == whole


def test_a_text_that_goes_on_has_no_token_that_begins_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Llama's tokenizer puts one before every text."""
    library = SimpleNamespace(eod=9, vocab_size=300, encode=lambda text: np.array([8, *text.encode(), 9]))
    monkeypatch.setattr(tokenizers, "load", lambda choice: library)
    tokenizer = Tokenizer(Data(vocab_size=512, null_tokenizer_eod_id=256))
    assert tokenizer.encode("ab") == [8, 97, 98]
    assert tokenizer.encode("ab", begins=False) == [97, 98]


def test_a_token_is_decoded_after_the_one_before_it() -> None:
    """As some tokenizers write a space before a token that is not the first."""
    stream = TextStream(lambda tokens: " ".join(map(str, tokens)), ("4 5",))
    assert [stream.add(token) for token in (1, 22, 3, 4, 5)] == ["1", " 22", " 3", " ", ""]
    assert stream.stopped
    assert stream.text == "1 22 3 "


def test_a_completion_reads_as_it_does_behind_its_prompt(choice: TokenizerChoice) -> None:
    """Wherever the prompt ends, in the middle of a word or of a character too."""
    tokenizer = Tokenizer(Data(**tokenizers.yaml_section(choice)))
    text = "Two keys  by 3 ✓ größer.\n Ring attention"
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    for place in range(1, len(tokens)):
        stream = TextStream(tokenizer.decode, (), tokens[:place])
        shown = "".join(map(stream.add, tokens[place:])) + stream.rest()
        prompt = tokenizer.decode(tokens[:place]).rstrip("\ufffd")
        assert prompt + stream.text == text
        assert shown == stream.text


@pytest.mark.parametrize("second", [" by ranks", "s of ✓", "\n\nQuestion: 3", "."])
def test_a_text_that_goes_on_is_encoded_as_in_the_middle(second: str, choice: TokenizerChoice) -> None:
    tokenizer = Tokenizer(Data(**tokenizers.yaml_section(choice)))
    first = tokenizer.encode("every key")
    assert tokenizer.decode(first + tokenizer.encode(second, begins=False)) == "every key" + second
