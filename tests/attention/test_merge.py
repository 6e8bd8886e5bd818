"""Merging by log-sum-exp against one softmax in float64, empty rows and extreme log-sum-exps included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_attn2d.attention.merge import merge_partials, sum_partials


def softmax_parts(scores: Tensor, values: Tensor, cuts: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Partial outputs [n, b, h, d] and log-sum-exps [b, h, n] over slices of the keys; NaN output for empty rows."""
    outs, lses = [], []
    for part, vals in zip(scores.tensor_split(cuts, -1), values.tensor_split(cuts, 0), strict=True):
        lses.append(part.logsumexp(-1))
        outs.append(torch.einsum("bhnk,kd->nbhd", part.softmax(-1), vals))
    return outs, lses


@pytest.mark.parametrize("cuts", [[], [5], [1, 2, 9], [0, 16]])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_merge_is_one_softmax(cuts: list[int], offset: float) -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 7, 16, dtype=torch.float64) * 5 + offset
    values = torch.randn(16, 4, dtype=torch.float64)
    outs, lses = softmax_parts(scores, values, cuts)
    out, lse = torch.empty(7, 2, 3, 4, dtype=torch.float64), torch.empty(2, 3, 7, dtype=torch.float64)
    merge_partials([outs], [lses], [out], [lse])
    torch.testing.assert_close(out, torch.einsum("bhnk,kd->nbhd", scores.softmax(-1), values), rtol=0, atol=1e-11)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-14, atol=1e-12)


def test_log_sum_exps_far_apart_do_not_overflow() -> None:
    outs = [torch.full((1, 1, 1, 2), value) for value in (1.0, 2.0, 3.0)]
    lses = [torch.full((1, 1, 1), value) for value in (1e4, -1e4, 0.0)]
    out, lse = torch.empty(1, 1, 1, 2), torch.empty(1, 1, 1)
    merge_partials([outs], [lses], [out], [lse])
    assert out.tolist() == [[[[1.0, 1.0]]]]
    assert lse.item() == 1e4


@pytest.mark.parametrize("rubbish", [0.0, float("nan"), float("inf")])
def test_rows_without_keys_contribute_nothing(rubbish: float) -> None:
    """Rows: empty in the first part, in the second, in both. What a kernel left in an empty row does not matter."""
    first, second = torch.tensor([rubbish, 2.0, rubbish]), torch.tensor([1.0, rubbish, rubbish])
    lses = [torch.tensor([-torch.inf, 0.5, -torch.inf]), torch.tensor([0.25, -torch.inf, -torch.inf])]
    out, lse = torch.empty(3, 1, 1, 1), torch.empty(1, 1, 3)
    parts = [first.view(3, 1, 1, 1), second.view(3, 1, 1, 1)]
    merge_partials([parts], [[x.view(1, 1, 3) for x in lses]], [out], [lse])
    assert out.flatten().tolist() == [1.0, 2.0, 0.0]
    assert lse.flatten().tolist() == [0.25, 0.5, -torch.inf]


def test_non_finite_values_of_seen_rows_are_not_laundered() -> None:
    outs = [torch.full((1, 1, 1, 1), float("nan")), torch.ones(1, 1, 1, 1)]
    lses = [torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)]
    out, lse = torch.empty(1, 1, 1, 1), torch.empty(1, 1, 1)
    merge_partials([outs], [lses], [out], [lse])
    assert out.isnan().all()


def test_a_nan_log_sum_exp_is_not_laundered() -> None:
    outs, lses = [torch.ones(1, 1, 1, 1)] * 2, [torch.full((1, 1, 1), float("nan")), torch.zeros(1, 1, 1)]
    out, lse = torch.empty(1, 1, 1, 1), torch.empty(1, 1, 1)
    merge_partials([outs], [lses], [out], [lse])
    assert out.isnan().all()
    assert lse.isnan().all()


def test_half_precision_is_summed_in_fp32_and_rounded_once() -> None:
    partials = [torch.full((1, 1, 1, 1), 256.0, dtype=torch.bfloat16)] + [
        torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    ] * 8
    total = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16)
    sum_partials([partials], [total])  # in bfloat16 each 256 + 1 would round back to 256
    assert total.item() == 264.0
