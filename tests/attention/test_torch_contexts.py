"""What torch may put around attention: autocast, and gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d import Grid, attention2d, ring_attention
from tests.pool import RankPool

LAYOUTS = ["1x1", "1x2", "2x1", "1x1, heads over 2", "ring"]


def attention(layout: str) -> Callable[..., Tensor]:
    """Attention of two ranks, or of one of them alone."""
    group = dist.group.WORLD
    assert group is not None
    if layout == "ring":
        return lambda q, k, v: ring_attention(q, k, v, group)
    shapes = {"1x2": (1, 2, 1), "2x1": (2, 1, 1), "1x1, heads over 2": (1, 1, 2)}
    if layout not in shapes:
        return lambda q, k, v: attention2d(q, k, v, Grid.single())
    rows, cols, heads = shapes[layout]
    grid = Grid.from_group(group, rows=rows, cols=cols, ulysses_size=heads)
    return lambda q, k, v: attention2d(q, k, v, grid)


def shards(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(16, 2, 4, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def under_autocast(rank: int, layout: str, dtype: torch.dtype) -> float:
    """Largest difference that autocast around both passes makes."""
    attend, leaves, results = attention(layout), shards(dtype), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = attend(*leaves)
            results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_changes_nothing(pool: RankPool, layout: str, dtype: torch.dtype) -> None:
    assert pool.run(under_autocast, 2, layout, dtype) == [0.0, 0.0]


def second_derivative(rank: int, layout: str) -> str:
    """What differentiating a gradient says."""
    leaves = shards(torch.float32)
    out = attention(layout)(*leaves)
    try:
        torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivatives_are_refused(pool: RankPool, layout: str) -> None:
    message = "context-parallel attention has no second derivative: leave out create_graph=True"
    assert pool.run(second_derivative, 2, layout) == [message] * 2
