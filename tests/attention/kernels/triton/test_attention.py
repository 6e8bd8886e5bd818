"""The Triton attention without a GPU: interpreted, against the float64 reference, and compiled for A100 and H100.

`tests/gpu` runs it compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.kernels.base import BackwardRows, Softmax
from megatron_attn2d.attention.kernels.reference import ReferenceKernel
from megatron_attn2d.attention.kernels.triton.kernel import TritonKernel
from megatron_attn2d.attention.layout import CAUSAL, FULL, Band
from megatron_attn2d.attention.segments import Segments

CASES = {  # queries, keys, batch, query heads, key heads, head dim, value head dim, band, dropout
    "rectangle": (70, 90, 2, 4, 2, 16, 16, FULL, 0.0),
    "causal": (90, 90, 1, 2, 2, 24, 16, CAUSAL, 0.0),
    "causal rectangle": (40, 100, 1, 2, 1, 16, 16, CAUSAL, 0.0),
    "window": (150, 150, 1, 2, 1, 16, 16, Band(40, 0), 0.0),
    "window both ways": (70, 130, 1, 1, 1, 16, 16, Band(33, 20), 0.0),
    "window without an end": (130, 70, 1, 1, 1, 16, 16, Band(62, None), 0.0),
    "window before the last key": (64, 96, 1, 1, 1, 16, 16, Band(None, 7), 0.0),
    "one key": (1, 1, 2, 2, 2, 16, 16, CAUSAL, 0.0),
    "few keys": (65, 3, 1, 2, 1, 16, 24, FULL, 0.0),
    "dropout": (70, 90, 2, 4, 2, 16, 16, FULL, 0.3),
    "dropout in a window": (90, 90, 1, 2, 1, 16, 16, Band(20, 0), 0.1),
}


def compare(case: str) -> None:
    """Output, log-sum-exp and gradients from tensors with strides of their own."""
    kernel = TritonKernel()
    sq, sk, batch, heads, key_heads, d, dv, band, p = CASES[case]
    torch.manual_seed(0)
    shapes = ((sq, heads, d), (sk, key_heads, d), (sk, key_heads, dv), (sq, heads, dv))
    q, k, v, dout = (torch.randn(n, batch, 2 * h, width)[:, :, h:] for n, h, width in shapes)
    dropped = None
    if p:
        rows, keys = torch.arange(sq) + 1000, torch.arange(sk)
        dropped = Dropout(p, 1234567, first_head=3).at(
            torch.arange(batch), heads, rows.expand(batch, -1), keys.expand(batch, -1)
        )
    reference, wide = ReferenceKernel(), [x.double() for x in (q, k, v, dout)]
    wide_q, wide_k, wide_v, wide_dout = wide
    how = band, Softmax(0.3, dropped)
    out, lse = reference.forward(wide_q, wide_k, wide_v, *how)
    delta = (out * wide_dout).sum(-1).permute(1, 2, 0)
    expected = reference.backward(BackwardRows(wide_q, wide_dout, lse, delta, None), wide_k, wide_v, *how)
    found = kernel.forward(q, k, v, *how)
    gradients = kernel.backward(BackwardRows(q, dout, lse.float(), delta.float(), None), k, v, *how)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), (*found, *gradients), (out, lse, *expected), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{case}, {n}: {text}")


TABLES = {  # query heads, key heads, head dim, value head dim, band, dropout, query and key lengths by segment
    "full": (4, 2, 16, 24, FULL, 0.0, [(3, 70), (130, 1), (0, 0), (1, 40)]),
    "causal squares": (2, 2, 16, 16, CAUSAL, 0.0, [(1, 1), (70, 70), (129, 129)]),
    "window": (2, 1, 16, 16, Band(20, 0), 0.0, [(90, 90), (0, 0), (30, 45)]),
    "before the last key": (1, 1, 16, 16, Band(None, 7), 0.0, [(70, 90), (5, 3)]),
    "without an end": (1, 1, 16, 16, Band(62, None), 0.0, [(130, 70), (2, 9)]),
    "both ways": (1, 1, 16, 16, Band(33, 20), 0.0, [(70, 130), (40, 30)]),
    "dropout": (2, 1, 16, 16, CAUSAL, 0.2, [(66, 66), (3, 3)]),
    "many": (1, 1, 16, 16, FULL, 0.0, [(0, 0), (2, 1)] * 5 + [(5, 9)]),
    "none": (1, 1, 16, 16, FULL, 0.0, []),
}


def drawn(case: str) -> tuple[Segments, tuple[torch.Tensor, ...]]:
    """The table of a case, with gaps between its segments, and random q, k, v and dout, views with strides."""
    heads, key_heads, d, dv, band, _, lengths = TABLES[case]
    torch.manual_seed(0)
    segments, rows, keys = [], 2, 1
    for queries, others in lengths:
        segments.append((rows, queries, keys, others))
        rows, keys = rows + queries + queries % 3, keys + others + others % 2
    rows, keys = rows + 4, keys + 3
    table = Segments.of(np.array(segments, dtype=np.int64).reshape(-1, 4), band, rows, keys, torch.device("cpu"))
    sizes = (rows, heads, d), (keys, key_heads, d), (keys, key_heads, dv), (rows, heads, dv)
    return table, tuple(torch.randn(n, 2 * h, width)[:, h:] for n, h, width in sizes)


def rooms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Room for out, lse, dq, dk and dv, full of fives."""
    out, dq, dk, dv = (torch.full(x.shape, 5, dtype=x.dtype) for x in (dout, q, k, v))
    heads = q.size(1)
    return out, torch.full((2 * heads, q.size(0)), 5, dtype=q.dtype)[heads:], dq, dk, dv


def assert_equal(case: str, expected: tuple[torch.Tensor, ...], found: tuple[torch.Tensor, ...]) -> None:
    """Out, lse, dq, dk and dv in fp32 against those in fp64."""
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{case}, {n}: {text}")


def compare_table(case: str) -> None:
    """A table against the reference's loop, among rows of no segment, which keep what they hold."""
    import triton.language as tl

    from megatron_attn2d.attention.kernels.triton import blocks

    blocks._SEARCHED = tl.constexpr(4)  # several steps find the segments of these short tables
    heads, p = TABLES[case][0], TABLES[case][5]
    table, tensors = drawn(case)
    dropped = None
    if p:
        rows, keys = (torch.arange(x.size(0))[None] for x in tensors[:2])
        dropped = Dropout(p, 77).at(torch.arange(1), heads, rows + 9, keys)
    how = Softmax(0.3, dropped)
    results = []
    for kernel, dtype in ((ReferenceKernel(), torch.float64), (TritonKernel(), torch.float32)):
        q, k, v, dout = (x.to(dtype) for x in tensors)
        out, lse, dq, dk, dv = rooms(q, k, v, dout)
        kernel.forward_segments(q, k, v, table, how, (out, lse))
        delta = (out * dout).sum(-1).t().contiguous()
        kernel.backward_segments(BackwardRows(q, dout, lse, delta, None), k, v, table, how, (dq, dk, dv))
        results.append((out, lse, dq, dk, dv))
    assert_equal(case, *results)


def compare_short(case: str) -> None:
    """As `compare_table`; what rows of no segment hold may be NaN."""
    from megatron_attn2d.attention.kernels.triton import short

    *_, p, lengths = TABLES[case]
    if p or not lengths:
        return
    whole, tensors = drawn(case)
    q, k, v, dout = tensors
    _, table = whole.by_length(1000, 0)
    assert table is not None
    members = [torch.zeros(n, dtype=torch.bool) for n in (q.size(0), k.size(0))]
    for q_start, q_length, k_start, k_length in table:
        members[0][q_start : q_start + q_length] = True
        members[1][k_start : k_start + k_length] = True
    for x, mine in ((q, 0), (k, 1), (v, 1), (dout, 0)):
        x[~members[mine]] = torch.nan
    results = []
    for dtype in (torch.float64, torch.float32):
        q, k, v, dout = (x.to(dtype) for x in tensors)
        out, lse, dq, dk, dv = rooms(q, k, v, dout)
        if dtype == torch.float64:
            kernel = ReferenceKernel()
            kernel.forward_segments(q, k, v, table, Softmax(0.3), (out, lse))
            delta = (out * dout).sum(-1).t().contiguous()
            given = BackwardRows(q, dout, lse, delta, None)
            kernel.backward_segments(given, k, v, table, Softmax(0.3), (dq, dk, dv))
        else:
            short.attend(q, k, v, table, 0.3, (out, lse))
            short.differentiate(BackwardRows(q, dout, lse, None, out), k, v, table, 0.3, (dq, dk, dv))
        results.append((out, lse, dq, dk, dv))
    assert_equal(case, *results)


def seen_of_several_tables() -> None:
    """One launch finds who sees whom for all tables of a bundle, short ones and long ones."""
    from megatron_attn2d.attention.kernels.triton.short import _seen_of
    from megatron_attn2d.attention.segments import Bundle

    bundle, rng, made = Bundle(torch.device("cpu")), np.random.default_rng(0), []
    for count, band in ((3, CAUSAL), (300, FULL), (17, Band(4, 0)), (1, FULL)):
        gaps, q_lengths, k_lengths = rng.integers(0, 3, count), rng.integers(1, 9, count), rng.integers(9, 12, count)
        (q_ends, k_ends) = ((lengths + gaps).cumsum() for lengths in (q_lengths, k_lengths))
        host = np.stack((q_ends - q_lengths, q_lengths, k_ends - k_lengths, k_lengths))
        made.append((host, bundle.add(host, band, int(q_ends[-1]) + 5, int(k_ends[-1]) + 2, 8, 11)))
    for host, table in made:
        _, short = table.by_length(8, 0)
        assert short is not None
        for seen, columns, sides in zip(_seen_of(short), (host, host[[2, 3, 0, 1]]), (1, -1), strict=True):
            before, after = (2**30 if side is None else side for side in table.band[::sides])
            expected = torch.full_like(seen, -1)
            for start, length, other, others in columns.T.tolist():
                at = torch.arange(others - length, others)
                expected[0, start : start + length] = other + (at - before).clamp(min=0)
                expected[1, start : start + length] = other + (at + after + 1).clamp(max=others)
            assert torch.equal(seen, expected), table.band


def scale_by(scale: float) -> None:
    """Scales that are not above 0 are legal."""
    q, k, v = (torch.randn(70, 1, 1, 16) for _ in range(3))
    found, expected = (x.forward(q, k, v, CAUSAL, Softmax(scale)) for x in (TritonKernel(), ReferenceKernel()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def plant(value: float) -> None:
    """What is not finite in key or value 40 reaches the outputs of the rows that see it."""
    q, k, v = (torch.randn(70, 1, 1, 16) for _ in range(3))
    for planted in (k, v):
        where = planted.clone()
        where[40, 0, 0, 3] = value
        out, _ = TritonKernel().forward(q, *((where, v) if planted is k else (k, where)), CAUSAL, Softmax(0.3))
        finite = out.isfinite().all(-1).flatten()
        if planted is v or value != value:
            assert not finite[40:].any()
        else:  # an infinite score is the whole row where it is positive, and no part of it where it is negative
            assert torch.equal(finite[40:], q[40:, 0, 0, 3] < 0)
        assert planted is v or finite[:40].all()  # a probability of 0 times a value that is NaN is NaN


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not part of this torch")
def test_interpreted_kernels_agree_with_the_reference() -> None:
    # The interpreter is chosen when Triton is imported, hence a process of its own.
    code = (
        "from tests.attention.kernels.triton.test_attention import *; [compare(case) for case in CASES]; "
        "[compare_table(case) for case in TABLES]; [compare_short(case) for case in TABLES]; seen_of_several_tables(); "
        "[plant(float(value)) for value in ('nan', 'inf')]; [scale_by(scale) for scale in (-0.3, 0.0)]"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SHARED_KIB = {80: 163, 90: 227}  # what a block may have, CUDA C++ Programming Guide, compute capabilities


def compile_for(capability: int) -> None:
    """All kernels for bf16 with dropout under a table of causal segments: as `launch.run` takes them, one must fit."""
    import triton
    from triton.backends.compiler import GPUTarget

    class NoDevice:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    triton.runtime.driver.set_active(NoDevice())
    from megatron_attn2d.attention.kernels.triton import launch
    from megatron_attn2d.attention.kernels.triton.backward import _backward_keys, _backward_rows
    from megatron_attn2d.attention.kernels.triton.forward import _forward
    from megatron_attn2d.attention.kernels.triton.keep import _words

    q, rows, numbers = torch.empty(512, 1, 2, 128, dtype=torch.bfloat16), torch.empty(2, 512), torch.arange(512)
    words = numbers.int()
    _words.warmup(*(numbers,) * 3, *((numbers, 1),) * 2, *(words,) * 3, 2, 512, 512, 256, grid=(1, 1))
    x = launch.with_strides(q)
    same = (0.1, 2, 1, (512, 512), tuple(CAUSAL), (words, words, words, 512, 512, -4, 1.1), (words, 3, *(words,) * 4))
    for kernel, arguments, table in (
        (_forward, (x, x, x, x, rows, 512), launch.FORWARD if capability >= 90 else launch.FORWARD_AMPERE),
        (_backward_rows, (x, x, x, x, rows, rows, (512, 512), x, 0.1), launch.BACKWARD_ROWS),
        (_backward_keys, (x, x, x, x, rows, rows, (512, 512), x, x, 0.1), launch.BACKWARD_KEYS),
    ):
        blocks, how = launch.tuned(q, q, table)
        most = how.pop("num_stages")
        for stages in range(most, 0, -1):
            compiled = kernel.warmup(
                *arguments, *same, 128, 128, *blocks, launch.precision(q), grid=(1, 1), num_stages=stages, **how
            )
            if compiled.metadata.shared <= SHARED_KIB[capability] * 1024:
                break
        else:
            raise AssertionError(f"{kernel} does not fit")
        if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6):
            assert stages == most, "fewer stages are slower"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not part of this torch")
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_kernels_compile_without_a_gpu(capability: int) -> None:
    code = f"from tests.attention.kernels.triton.test_attention import compile_for; compile_for({capability})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Fits:
    """A kernel that a device has room for with few stages; it notes with how many it was started."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.started: list[int] = []

    def __getitem__(self, programs: tuple[int, int]) -> Callable[..., None]:
        def start(*arguments: object, num_stages: int, num_warps: int) -> None:
            from triton.runtime.errors import OutOfResources

            self.started.append(num_stages)
            if num_stages > self.most:
                raise OutOfResources(299008, 232448, "shared memory")

        return start


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not part of this torch")
@pytest.mark.parametrize(("most", "started"), [(3, [3, 3]), (2, [3, 2, 2]), (1, [3, 2, 1, 1]), (0, [3, 2, 1])])
def test_stages_that_do_not_fit_give_way_to_fewer(most: int, started: list[int]) -> None:
    from triton.runtime.errors import OutOfResources

    from megatron_attn2d.attention.kernels.triton import launch

    kernel, how = Fits(most), {"num_warps": 8, "num_stages": 3}
    with nullcontext() if most else pytest.raises(OutOfResources):
        for _ in range(2):  # the second call knows
            launch.run(kernel, (1, 1), (), (128, 128), how, torch.empty(1), dropout=False)
    assert kernel.started == started
