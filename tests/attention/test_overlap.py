"""Which heads are computed when."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_attn2d.attention.attention2d import interleave
from megatron_attn2d.attention.overlap import ALL_HEADS, SMALLEST_HALF, Heads, diagonal_heads


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ((4, 4), [Heads(slice(0, 2), slice(0, 2)), Heads(slice(2, 4), slice(2, 4))]),
        ((6, 3), [Heads(slice(0, 2), slice(0, 1)), Heads(slice(2, 6), slice(1, 3))]),
        ((4, 1), [ALL_HEADS]),
    ],
    ids=str,
)
def test_heads_are_cut_where_key_heads_are(heads: tuple[int, int], expected: list[Heads]) -> None:
    q, k = (torch.empty(2, 16384, 1, n, 128, device="meta") for n in heads)
    assert diagonal_heads(q, k, 2.0, apart=True) == expected


@pytest.mark.parametrize(
    ("tokens", "squares", "apart", "runs"),
    [(8192, 2.0, True, 2), (4096, 2.0, True, 1), (8192, 2.0, False, 1), (8192, 0.0, True, 1), (8192, 0.1, True, 1)],
)
def test_only_work_that_is_worth_a_call_is_kept_back(tokens: int, squares: float, apart: bool, runs: int) -> None:
    q = torch.empty(2, tokens, 1, 12, 128, device="meta")
    assert len(diagonal_heads(q, q, squares, apart)) == runs
    # 4 FLOP for each of two products, head dim and pair; half of them is what is kept back
    assert (2 * squares * tokens**2 * 12 * 128 >= SMALLEST_HALF) == (runs == 2 or not apart)


def test_views_of_heads() -> None:
    lower = Heads(slice(0, 2), slice(0, 1))
    x, statistic, keys = torch.randn(2, 3, 1, 4, 5), torch.randn(2, 1, 4, 3), torch.randn(2, 3, 1, 2, 5)
    assert torch.equal(lower.of(x), x[:, :, :, :2])
    assert torch.equal(lower.of(statistic), statistic[:, :, :2])
    assert torch.equal(lower.of_keys(keys), keys[:, :, :, :1])
    assert ALL_HEADS.of(x) is x
    assert Heads(slice(2, 4), slice(1, 2)).first == 2
    assert ALL_HEADS.first == 0


@pytest.mark.parametrize(
    ("groups", "order"),
    [
        (1, "gather 0, compute 0, merge 0"),
        (2, "gather 0, gather 1, compute 0, compute 1, merge 0, merge 1"),
        (3, "gather 0, gather 1, compute 0, gather 2, compute 1, merge 0, compute 2, merge 1, merge 2"),
    ],
)
def test_messages_of_the_next_group_and_the_previous_one_travel_while_one_computes(groups: int, order: str) -> None:
    done: list[str] = []

    def group(i: int) -> Iterator[None]:
        done.append(f"gather {i}")
        yield
        done.append(f"compute {i}")
        yield
        done.append(f"merge {i}")

    interleave(map(group, range(groups)))
    assert ", ".join(done) == order
