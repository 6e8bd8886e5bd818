"""The kernel seam: who is chosen, who is refused, and the reference kernel against autograd."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.kernels import choose_kernel
from megatron_attn2d.attention.kernels.base import BackwardRows, Request, Softmax
from megatron_attn2d.attention.kernels.ragged import inside, put, running
from megatron_attn2d.attention.kernels.reference import ReferenceKernel
from megatron_attn2d.attention.kernels.torch_sdpa import CudnnKernel, FlashKernel, _without_gaps
from megatron_attn2d.attention.layout import CAUSAL, FULL, Band
from megatron_attn2d.attention.merge import surrogate_out
from megatron_attn2d.attention.segments import Columns, Segments
from tests.attention.dense import dense_attention, inputs
from tests.pool import RankPool


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cpu_runs_the_reference(dtype: torch.dtype) -> None:
    assert choose_kernel("auto", Request("cpu", dtype, 64, 64)).name == "reference"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (("nonsense", "cpu", torch.float32, 64, 64), "backend='nonsense' is no attention kernel: choose one of auto, "),
        (
            ("cudnn", "cpu", torch.bfloat16, 64, 64),
            "backend='cudnn' needs a CUDA device .* choose one of auto, reference",
        ),
        (
            ("flash", "cuda", torch.float32, 64, 64),
            "serves bfloat16 and float16 .*: choose one of auto, triton, reference",
        ),
        (("triton", "cuda", torch.float64, 64, 64), "serves bfloat16, float16 and float32 .*: choose one of auto, ref"),
        (("triton", "cuda", torch.float32, 320, 64), "serves head dims up to 256"),
        (("cudnn", "cuda", torch.bfloat16, 100, 100), "multiples of 8"),
        (("flash", "cuda", torch.bfloat16, 128, 64), "serves equal head dims"),
        (("reference", "cpu", torch.int64, 64, 64), "serves fp16, bf16, fp32 and fp64"),
        (("auto", "cpu", torch.int64, 64, 64), "no attention kernel serves device cpu, torch.int64"),
        (
            ("cudnn", "cuda", torch.bfloat16, 64, 64, True),
            "no sliding windows .*head dims 64 and 64, windows.*: choose one of auto, .*reference",
        ),
        (
            ("flash", "cuda", torch.bfloat16, 64, 64, False, True),
            "has no dropout of probabilities .*, dropout.*: choose one of auto, .*reference",
        ),
    ],
)
def test_refusals_say_what_would_work(request_: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_kernel(request_[0], Request(*request_[1:]))


def test_a_transformer_engine_that_does_not_load_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "transformer_engine"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('undefined symbol: _ZTV5cudnn')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"can't load Transformer Engine: undefined symbol.*: choose one of auto, "):
        choose_kernel("transformer_engine", Request("cuda", torch.bfloat16, 64, 64))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_reference_against_autograd(heads: tuple[int, int], causal: bool) -> None:
    q, k, v, dout = inputs(11, 2, heads, dims=(8, 6))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*leaves, causal, scale=0.3)
    gradients = torch.autograd.grad(expected, leaves, dout)
    q, k, v = (x.detach() for x in leaves)
    kernel = choose_kernel("reference", Request("cpu", q.dtype, 8, 6))
    how = CAUSAL if causal else FULL, Softmax(0.3)
    out, lse = kernel.forward(q, k, v, *how)
    delta = (dout * out).sum(-1).permute(1, 2, 0)
    found = kernel.backward(BackwardRows(q, dout, lse, delta, None), k, v, *how)
    for a, b in zip((out, *found), (expected.detach(), *gradients), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("sizes", [(11, 11), (4, 11), (11, 7)])
@pytest.mark.parametrize("band", [Band(0, 0), Band(2, 1), Band(None, 2), Band(3, None), Band(0, None)])
def test_bands_end_at_the_bottom_right(band: Band, sizes: tuple[int, int]) -> None:
    queries, keys = sizes
    q, k, v, dout = inputs(queries, 2, (4, 2), dims=(8, 6), keys=keys)
    ahead = torch.arange(keys)[None, :] - torch.arange(queries)[:, None] - (keys - queries)
    unseen = (ahead < -(100 if band.left is None else band.left)) | (
        ahead > (100 if band.right is None else band.right)
    )
    seen = ~unseen.all(1)  # kernels are never asked for rows without a key
    kernel = choose_kernel("reference", Request("cpu", q.dtype, 8, 6, windows=True))
    out, lse = kernel.forward(q, k, v, band, Softmax(0.3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    wide_k, wide_v = (x.repeat_interleave(2, 2) for x in leaves[1:])
    scores = (torch.einsum("sbhd,tbhd->bhst", leaves[0], wide_k) * 0.3).masked_fill(unseen, -torch.inf)
    expected = torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), wide_v)
    torch.testing.assert_close(out[seen], expected[seen].detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, scores.logsumexp(-1).detach(), rtol=0, atol=1e-13)
    if seen.all():
        gradients = torch.autograd.grad(expected, leaves, dout)
        delta = (dout * out).sum(-1).permute(1, 2, 0)
        q, k, v = (x.detach() for x in leaves)
        found = kernel.backward(BackwardRows(q, dout, lse, delta, None), k, v, band, Softmax(0.3))
        for a, b in zip(found, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("on_the_host", [True, False])
@pytest.mark.parametrize(
    ("band", "segments"),
    [
        (FULL, [(0, 3, 1, 5), (3, 0, 6, 0), (5, 4, 6, 2)]),
        (CAUSAL, [(1, 3, 0, 3), (6, 2, 4, 2)]),
        (Band(0, None), [(0, 5, 0, 3), (6, 2, 4, 4)]),
        (FULL, []),
    ],
    ids=str,
)
def test_a_table_is_its_segments_one_by_one(
    band: Band, segments: list[tuple[int, int, int, int]], on_the_host: bool
) -> None:
    q, k, v, dout = inputs(9, 1, (4, 2), dims=(8, 6))
    kernel: Any = ReferenceKernel()
    how = Softmax(0.3)
    table = Segments.of(np.array(segments).reshape(-1, 4), band, 9, 9, q.device)
    table = table if on_the_host else replace(table, host=None)
    out, lse, dq, dk, dv = (
        dout.new_zeros(9, 4, 6),
        q.new_full((4, 9), 9.0),
        *(torch.zeros_like(x[:, 0]) for x in (q, k, v)),
    )
    kernel.forward_segments(q[:, 0], k[:, 0], v[:, 0], table, how, (out, lse))
    statistics = torch.rand(2, 4, 9, dtype=q.dtype)
    all_rows = BackwardRows(q, dout, *statistics, None)
    kernel.backward_segments(all_rows.each(lambda x: x[:, 0], lambda x: x), k[:, 0], v[:, 0], table, how, (dq, dk, dv))
    for q_start, q_length, k_start, k_length in segments:
        rows, keys = slice(q_start, q_start + q_length), slice(k_start, k_start + k_length)
        if q_length:
            expected = kernel.forward(q[rows], k[keys], v[keys], band, how)
            for found, one in zip((out[rows, None], lse[None, :, rows]), expected, strict=True):
                assert torch.equal(found, one)
            some = BackwardRows(q[rows], dout[rows], *statistics[:, None, :, rows], None)
            expected = kernel.backward(some, k[keys], v[keys], band, how)
            for found, one in zip((dq[rows], dk[keys], dv[keys]), expected, strict=True):
                assert torch.equal(found[:, None], one)
        out[rows], lse[:, rows], dq[rows], dk[keys], dv[keys] = 0, 9, 0, 0, 0
    assert not any(x.any() for x in (out, lse - 9, dq, dk, dv)), "other rows are left alone"


def test_stand_in_has_the_delta_of_the_output() -> None:
    torch.manual_seed(0)
    dout, out = torch.randn(2, 5, 1, 3, 16), torch.randn(2, 5, 1, 3, 16)
    dout[0, 2] = 0
    delta = (dout * out).sum(-1).permute(0, 2, 3, 1)
    instead = surrogate_out(dout, delta)
    torch.testing.assert_close((dout * instead).sum(-1).permute(0, 2, 3, 1), delta, rtol=1e-5, atol=1e-5)
    assert (instead.norm(dim=-1) <= out.norm(dim=-1) * (1 + 1e-5)).all()
    assert (instead[0, 2] == 0).all()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 1, 2), (4, 1, 2, 8), (4, 1, 2, 8)), r"q must be \[s/cp, b, heads, head dim\], got shape \[4, 1, 2\]"),
        (((4, 1, 3, 8), (4, 1, 2, 8), (4, 1, 2, 8)), "3 query heads are no multiple of 2 key/value heads"),
        (((5, 1, 2, 8), (5, 1, 2, 8), (5, 1, 2, 8)), "a shard of 5 tokens is no pair of zigzag chunks"),
        (((4, 1, 2, 8), (6, 1, 2, 8), (6, 1, 2, 8)), "don't fit"),
        (((4, 1, 2, 8), (4, 1, 2, 6), (4, 1, 2, 6)), "don't fit"),
    ],
)
def test_shapes_that_dont_fit_are_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention2d(*(torch.zeros(shape) for shape in shapes), Grid.single())


def test_the_output_of_one_rank_is_contiguous_as_that_of_a_grid() -> None:
    q = torch.zeros(8, 2, 4, 8)
    assert attention2d(q, q, q, Grid.single()).is_contiguous()


def distributed_tensors(rank: int) -> str:
    """What attention says to DTensors."""
    mesh = init_device_mesh("cpu", (2,))
    q = distribute_tensor(torch.zeros(8, 1, 2, 8), mesh, [Shard(0)])
    try:
        ring_attention(q, q, q, mesh.get_group())
    except ValueError as error:
        return str(error)
    return ""


def test_distributed_tensors_are_refused(pool: RankPool) -> None:
    assert pool.run(distributed_tensors, 2) == ["q is a DTensor: pass this rank's shard, q.to_local()"] * 2


def test_other_misuse_is_refused() -> None:
    q = torch.zeros(4, 1, 2, 8)
    with pytest.raises(ValueError, match=r"2 of k per rank don't fit a mask: .* causal=False and without a window"):
        attention2d(q, q[:2], q[:2], Grid.single())
    with pytest.raises(ValueError, match=r"4 tokens of q and 8 of k per rank don't fit a mask"):
        attention2d(q, *[torch.zeros(8, 1, 2, 8)] * 2, Grid.single(), causal=False, window=(3, 3))
    for window in ((-2, 0), (), 5, (1.5, 0)):
        with pytest.raises(ValueError, match=rf"window={re.escape(str(window))} is no window: choose \(left, right\)"):
            attention2d(q, q, q, Grid.single(), window=window)
    with pytest.raises(
        ValueError, match=r"a shard of 1 tokens is no pair of zigzag chunks .* the nearest shards have 2 t"
    ):
        attention2d(q[:1], q[:1], q[:1], Grid.single())
    with pytest.raises(
        ValueError, match=r"no attention kernel serves .*float8.*: reference serves fp16, bf16, fp32 and"
    ):
        attention2d(*[q.to(torch.float8_e4m3fn)] * 3, Grid.single())
    with pytest.raises(ValueError, match=r"cu_seqlens must be a tensor of int32 or int64 .*, got torch.float32"):
        attention2d(*[q[:, 0]] * 3, Grid.single(), cu_seqlens=torch.tensor([0.0, 4.0]))
    for totals in ([0, 4.0], [torch.tensor(0), torch.tensor(4)]):
        with pytest.raises(ValueError, match="cu_seqlens must hold running totals of tokens, as int"):
            attention2d(*[q[:, 0]] * 3, Grid.single(), cu_seqlens=totals)
    with pytest.raises(ValueError, match="must have a head dim of 1 or more"):
        attention2d(q[..., :0], q[..., :0], q, Grid.single())
    with pytest.raises(ValueError, match="cu_seqlens_padded comes without cu_seqlens"):
        attention2d(q, q, q, Grid.single(), cu_seqlens_padded=[0, 4])
    with pytest.raises(ValueError, match=r"cu_seqlens \[0, 0\] pack no token"):
        attention2d(*[q[:0, 0]] * 3, Grid.single(), cu_seqlens=[0, 0])
    for seed in (2**64 - 1, torch.tensor([1, 2]), torch.tensor([1.0])):
        with pytest.raises(ValueError, match=r"dropout seed.*: choose "):
            Dropout(0.1, seed)
    for scale in (torch.tensor(0.5, requires_grad=True), float("nan"), "0.5"):
        with pytest.raises(ValueError, match=r"softmax_scale=.* is no finite number: pass a float, or None for 1/sqrt"):
            attention2d(q, q, q, Grid.single(), softmax_scale=scale)
    with pytest.raises(ValueError, match=r"sink must be one score for each of the 2 query heads"):
        attention2d(q, q, q, Grid.single(), sink=torch.zeros(3))
    with pytest.raises(ValueError, match=r"sink must be a tensor \[2\], one score for each query head: got 0.5"):
        attention2d(q, q, q, Grid.single(), sink=0.5)
    with pytest.raises(ValueError, match=r"dropout=0.1 is no Dropout: pass attention.dropout.Dropout\(p, seed\)"):
        attention2d(q, q, q, Grid.single(), dropout=0.1)
    with pytest.raises(ValueError, match=r"grid is a NoneType, no Grid: Grid.from_group"):
        attention2d(q, q, q, None)
    with pytest.raises(ValueError, match="group is a Grid, not a process group: pass that of the context ranks"):
        ring_attention(q, q, q, Grid.single())
    with pytest.raises(ValueError, match=r"q of packed sequences must be \[t/cp, heads, head dim\]"):
        attention2d(q, q, q, Grid.single(), cu_seqlens=[0, 4])
    with pytest.raises(ValueError, match="packed sequence 1 has 3 tokens, but 2 in cu_seqlens_padded"):
        attention2d(*[q[:, 0]] * 3, Grid.single(), cu_seqlens=[0, 1, 4], cu_seqlens_padded=[0, 2, 4])
    with pytest.raises(ValueError, match=r"cu_seqlens .* and cu_seqlens_padded .* don't fit"):
        attention2d(*[q[:, 0]] * 3, Grid.single(), cu_seqlens=[0, 1, 4], cu_seqlens_padded=[0, 4])
    with pytest.raises(ValueError, match="must share dtype and device"):
        attention2d(q, q.double(), q, Grid.single())
    with pytest.raises(ValueError, match="floating-point"):
        attention2d(*[q.long()] * 3, Grid.single())
    with pytest.raises(ValueError, match="overlap_groups=3 does not divide the 2 key/value heads"):
        attention2d(q, q, q, Grid.single(), overlap_groups=3)


def test_plain_torch_on_a_gpu_is_a_warning_with_the_reasons(caplog: pytest.LogCaptureFixture) -> None:
    kernel = choose_kernel("auto", Request("cuda", torch.float64, 64, 64, windows=True))
    assert kernel.name == "reference"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cudnn serves full and causal attention, no sliding windows" in caplog.text


@pytest.mark.parametrize("kernel", [CudnnKernel, FlashKernel])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_gpu_kernels_call_the_operators_that_this_torch_has(
    kernel: type[CudnnKernel | FlashKernel], heads: tuple[int, int]
) -> None:
    """Shapes and signatures alone, without a GPU; values are checked in tests/gpu."""
    bands = [FULL] if kernel is CudnnKernel else [FULL, Band(20, 3)]
    with FakeTensorMode():
        q = torch.empty(64, 1, heads[0], 128, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(96, 1, heads[1], 128, device="cuda", dtype=torch.bfloat16)
        for band in bands:
            out, lse = kernel().forward(q, k, k, band, Softmax(1.0))
            assert (out.shape, lse.shape, lse.dtype) == (q.shape, (1, heads[0], 64), torch.float32)
            gradients = kernel().backward(BackwardRows(q, out, lse, None, out), k, k, band, Softmax(1.0))
            assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]


def test_flash_attention_2_takes_tables_by_the_operators_that_this_torch_has() -> None:
    numbers = np.array([(2, 20, 0, 30), (22, 0, 30, 0), (40, 24, 30, 66)])
    with FakeTensorMode():
        columns = Columns(*(torch.empty(n, device="cuda", dtype=torch.int32) for n in (4, 3, 4, 3)))
        table = Segments(lambda: columns, CAUSAL, 24, 66, numbers)
        q, k = (torch.empty(n, h, 128, device="cuda", dtype=torch.bfloat16) for n, h in ((64, 8), (96, 2)))
        lse = torch.empty(8, 64, device="cuda")
        FlashKernel().forward_segments(q, k, k, table, Softmax(1.0), (q, lse))
        FlashKernel().backward_segments(BackwardRows(q, q, lse, None, q), k, k, table, Softmax(1.0), (q, k, k))


def test_flash_attention_2_sees_gaps_as_sequences_without_partners() -> None:
    table = Segments.of(np.array([(2, 3, 0, 4), (1, 0, 1, 0), (7, 2, 6, 1)]), FULL, 10, 8, torch.device("cpu"))
    q_totals, k_totals = _without_gaps(table)
    q_lengths, k_lengths = q_totals.diff().tolist(), k_totals.diff().tolist()
    sequences = zip(q_totals[:-1].tolist(), q_lengths, k_totals[:-1].tolist(), k_lengths, strict=True)
    assert [each for each in sequences if each[1] and each[3]] == [(2, 3, 0, 4), (7, 2, 6, 1)]
    assert (sum(q_lengths), sum(k_lengths), min(q_lengths + k_lengths)) == (10, 8, 0)


def test_results_reach_the_rows_of_a_table_alone() -> None:
    starts, lengths = torch.tensor([1, 3, 3, 6], dtype=torch.int32), torch.tensor([2, 0, 2], dtype=torch.int32)
    rows = inside(starts, lengths, 6)
    assert rows.tolist() == [False, True, True, True, True, False]
    into, found = torch.zeros(2, 6), torch.ones(2, 6)
    put(into.t(), found.t(), rows)
    assert into.tolist() == [rows.long().tolist()] * 2
    assert running(lengths).tolist() == [0, 2, 2, 4]


def test_the_benchmark_of_kernels_times_each_mask() -> None:
    script = Path(__file__).parents[3] / "benchmarks/benchmark_kernels.py"
    sizes = ["--device", "cpu", "--tokens", "32", "--heads", "1", "--head-dims", "8x4", "--window", "4", "--calls", "1"]
    command = [sys.executable, str(script), *sizes, "--documents", "3"]
    _, *lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [re.fullmatch(r"8x4 +(\w+) +reference +([\d.]+) / +([\d.]+) .*", line) for line in lines]
    masks = ["full", "causal", "window", "packed", "packed_full", "packed_window", "dropout", "packed_dropout"]
    assert [row and row[1] for row in rows] == masks
    assert all(row and float(row[2]) > 0 and float(row[3]) > 0 for row in rows)
