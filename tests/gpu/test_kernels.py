"""Every attention kernel on a GPU, one call at a time, against the reference kernel in float64."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from megatron_attn2d.attention.dropout import Dropout, KeepMask
from megatron_attn2d.attention.kernels import Kernel, choose_kernel
from megatron_attn2d.attention.kernels.base import BackwardRows, Request, Softmax
from megatron_attn2d.attention.kernels.reference import ReferenceKernel
from megatron_attn2d.attention.layout import CAUSAL, FULL, Band
from megatron_attn2d.attention.segments import Segments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BACKENDS = ("flash_attn_4", "cudnn", "transformer_engine", "flash", "triton")
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 5e-6}
SHAPES = {  # queries, keys, batch, query heads, key heads, band
    "rectangle": (384, 640, 1, 4, 4, FULL),
    "causal square": (512, 512, 1, 4, 4, CAUSAL),
    "batch of causal squares": (256, 256, 2, 4, 2, CAUSAL),
    "grouped heads": (384, 640, 2, 8, 2, FULL),
    "odd lengths": (127, 3, 1, 2, 1, FULL),
    "one token": (1, 1, 2, 2, 2, CAUSAL),
    "window": (384, 640, 1, 4, 2, Band(200, 0)),
    "window both ways": (384, 384, 1, 4, 4, Band(100, 50)),
    "window without an end": (384, 384, 1, 4, 4, Band(0, None)),
    "causal rectangle": (300, 640, 1, 4, 4, CAUSAL),
    "window of few keys": (130, 200, 2, 4, 1, Band(3, 0)),
}


def kernel_for(backend: str, dtype: torch.dtype, dims: tuple[int, int], **needs: bool) -> Kernel:
    """The kernel; skips what this machine has not installed or the kernel refuses by name."""
    try:
        return choose_kernel(backend, Request("cuda", dtype, *dims, **needs))
    except ValueError as refusal:
        pytest.skip(str(refusal))


def errors(
    kernel: Kernel,
    case: tuple[int, int, int, int, int, Band],
    dims: tuple[int, int],
    dtype: torch.dtype,
    parts: int = 1,
    dropped: float = 0.0,
) -> list[float]:
    """Relative errors of O, LSE, dQ, dK, dV; with `parts`, inputs are head groups of wider tensors."""
    sq, sk, batch, heads, kv_heads, band = case
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((sq, heads, dims[0]), (sk, kv_heads, dims[0]), (sk, kv_heads, dims[1]), (sq, heads, dims[1]))
    q, k, v, dout = (
        torch.randn(s, batch, parts * h, d, device="cuda", generator=generator).to(dtype).chunk(parts, 2)[-1]
        for s, h, d in sizes
    )
    wide_q, wide_k, wide_v, wide_dout = (x.double() for x in (q, k, v, dout))
    reference, scale = ReferenceKernel(), dims[0] ** -0.5
    mask: KeepMask | None = None
    if dropped:
        rows, keys = (torch.arange(n, device="cuda").expand(batch, -1) for n in (sq, sk))
        mask = Dropout(dropped, 99, first_head=1).at(torch.arange(batch, device="cuda"), heads, rows + 70_000, keys)
    how = band, Softmax(scale, mask)
    true_out, true_lse = reference.forward(wide_q, wide_k, wide_v, *how)
    delta = (wide_dout * true_out).sum(-1).permute(1, 2, 0)
    expected = reference.backward(BackwardRows(wide_q, wide_dout, true_lse, delta, None), wide_k, wide_v, *how)
    out, lse = kernel.forward(q, k, v, *how)
    found = kernel.backward(BackwardRows(q, dout, lse, delta.float(), out), k, v, *how)
    pairs = zip((out, lse, *found), (true_out, true_lse, *expected), strict=True)
    # One key has probability 1 and its scores no gradient: a difference of two terms of delta's size, which round. In
    # fp32 sums of 128 products leave 2e-6 to 8e-6 of terms with norm 22.
    terms = delta.norm().item() if sq == sk == 1 else 0.0
    least = (0.0, 0.0, terms, terms, 0.0)
    return [
        ((a.double() - b).norm() / max(b.norm().item(), low)).item() for (a, b), low in zip(pairs, least, strict=True)
    ]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_bands(backend: str, shape: str, dtype: torch.dtype) -> None:
    sq, sk, _, _, _, band = SHAPES[shape]
    windows = band not in (FULL, CAUSAL) or (band == CAUSAL and sq != sk)
    found = errors(kernel_for(backend, dtype, (128, 128), windows=windows), SHAPES[shape], (128, 128), dtype)
    assert max(found) <= BOUNDS[dtype], found


@pytest.mark.parametrize(
    "dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)], ids=str
)
@pytest.mark.parametrize("shape", ["rectangle", "causal square", "batch of causal squares"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dims(backend: str, shape: str, dims: tuple[int, int]) -> None:
    kernel = kernel_for(backend, torch.bfloat16, dims, grouped=shape == "batch of causal squares")
    found = errors(kernel, SHAPES[shape], dims, torch.bfloat16)
    assert max(found) <= BOUNDS[torch.bfloat16], found


@pytest.mark.parametrize("backend", BACKENDS)
def test_head_groups_are_views(backend: str) -> None:
    kernel = kernel_for(backend, torch.bfloat16, (128, 128), grouped=True)
    for shape in ("rectangle", "batch of causal squares"):
        found = errors(kernel, SHAPES[shape], (128, 128), torch.bfloat16, parts=2)
        assert max(found) <= BOUNDS[torch.bfloat16], (shape, found)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_dropout(shape: str, dtype: torch.dtype) -> None:
    dims = (192, 128) if shape == "window" else (64, 64) if dtype == torch.float32 else (128, 128)
    found = errors(kernel_for("triton", dtype, dims, dropout=True), SHAPES[shape], dims, dtype, dropped=0.2)
    assert max(found) <= BOUNDS[dtype], found


def random_table(
    band: Band, segments: int, seed: int, most: int = 700
) -> tuple[list[tuple[int, int, int, int]], int, int]:
    """Segments among gaps, some empty, some of one row, and how many rows and keys there are."""
    draw = random.Random(seed)
    found, rows, keys = [], 0, 0
    for _ in range(segments):
        q_length = min(most, 1 + int(draw.lognormvariate(3.5, 1.4)))
        k_length = q_length if band == CAUSAL else min(most, 1 + int(draw.lognormvariate(3.5, 1.4)))
        if band.right is not None:  # every row sees a key: the first one's last key is not before the first
            q_length = min(q_length, k_length + band.right)
        if draw.random() < 0.1:
            q_length = k_length = 0
        rows, keys = rows + draw.choice((0, 0, 3, 40)), keys + draw.choice((0, 0, 1, 64))
        found.append((rows, q_length, keys, k_length))
        rows, keys = rows + q_length, keys + k_length
    return found, rows + 5, keys + 7


TABLES = {  # band, segments, query heads, key heads, head dims
    "full": (FULL, 64, 4, 4, (128, 128)),
    "causal": (CAUSAL, 64, 4, 4, (128, 128)),
    "many causal": (CAUSAL, 400, 2, 2, (128, 128)),
    "grouped, head dim 64": (CAUSAL, 64, 8, 2, (64, 64)),
    "grouped rectangles": (FULL, 64, 8, 2, (128, 128)),
    "latent": (CAUSAL, 64, 4, 4, (192, 128)),
    "latent rectangles": (FULL, 64, 4, 4, (192, 128)),
    "window": (Band(100, 0), 64, 4, 2, (128, 128)),
    "window's upper edge": (Band(0, None), 64, 4, 4, (128, 128)),
    "before the last key": (Band(None, 30), 64, 4, 4, (64, 64)),
    "window both ways": (Band(100, 50), 64, 4, 4, (128, 128)),
    "one segment": (CAUSAL, 1, 4, 4, (128, 128)),
}


def table_errors(kernel: Any, case: str, dtype: torch.dtype, dropped: float = 0.0) -> list[float]:
    """Relative errors of O, LSE, dQ, dK, dV over the rows of a table; raises if another row has changed."""
    band, count, heads, kv_heads, dims = TABLES[case]
    segments, rows, keys = random_table(band, count, seed=len(case))
    table = Segments.of(np.array(segments), band, rows, keys, torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        torch.randn(n, 2 * h, d, device="cuda", generator=generator).to(dtype)[:, h:]
        for n, h, d in (
            (rows, heads, dims[0]),
            (keys, kv_heads, dims[0]),
            (keys, kv_heads, dims[1]),
            (rows, heads, dims[1]),
        )
    )
    how = Softmax(dims[0] ** -0.5)
    if dropped:
        positions = [torch.arange(n, device="cuda")[None] + 70_000 for n in (rows, keys)]
        mask = Dropout(dropped, 99).at(torch.zeros(1, dtype=torch.int64, device="cuda"), heads, *positions)
        how = Softmax(dims[0] ** -0.5, mask)
    results, delta, given = [], torch.empty(0), torch.empty(0)
    for each, into in ((ReferenceKernel(), torch.float64), (kernel, dtype)):
        exact = into == torch.float64
        qs, ks, vs, douts = (x.to(into) for x in (q, k, v, dout))
        out, dq, dk, dv = (torch.full(x.shape, 9, dtype=into, device="cuda") for x in (douts, qs, ks, vs))
        lse = torch.full((2 * heads, rows), 9, dtype=torch.float64 if exact else torch.float32, device="cuda")[heads:]
        each.forward_segments(qs, ks, vs, table, how, (out, lse))
        if exact:
            delta, given = (douts * out).sum(-1).t().contiguous(), lse
        some = BackwardRows(qs, douts, given.to(lse.dtype), delta.to(lse.dtype), out)
        each.backward_segments(some, ks, vs, table, how, (dq, dk, dv))
        results.append((out, lse.t(), dq, dk, dv))
    inside_q, inside_k = (
        torch.cat([torch.arange(start, start + n) for start, n in (each[i : i + 2] for each in segments)])
        for i in (0, 2)
    )
    found = []
    for a, b, mine in zip(*results[::-1], (inside_q,) * 3 + (inside_k,) * 2, strict=True):
        found.append(((a[mine].double() - b[mine]).norm() / b[mine].norm()).item())
        others = torch.ones(len(a), dtype=torch.bool, device="cuda")
        others[mine] = False
        assert (a[others] == 9).all(), "other rows keep what they hold"
    return found


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tables(backend: str, case: str, dtype: torch.dtype) -> None:
    band, _, heads, kv_heads, dims = TABLES[case]
    kernel = kernel_for(
        backend, dtype, dims, windows=band not in (FULL, CAUSAL), grouped=heads > kv_heads, segments=True
    )
    found = table_errors(kernel, case, dtype)
    assert max(found) <= BOUNDS[dtype], found


@pytest.mark.parametrize("case", ["full", "causal", "window", "grouped, head dim 64"])
def test_dropout_in_tables(case: str) -> None:
    dims = TABLES[case][-1]
    kernel = kernel_for("triton", torch.bfloat16, dims, dropout=True, segments=True, windows=True)
    found = table_errors(kernel, case, torch.bfloat16, dropped=0.2)
    assert max(found) <= BOUNDS[torch.bfloat16], found


@pytest.mark.parametrize("backend", ["flash_attn_4", "flash", "triton"])
def test_deterministic_backward(backend: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        kernel = kernel_for(backend, torch.bfloat16, (128, 128))
        q, k = (torch.randn(n, 1, 4, 128, device="cuda", dtype=torch.bfloat16) for n in (2048, 4096))
        out, lse = kernel.forward(q, k, k, FULL, Softmax(0.1))
        rows = BackwardRows(q, q, lse, lse, out)
        runs = [kernel.backward(rows, k, k, FULL, Softmax(0.1)) for _ in range(3)]
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
        tables = [table_errors(kernel, "grouped rectangles", torch.bfloat16) for _ in range(3)]
        assert tables[1:] == tables[:1] * 2
    finally:
        torch.use_deterministic_algorithms(False)
