"""The mask of dropout: its rate, that nothing but the position decides, and that it looks random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention.dropout import Dropout, KeepMask


def alone_on_a_grid(*shards: Tensor, **how: Any) -> Tensor:
    return attention2d(*shards, Grid.single(), **how)


def alone_on_a_ring(*shards: Tensor, **how: Any) -> Tensor:
    return ring_attention(*shards, None, **how)


def kept(p: float, seed: int = 5, first_head: int = 0, batch: int = 2, heads: int = 4, tokens: int = 128) -> Tensor:
    """Kept probabilities of a whole sequence, [b, h, s, s]."""
    positions = torch.arange(tokens).expand(batch, -1)
    mask = Dropout(p, seed, first_head).at(torch.arange(batch), heads, positions, positions)
    return mask.factors(torch.float64) != 0


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_the_rate_and_the_expectation(p: float) -> None:
    found = kept(p).double()
    # 5 standard deviations of the mean of 131072 draws; the same of each head, row and column
    assert abs(found.mean().item() - (1 - p)) <= 5 * (p * (1 - p) / found.numel()) ** 0.5
    for dims, draws in (
        ((0, 2, 3), 2 * 128 * 128),
        ((0, 1, 3), 8 * 128),
        ((0, 1, 2), 8 * 128),
        ((1, 2, 3), 4 * 128**2),
    ):
        assert (found.mean(dims) - (1 - p)).abs().max().item() <= 5 * (p * (1 - p) / draws) ** 0.5
    positions = torch.arange(128).expand(2, -1)
    factors = Dropout(p, 5).at(torch.arange(2), 4, positions, positions).factors(torch.float64)
    assert set(factors.unique().tolist()) <= {0.0, 1 / (1 - p)}


@pytest.mark.parametrize("shift", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 1, 1)])
def test_neighbours_are_independent(shift: tuple[int, ...]) -> None:
    found = kept(0.5).double() * 2 - 1
    pairs = found * found.roll(shift, (0, 1, 2, 3))
    assert abs(pairs.mean().item()) <= 5 / found.numel() ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_all_pairs_of_rows_and_of_keys_are_independent(p: float) -> None:
    """Also of two heads; each pair of rows has 1024 keys in common, whose products are a normal number's sample."""
    found = (kept(p, batch=1, heads=2, tokens=1024)[0].float() - (1 - p)) / (p * (1 - p)) ** 0.5
    for lines in (found[0], found[0].t(), found[:, :512].flatten(0, 1)):
        products = (lines @ lines.t() / 32)[torch.triu_indices(1024, 1024, 1).unbind()]
        assert products.abs().max().item() < 8  # of half a million; those of p = 0.1 are not quite normal
        # A normal number's fourth moment is 3; one pair in a thousand that agrees everywhere would add 1000.
        assert abs(products.square().mean().item() - 1) < 0.02
        assert abs(products.pow(4).mean().item() - 3) < 0.2


@pytest.mark.parametrize("bits", [1 << 31, 1 << 30, 1 << 16, 1 << 15, 1, 0x80008000, 0xFFFF0000])
def test_keys_whose_words_are_alike_are_independent(bits: int) -> None:
    """Two words of keys are so alike once in 2^32 pairs; then too no row must tell."""
    rows, two = torch.arange(1 << 16), torch.arange(2)
    mask = Dropout(0.5, 7).at(two[:1], 1, rows[None], two[None])
    words = torch.tensor([0x12345678, 0x12345678 ^ bits]).to(torch.int32)
    with mock.patch.object(KeepMask, "key_words", return_value=words[None]):
        signs = mask.factors(torch.float32)[0, 0] - 1
    assert abs(signs.prod(1).mean().item()) <= 5 / len(rows) ** 0.5


def test_rectangles_show_nothing_of_the_sums_of_words() -> None:
    """Four scores of two rows and two keys, between which sums and differences of words cancel."""
    found = kept(0.5, batch=1, heads=4, tokens=512)[0].float() * 2 - 1
    for shift in (1, 2, 64, 255):
        rows = found * found.roll(shift, 1)
        corners = rows * rows.roll(shift, 2)
        assert abs(corners.mean().item()) <= 5 / corners.numel() ** 0.5


def test_no_two_keys_share_a_word() -> None:
    keys = torch.arange(1 << 18)[None]
    words = Dropout(0.1, 3).at(torch.zeros(1, dtype=torch.int64), 1, keys[:, :1], keys).key_words()
    assert words.unique().numel() == keys.numel()


def test_another_seed_is_another_mask() -> None:
    first, *others = [kept(0.5, seed=seed).double() * 2 - 1 for seed in (1, 2, 2**62 - 1)]
    for other in others:
        assert abs((first * other).mean().item()) <= 5 / first.numel() ** 0.5


def test_heads_of_a_tensor_parallel_rank_are_those_of_the_layer() -> None:
    whole = kept(0.3, heads=8)
    for rank in (0, 1):
        assert torch.equal(kept(0.3, first_head=4 * rank, heads=4), whole[:, 4 * rank : 4 * rank + 4])


def test_a_block_is_cut_from_the_mask_of_the_whole() -> None:
    whole, rows, keys = kept(0.3), torch.tensor([[3, 9, 100]] * 2), torch.tensor([[0, 64]] * 2)
    block = Dropout(0.3, torch.tensor([5])).at(torch.arange(2), 4, rows, keys).factors(torch.float32) != 0
    assert torch.equal(block, whole[:, :, rows[0]][..., keys[0]])


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_a_rate_that_is_none_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="is no probability below 1: choose 0 <= p < 1"):
        Dropout(p, 1)


@pytest.mark.parametrize("attend", [alone_on_a_grid, alone_on_a_ring])
def test_a_seed_that_changes_after_the_call_changes_no_gradient(attend: Callable[..., Tensor]) -> None:
    """As where one tensor counts up from call to call, which a CUDA graph wants."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(8, 1, 2, 8, requires_grad=True) for _ in range(3))
    found = []
    for step in (0, 1):
        seed = torch.tensor([5])
        out = attend(q, k, v, dropout=Dropout(0.5, seed))
        seed.add_(step)
        found.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for unchanged, changed in zip(*found, strict=True):
        assert torch.equal(unchanged, changed)


def test_a_rate_of_zero_asks_for_no_dropout() -> None:
    q = torch.zeros(8, 1, 2, 8)
    with mock.patch.object(Dropout, "at", side_effect=AssertionError("a mask was made")):
        attention2d(q, q, q, Grid.single(), dropout=Dropout(0.0, 1))
