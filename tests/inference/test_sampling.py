"""Which token is drawn, and what of a text may be shown."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_attn2d.config.schema import Data
from megatron_attn2d.data import tokenizers
from megatron_attn2d.inference.sampling import Sampling, choose, generators_of
from megatron_attn2d.inference.text import TextStream, Tokenizer

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
CPU = torch.device("cpu")


def drawn(sampling: Sampling, draws: int = 4000) -> Counter[int]:
    (generator,) = generators_of(sampling, [0], CPU)
    return Counter(int(choose(LOGITS[None], sampling, [generator])) for _ in range(draws))


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(), [1.0]),
        (Sampling(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (Sampling(temperature=1.0, top_k=2), [0.625, 0.375]),
        (Sampling(temperature=1.0, top_p=0.75), [0.625, 0.375]),
        (Sampling(temperature=1.0, top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95]),
        (Sampling(temperature=1.0, top_p=0.01), [1.0]),
        (Sampling(temperature=1.0, top_k=9), [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_tokens_are_drawn_by_their_shares(sampling: Sampling, shares: list[float]) -> None:
    counts = drawn(sampling)
    assert set(counts) == set(range(len(shares)))
    for token, share in enumerate(shares):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)


def test_of_equally_likely_tokens_no_more_than_top_k_are_drawn() -> None:
    sampling = Sampling(temperature=1.0, top_k=2)
    (generator,) = generators_of(sampling, [0], CPU)
    assert len({int(choose(torch.zeros(1, 9), sampling, [generator])) for _ in range(100)}) == 2


def test_a_prompt_draws_the_same_wherever_it_stands_in_a_batch() -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    logits = LOGITS.expand(3, -1)
    together, alone = generators_of(sampling, [0, 7, 9], CPU), generators_of(sampling, [7], CPU)
    rows = [choose(logits, sampling, together)[1] for _ in range(20)]
    assert rows == [choose(logits[:1], sampling, alone)[0] for _ in range(20)]
    assert rows != [choose(logits[:1], sampling, generators_of(sampling, [8], CPU))[0] for _ in range(20)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens 0: choose 1 or more"),
        ({"temperature": -1.0}, "temperature -1.0: choose 0"),
        ({"top_p": 0.0}, "top_p 0.0: choose more than 0, up to 1"),
        ({"top_k": -1}, "top_k -1: choose 0"),
        ({"stop": ("",)}, "stop '': an empty text would end"),
    ],
)
def test_values_out_of_range_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Sampling(**wrong)


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
