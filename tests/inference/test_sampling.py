"""Which token is drawn."""

from collections import Counter

import pytest
import torch

from megatron_attn2d.inference.sampling import Sampling, choose, generators_of

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
