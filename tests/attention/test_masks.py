"""Windows, sinks, dropout, packed sequences and keys of another sequence, on every grid and the ring, against dense."""

from __future__ import annotations

from itertools import accumulate
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention import overlap
from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.packing import Packing
from tests.attention.dense import dense_gradients, inputs, packed_gradients, packed_zigzag, zigzag
from tests.pool import RankPool

type Layout = tuple[int, int, int] | None
"""U, R and C of a grid, or a ring."""

LAYOUTS: list[tuple[int, Layout]] = [
    (1, (1, 1, 1)),
    (2, (2, 1, 1)),
    (4, (1, 2, 2)),
    (4, (2, 1, 2)),
    (6, (1, 2, 3)),
    (4, None),
]  # every grid is in test_support
on_every_layout = pytest.mark.parametrize(
    ("size", "layout"), LAYOUTS, ids=lambda x: "ring" if x is None else "x".join(map(str, x)) if type(x) is tuple else x
)


def run(layout: Layout, shards: list[Tensor], **call: Any) -> tuple[Tensor, int]:
    """Output of this rank and its context-parallel rank."""
    group = dist.group.WORLD
    assert group is not None
    if layout is None:
        call.pop("overlap_groups", None)
        return ring_attention(*shards, group, **call), dist.get_rank()
    grid = Grid.from_group(group, ulysses_size=layout[0], rows=layout[1], cols=layout[2])
    return attention2d(*shards, grid, **call), grid.context_rank


def each_both_ways(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case in head groups, and with half of the heads' own chunks attended after the tile."""
    return [*cases, *({**case, "kept_back": True} for case in cases)]


def kept_back(case: dict[str, Any]) -> Any:
    """However few the tokens, where a case asks for it."""
    return mock.patch.object(overlap, "SMALLEST_HALF", 0.0 if case.get("kept_back") else overlap.SMALLEST_HALF)


def worst(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    return max((a.double() - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def dropped(case: dict[str, Any], batch: int, tokens: int) -> tuple[Dropout | None, Tensor | None]:
    """Dropout of a case, and what it multiplies probabilities by, [b, h, s, s]."""
    if "dropout" not in case:
        return None, None
    dropout, positions = Dropout(case["dropout"], seed=11), torch.arange(tokens).expand(batch, -1)
    return dropout, dropout.at(torch.arange(batch), 4, positions, positions).factors(torch.float64)


def masked(rank: int, layout: Layout, cases: list[dict[str, Any]], chunk: int = 3) -> list[float]:
    """Largest error of output and gradients for each case, windows in tokens of chunks of three."""
    size = dist.get_world_size()
    errors = []
    for case in cases:
        causal, window = case.get("causal", True), case.get("window", (-1, -1))
        whole = inputs(2 * size * chunk, 2, (4, 2), dims=(8, 6))
        sink = torch.linspace(-2, 2, 4, dtype=torch.float64) if case.get("sink") else None
        dropout, factors = dropped(case, batch=2, tokens=2 * size * chunk)
        mine = zigzag(2 * size * chunk, size, rank)
        shards = [x[mine].requires_grad_() for x in whole[:3]]
        leaves = [*shards, *(() if sink is None else (sink.clone().requires_grad_(),))]
        with kept_back(case):
            out, context_rank = run(
                layout,
                shards,
                causal=causal,
                window=window,
                sink=None if sink is None else leaves[3],
                dropout=dropout,
                overlap_groups=1 if case.get("kept_back") else 2,
            )
            gradients = list(torch.autograd.grad(out, leaves, whole[3][mine]))
        assert context_rank == rank
        expected = dense_gradients(*whole, causal, window, sink, factors)
        if sink is not None:
            dist.all_reduce(gradients[3])  # each rank has the part of its rows, as of any parameter
        errors.append(worst((out, *gradients), (*(x[mine] for x in expected[:4]), *expected[4:])))
    return errors


WINDOWS = [{"window": (left, 0)} for left in (0, 1, 2, 3, 5, 6, 7, 11)] + [
    {"window": (left, right), "causal": False}
    for left, right in [(0, 0), (2, 2), (5, 1), (3, 4), (7, 0), (0, 7), (-1, 2), (4, -1), (200, 200)]
]


@on_every_layout
def test_windows(pool: RankPool, size: int, layout: Layout) -> None:
    for found in pool.run(masked, size, layout, each_both_ways(WINDOWS)):
        assert max(found) <= 1e-12, dict(zip(map(str, each_both_ways(WINDOWS)), found, strict=True))


OTHERS: list[dict[str, Any]] = [
    {},
    {"sink": True},
    {"sink": True, "causal": False},
    {"sink": True, "window": (4, 0)},
    {"dropout": 0.3},
    {"dropout": 0.3, "causal": False},
    {"dropout": 0.3, "window": (4, 0), "sink": True},
]


@on_every_layout
def test_sinks_and_dropout(pool: RankPool, size: int, layout: Layout) -> None:
    for found in pool.run(masked, size, layout, each_both_ways(OTHERS)):
        assert max(found) <= 1e-12, dict(zip(map(str, each_both_ways(OTHERS)), found, strict=True))


def packs(rank: int, layout: Layout, cases: list[dict[str, Any]]) -> list[float]:
    """Largest error against every sequence alone; rows of padding must be 0, and so their gradients."""
    size = dist.get_world_size()
    errors = []
    for case in cases:
        lengths = [length(2 * size) for length in case["lengths"]]
        places = [-(-length // (2 * size)) * 2 * size for length in lengths]
        causal, window = case.get("causal", True), case.get("window", (-1, -1))
        q, k, v, dout = (x.squeeze(1) for x in inputs(sum(places) + case.get("rest", 0) * 2 * size, 1, (4, 2), (8, 6)))
        places_and_rest = [*places, *([q.size(0) - sum(places)] if case.get("rest") else [])]
        mine = packed_zigzag(places_and_rest, size, rank)
        shards = [x[mine].requires_grad_() for x in (q, k, v)]
        totals: list[Any] = [[0, *accumulate(lengths)], None if lengths == places else [0, *accumulate(places)]]
        on_gpu = case.get("on_gpu", False)
        if on_gpu:
            totals = [None if x is None else torch.tensor(x) for x in totals]
        dropout, factors = dropped(case, batch=1, tokens=q.size(0))
        with kept_back(case), mock.patch.object(Packing, "on_gpu", return_value=on_gpu):
            out, _ = run(
                layout,
                shards,
                causal=causal,
                window=window,
                dropout=dropout,
                cu_seqlens=totals[0],
                cu_seqlens_padded=totals[1],
            )
            found = (out, *torch.autograd.grad(out, shards, dout[mine]))
        expected = packed_gradients((q, k, v, dout), lengths, places, causal, window, factors)
        errors.append(worst(found, tuple(x[mine] for x in expected)))
    return errors


def of(multiple: int, less: int = 0):
    """A length of so many 2 * cp, less some."""
    return Length(multiple, less)


class Length:
    def __init__(self, multiple: int, less: int) -> None:
        self.multiple, self.less = multiple, less

    def __call__(self, unit: int) -> int:
        return max(0, self.multiple * unit - self.less)

    def __repr__(self) -> str:
        return f"{self.multiple}u-{self.less}"


PACKS: list[dict[str, Any]] = [
    {"lengths": [of(2), of(1), of(3)]},
    {"lengths": [of(2), of(1), of(3)], "causal": False},
    {"lengths": [of(3, 1), of(1), of(2, 5), of(1, 1)]},
    {"lengths": [of(3, 1), of(1), of(2, 5)], "causal": False, "rest": 1},
    {"lengths": [of(3), of(1)], "window": (3, 0)},
    {"lengths": [of(3, 2), of(2)], "window": (3, 0), "rest": 2},
    {"lengths": [of(3, 2), of(2)], "window": (2, 1), "causal": False},
    {"lengths": [of(2), of(0), of(1), of(3)], "on_gpu": True},
    {"lengths": [of(3, 1), of(0), of(1, 1), of(2, 5)], "causal": False, "rest": 1, "on_gpu": True},
    {"lengths": [of(3, 1), of(2, 100)], "window": (4, 0), "on_gpu": True},
    {"lengths": [of(3, 1), of(0), of(2)], "window": (2, 1), "causal": False, "on_gpu": True},
    {"lengths": [of(2), of(1), of(3)], "dropout": 0.3},
    {"lengths": [of(3, 2), of(2)], "window": (3, 0), "dropout": 0.3, "rest": 1},
    # What Megatron passes while it warms up a CUDA graph: buffers of zeros.
    {"lengths": [of(0), of(0)], "rest": 3, "on_gpu": True},
    {"lengths": [of(0)], "window": (2, 1), "causal": False, "rest": 2, "on_gpu": True},
]


@on_every_layout
def test_packed_sequences(pool: RankPool, size: int, layout: Layout) -> None:
    for found in pool.run(packs, size, layout, each_both_ways(PACKS)):
        assert max(found) <= 1e-12, dict(zip(map(str, each_both_ways(PACKS)), found, strict=True))


def across(rank: int, layout: Layout, lengths: tuple[int, int]) -> float:
    size = dist.get_world_size()
    queries, keys = (2 * size * n for n in lengths)
    whole = inputs(queries, 2, (4, 2), dims=(8, 6), keys=keys)
    mine, theirs = zigzag(queries, size, rank), zigzag(keys, size, rank)
    shards = [x[at].requires_grad_() for x, at in zip(whole, (mine, theirs, theirs), strict=False)]
    out, _ = run(layout, shards, causal=False)
    found = (out, *torch.autograd.grad(out, shards, whole[3][mine]))
    expected = dense_gradients(*whole, False)
    return worst(found, tuple(x[at] for x, at in zip(expected, (mine, mine, theirs, theirs), strict=True)))


@on_every_layout
def test_keys_of_another_sequence(pool: RankPool, size: int, layout: Layout) -> None:
    for lengths in ((3, 1), (1, 4)):
        assert max(pool.run(across, size, layout, lengths)) <= 1e-12


def with_a_head_that_has_no_sink(rank: int, layout: Layout) -> tuple[float, bool]:
    """How far that head, of sink -inf, is from attention without sinks, in a padded pack; whether all is finite."""
    size = dist.get_world_size()
    length, place = 4 * size - 3, 4 * size
    mine = packed_zigzag([place], size, rank)
    q, k, v, dout = (x.squeeze(1)[mine] for x in inputs(place, 1, (4, 2), (8, 6)))
    sink = torch.tensor([0.0, 1.0, -torch.inf, 0.0], dtype=q.dtype).requires_grad_()
    leaves, found = [x.requires_grad_() for x in (q, k, v)], []
    for given in (sink, None):
        out, _ = run(layout, leaves, sink=given, cu_seqlens=[0, length], cu_seqlens_padded=[0, place])
        wanted = [*leaves, *([sink] if given is not None else [])]
        found.append((out, *torch.autograd.grad(out, wanted, dout)))
    with_sink, without = found
    finite = all(x.isfinite().all().item() for x in with_sink)
    return (with_sink[0][:, 2] - without[0][:, 2]).abs().max().item(), finite


@on_every_layout
def test_a_sink_of_minus_infinity_is_none(pool: RankPool, size: int, layout: Layout) -> None:
    for error, finite in pool.run(with_a_head_that_has_no_sink, size, layout):
        assert finite
        assert error == 0.0
