"""attention2d between GPUs, over the links that they have, against dense float64.

    pytest -m gpu tests/gpu/test_messages.py -s

Ranks of `test_attention` always talk over sockets. Here they do so only where they share GPUs. Every grid of four
exchanges whole sequences, packs and windows: in float64, where a chunk in a wrong place can't hide, and in bf16 with
the kernels of GPUs. Calls are captured as CUDA graphs too.
"""

from __future__ import annotations

import time
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d import Grid, attention2d
from tests.attention.dense import dense_gradients, inputs, packed_gradients, packed_zigzag, zigzag
from tests.gpu.ranks import GpuRanks, start

RANKS = 4
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

type Layout = tuple[tuple[int, int, int], tuple[int, int] | None]
"""U, R, C, and the tile that a node's ranks fill."""

LAYOUTS: list[Layout] = [
    ((1, 4, 1), None),
    ((1, 1, 4), None),
    ((1, 2, 2), None),
    ((2, 2, 1), None),
    ((2, 1, 2), None),
    ((4, 1, 1), None),
    ((1, 4, 1), (2, 1)),
    ((1, 1, 4), (1, 2)),
    ((1, 2, 2), (1, 2)),
]
KINDS: dict[str, dict[str, Any]] = {
    "causal": {},
    "bidirectional": {"causal": False},
    "in two groups of heads": {"overlap_groups": 2},
    "window": {"window": (100, 0)},
    "narrow window": {"window": (20, 0)},
    "packed": {"places": (64, 512, 8, 440), "lengths": (64, 512, 8, 440)},
    "packed with padding": {"places": (64, 512, 8, 440), "lengths": (50, 300, 1, 440)},
}
BOUNDS = {torch.float64: 1e-11, torch.bfloat16: 1.2e-2}
TOKENS, HEADS, DIMS = 1024, (8, 4), (64, 64)


def build(layout: Layout) -> Grid:
    assert dist.group.WORLD is not None
    (heads, rows, cols), tile = layout
    return Grid.from_group(dist.group.WORLD, ulysses_size=heads, rows=rows, cols=cols, node_block=tile)


def cells(rank: int, dtype: torch.dtype) -> list[tuple[str, str, float]]:
    """Layout, kind, and the largest relative error (2-norm) of O, dQ, dK and dV on this rank."""
    start()
    grids = [(str(layout), build(layout)) for layout in LAYOUTS]
    found = []
    for kind, how in KINDS.items():
        options = dict(how)
        places, lengths = options.pop("places", None), options.pop("lengths", None)
        whole = [x.to(dtype).double() for x in inputs(TOKENS, 1, HEADS, DIMS)]
        if places is None:
            mine, wanted = zigzag(TOKENS, RANKS, rank), dense_gradients(*whole, **{"causal": True} | graded(options))
        else:
            whole = [x.squeeze(1) for x in whole]
            mine, wanted = packed_zigzag(places, RANKS, rank), packed_gradients(whole, lengths, places, True)
            options |= {"cu_seqlens": totals(lengths), "cu_seqlens_padded": totals(places)}
        shards = [x[mine].cuda().to(dtype) for x in whole]
        backend = "reference" if dtype == torch.float64 else "auto"
        for name, grid in grids:
            leaves = [x.clone().requires_grad_() for x in shards[:3]]
            out = attention2d(*leaves, grid, backend=backend, **options)
            results = (out, *torch.autograd.grad(out, leaves, shards[3]))
            pairs = [(a.double().cpu(), b[mine]) for a, b in zip(results, wanted, strict=True)]
            found.append((name, kind, max(((a - b).norm() / b.norm()).item() for a, b in pairs)))
    return found


def graded(options: dict[str, Any]) -> dict[str, Any]:
    """Those options that the dense reference knows."""
    return {name: value for name, value in options.items() if name in ("causal", "window")}


def totals(lengths: tuple[int, ...]) -> list[int]:
    return [0, *accumulate(lengths)]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_every_grid_of_four(pool: GpuRanks, dtype: torch.dtype) -> None:
    began = time.monotonic()
    by_rank = pool.run(cells, RANKS, dtype, init_group=False, timeout=600)
    wrong = []
    for cell in zip(*by_rank, strict=True):
        (layout, kind, _), worst = cell[0], max(error for *_, error in cell)
        print(f"{dtype} {layout:24s} {kind:24s} {worst:.1e}")
        if not worst <= BOUNDS[dtype]:
            wrong.append(f"{layout}, {kind}: {worst:.1e}")
    print(f"{len(by_rank[0])} calls in {time.monotonic() - began:.0f} s")
    assert not wrong


def replays(rank: int) -> list[bool]:
    """By layout: do output and gradients of a replayed CUDA graph equal those of a plain call on the same inputs?"""
    start()
    torch.use_deterministic_algorithms(True)
    equal = []
    for layout in LAYOUTS:
        grid = build(layout)
        q, k, v = (torch.randn(512, 1, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        dout = torch.randn_like(q)

        def call(*leaves: Tensor, grid: Grid = grid, dout: Tensor = dout) -> list[Tensor]:
            out = attention2d(*leaves, grid)
            return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call(q, k, v)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            static = call(q, k, v)
        with torch.no_grad():
            for x in (q, k, v):
                x.copy_(torch.randn_like(x))
        graph.replay()
        equal.append(all(torch.equal(a, b) for a, b in zip(static, call(q, k, v), strict=True)))
        torch.cuda.synchronize()
        del graph, static
    return equal


def test_calls_in_a_cuda_graph(pool: GpuRanks) -> None:
    found = [all(cell) for cell in zip(*pool.run(replays, RANKS, init_group=False, timeout=300), strict=True)]
    assert found == [True] * len(LAYOUTS), dict(zip(map(str, LAYOUTS), found, strict=True))
