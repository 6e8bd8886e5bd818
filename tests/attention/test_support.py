"""The table of what is supported: each kind of attention on every grid of 2, 4 and 8 ranks and on rings, in float64."""

from __future__ import annotations

import functools
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_attn2d import Grid, attention2d, ring_attention
from tests.attention.dense import dense_gradients, inputs, packed_zigzag, zigzag
from tests.attention.support import CASES, Case, table
from tests.pool import RankPool

WORKING = [case for case in CASES if not case.refused]
TOKENS, SHRINK = 64, 16  # tokens in all, and by how much head dims are smaller
LENGTHS, PLACES = (16, 29, 9), (16, 32, 16)  # of packed sequences, padding left out and included

LAYOUTS: list[tuple[int, int, int] | int] = [
    *((u, r, size // u // r) for size in (2, 4, 8) for u in (1, 2, 4, 8) for r in (1, 2, 4, 8) if size % (u * r) == 0),
    *(2, 4, 8),
]


def whole(case: Case, packed: bool) -> tuple[torch.Tensor, ...]:
    """q, k, v, the output's gradient, and the sinks."""
    dims = case.dims[0] // SHRINK, case.dims[1] // SHRINK
    tensors = inputs(TOKENS, 1 if packed else 2, case.heads, dims)
    offsets = torch.linspace(-2, 2, case.heads[0], dtype=torch.float64)
    return (*tensors, offsets if case.softmax == "learnable" else offsets * 0)


@functools.cache
def expected(case: Case, packed: bool) -> tuple[torch.Tensor, ...]:
    """Output and gradients of q, k, v and sinks; of packed sequences by running each alone."""
    *tensors, sink = whole(case, packed)
    used = None if case.softmax == "vanilla" else sink
    window = case.scaled_window(TOKENS)
    if not packed:
        return dense_gradients(*tensors, case.causal, window, used)
    results = [torch.zeros_like(tensors[i]) for i in (3, 0, 1, 2)] + (
        [torch.zeros_like(sink)] if used is not None else []
    )
    for start, length in zip(accumulate(PLACES, initial=0), LENGTHS, strict=False):
        alone = slice(start, start + length)
        found = dense_gradients(*(x[alone] for x in tensors), case.causal, window, used)
        for result, part in zip(results[:4], found, strict=False):
            result[alone] = part
        if used is not None:
            results[4] += found[4]
    return tuple(results)


def cells(rank: int, layout: tuple[int, int, int] | int, cases: list[Case]) -> list[Any]:
    """Output and gradients on this rank, or the refusal, of each case: as batch, and packed."""
    size, group = dist.get_world_size(), dist.group.WORLD
    assert group is not None
    attend: Any = functools.partial(ring_attention, group=group)
    if isinstance(layout, tuple):
        grid = Grid.from_group(group, ulysses_size=layout[0], rows=layout[1], cols=layout[2])
        attend = functools.partial(attention2d, grid=grid)
    results: list[Any] = []
    for case in cases:
        for packed in (False, True):
            *tensors, sink = whole(case, packed)
            mine = packed_zigzag(PLACES, size, rank) if packed else zigzag(TOKENS, size, rank)
            q, k, v, dout = ((x.squeeze(1) if packed else x)[mine] for x in tensors)
            leaves = [x.requires_grad_() for x in (q, k, v, *(() if case.softmax == "vanilla" else (sink,)))]
            call: dict[str, Any] = {"causal": case.causal, "window": case.scaled_window(TOKENS)}
            if packed:
                call["cu_seqlens"] = [0, *accumulate(LENGTHS)]
                call["cu_seqlens_padded"] = [0, *accumulate(PLACES)]
            try:
                out = attend(*leaves[:3], sink=leaves[3] if len(leaves) > 3 else None, **call)
            except ValueError as error:
                results.append(str(error))
                continue
            results.append([x.detach().numpy() for x in (out, *torch.autograd.grad(out, leaves, dout))])
    return results


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"ring of {x}" if type(x) is int else "x".join(map(str, x)))
def test_each_kind_works_or_is_refused_by_name(pool: RankPool, layout: tuple[int, int, int] | int) -> None:
    parts = layout[0] if isinstance(layout, tuple) else 1
    size = int(np.prod(layout))
    by_rank = pool.run(cells, size, layout, WORKING)
    for number, (case, packed) in enumerate((case, packed) for case in WORKING for packed in (False, True)):
        found = [results[number] for results in by_rank]
        if case.heads[0] % parts or (case.heads[1] % parts and parts % case.heads[1]):
            assert all("by the" in text and "head axis (U)" in text for text in found)
            continue
        assert not isinstance(found[0], str), found[0]
        wanted = expected(case, packed)
        for rank, results in enumerate(found):
            mine = packed_zigzag(PLACES, size, rank) if packed else zigzag(TOKENS, size, rank)
            for a, b in zip(results[:4], wanted, strict=False):
                error = np.abs(a.reshape(b[mine].shape) - b[mine].numpy()).max()
                assert error <= 1e-12, (case.title, packed, rank, error)
        if case.softmax != "vanilla":  # each rank has its rows' part, as of any parameter
            assert np.abs(sum(results[4] for results in found) - wanted[4].numpy()).max() <= 1e-11


def test_the_page_shows_this_table() -> None:
    page = (Path(__file__).parents[2] / "docs/supported.md").read_text()
    assert table() in page, "paste what python -m scripts.supported prints"
