"""The table of what is supported at Transformer Engine's sizes and tolerances: 4096 tokens, batches of two, 16 bits.

Each kind of attention, as a batch and packed with padding, on grids of 2, 4 and 8 ranks and on rings, against float64.
Inputs are clamped to [-1, 1] as in that matrix.
"""

from __future__ import annotations

import functools
from itertools import accumulate, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention.kernels.base import BackwardRows, Softmax
from megatron_attn2d.attention.kernels.reference import ReferenceKernel
from megatron_attn2d.attention.layout import Band
from tests.attention.dense import packed_zigzag, zigzag
from tests.attention.support import CASES, TOKENS, Case
from tests.gpu.ranks import GpuRanks, start

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WORKING = [case for case in CASES if not case.refused]
LAYOUTS: dict[int, list[tuple[int, int, int] | None]] = {
    2: [(1, 2, 1), (1, 1, 2), (2, 1, 1), None],
    4: [(1, 2, 2), (1, 4, 1), (2, 1, 2), None],
    8: [(1, 2, 4), (1, 4, 2), (2, 2, 2), None],
}
LENGTHS, PLACES = (2048, 1000, 900), (2048, 1024, 1024)  # of packed sequences, padding left out and included


def tolerance(case: Case, dtype: torch.dtype) -> float:
    """Absolute and relative; that matrix's."""
    if dtype == torch.float16:
        return 5e-3
    return 2.5e-2 if case.heads[0] == case.heads[1] else 3.5e-2


def tensors(case: Case, dtype: torch.dtype, packed: bool) -> list[Tensor]:
    """q, k, v and the output's gradient for the whole sequence, [s, b, heads, d]."""
    generator = torch.Generator("cuda").manual_seed(0)
    (h, g), (d, dv) = case.heads, case.dims
    shapes = [(h, d), (g, d), (g, dv), (h, dv)]
    batch = 1 if packed else 2
    return [
        torch.randn(TOKENS, batch, *shape, generator=generator, device="cuda").clamp(-1, 1).to(dtype)
        for shape in shapes
    ]


def dense(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, sink: Tensor) -> list[Tensor]:
    """Output and gradients in float64, a sequence and head at a time, as all scores at once would not fit.

    Each rank computes its share of the heads, and gets the others' from their ranks.
    """
    reference, group, scale = ReferenceKernel(), q.size(2) // k.size(2), q.size(3) ** -0.5
    left, right = (None if side < 0 else side for side in case.window)
    how = Band(left, 0 if case.causal else right), Softmax(scale)
    results = [torch.zeros_like(x, dtype=torch.float64) for x in (dout, q, k, v)]
    places = [*product(range(q.size(1)), range(q.size(2)))]
    for batch, head in places[dist.get_rank() :: dist.get_world_size()]:
        rows, keys = ((slice(batch, batch + 1), slice(i, i + 1)) for i in (head, head // group))
        wide_q, wide_k, wide_v = (x[:, *place].double() for x, place in ((q, rows), (k, keys), (v, keys)))
        wide_dout = dout[:, *rows].double()
        out, lse = reference.forward(wide_q, wide_k, wide_v, *how)
        if case.softmax != "vanilla":  # one more key of value 0
            with_sink = torch.logaddexp(lse, sink[rows[1]].double()[:, None])
            out, lse = out * torch.exp(lse - with_sink).permute(2, 0, 1)[..., None], with_sink
        delta = (wide_dout * out).sum(-1).permute(1, 2, 0)
        dq, dk, dv = reference.backward(BackwardRows(wide_q, wide_dout, lse, delta, None), wide_k, wide_v, *how)
        results[0][:, *rows], results[1][:, *rows] = out, dq
        results[2][:, *keys] += dk
        results[3][:, *keys] += dv
    for result in results:
        dist.all_reduce(result)
    return results


def expected(case: Case, whole: list[Tensor], sink: Tensor, packed: bool) -> list[Tensor]:
    if not packed:
        return dense(case, *whole, sink)
    results = [torch.zeros_like(whole[i], dtype=torch.float64) for i in (3, 0, 1, 2)]
    for begin, length in zip(accumulate(PLACES, initial=0), LENGTHS, strict=False):
        alone = slice(begin, begin + length)
        for result, part in zip(results, dense(case, *(x[alone] for x in whole), sink), strict=True):
            result[alone] = part
    return results


def cells(rank: int, size: int, dtype: torch.dtype, cases: list[Case]) -> list[str]:
    """What went wrong, for every case and layout of `size` ranks. Grids are made once: each makes communicators."""
    start()
    group = dist.group.WORLD
    assert group is not None
    grids = {
        layout: layout and Grid.from_group(group, ulysses_size=layout[0], rows=layout[1], cols=layout[2])
        for layout in LAYOUTS[size]
    }
    wrong = []
    for case, packed in product(cases, (False, True)):
        sink = torch.linspace(-2, 2, case.heads[0], device="cuda")
        if case.softmax == "off-by-one":
            sink = torch.zeros_like(sink)
        whole = tensors(case, dtype, packed)
        index = (packed_zigzag(PLACES, size, rank) if packed else zigzag(TOKENS, size, rank)).cuda()
        wanted = [x[index] for x in expected(case, whole, sink, packed)]
        call: dict[str, Any] = {"causal": case.causal, "window": case.window}
        if packed:
            call |= {"cu_seqlens": [0, *accumulate(LENGTHS)], "cu_seqlens_padded": [0, *accumulate(PLACES)]}
        for layout, grid in grids.items():
            if layout is not None and case.heads[1] % layout[0]:
                continue
            attend: Any = functools.partial(ring_attention, group=group)
            if grid is not None:
                attend = functools.partial(attention2d, grid=grid)
            q, k, v, dout = ((x.squeeze(1) if packed else x)[index] for x in whole)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = attend(*leaves, sink=None if case.softmax == "vanilla" else sink, **call)
            found = (out, *torch.autograd.grad(out, leaves, dout))
            bound = tolerance(case, dtype)
            for name, a, b in zip(("O", "dQ", "dK", "dV"), found, wanted, strict=True):
                b = b.view(a.shape)
                excess = ((a.double() - b).abs() - bound * b.abs()).max().item()
                if not excess <= bound:
                    wrong.append(f"{case.title}, {layout}, packed {packed}, {name}: {excess:.1e} > {bound}")
    return wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", LAYOUTS)
def test_every_kind_is_within_tolerance(pool: GpuRanks, size: int, dtype: torch.dtype) -> None:
    found = pool.run(cells, size, size, dtype, WORKING, init_group=False, hosts=True, timeout=900)
    assert not [text for wrong in found for text in wrong]
