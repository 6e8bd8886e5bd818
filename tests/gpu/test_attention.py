"""attention2d and the ring on GPUs against dense float64, by kernel, dtype, head dim, grid and head groups.

Ranks pose as hosts, on every machine alike: what goes over links is in `test_messages`.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention import overlap
from megatron_attn2d.attention.dropout import Dropout
from tests.attention.dense import batch_first, zigzag
from tests.gpu.ranks import GpuRanks, start

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BOUNDS = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 2e-5, torch.float64: 1e-12}
GRIDS = [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1), (2, 3), (3, 2), (2, 4), (4, 2)]


def dense(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> list[Tensor]:
    """Output and gradients in float64 on the GPU."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    wide_q, wide_k, wide_v = (x.permute(1, 2, 0, 3) for x in leaves)
    wide_k, wide_v = (x.repeat_interleave(q.size(2) // k.size(2), dim=1) for x in (wide_k, wide_v))
    scores = wide_q @ wide_k.transpose(-1, -2) * q.size(3) ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    out = (scores.softmax(-1) @ wide_v).permute(2, 0, 1, 3)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.double())]


def errors(
    rank: int,
    mode: str,
    grid: tuple[int, int],
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (64, 64),
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    chunk: int = 128,
    causal: bool = True,
    backend: str = "auto",
    head_groups: int | None = None,
    logits: float = 1.0,
    head_ranks: int = 1,
    deterministic: bool = False,
    smallest_half: float = overlap.SMALLEST_HALF,
    moved: str = "",
) -> list[float]:
    """Relative errors (2-norm) of O, dQ, dK, dV on this rank; what a second run must equal bit for bit, does."""
    start()
    torch.use_deterministic_algorithms(deterministic)
    size = head_ranks * grid[0] * grid[1]
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1])]
    whole = [
        torch.randn(2 * size * chunk, batch, h, d, generator=generator, device="cuda").to(dtype) for h, d in shapes
    ]
    whole[0] *= logits
    mine = zigzag(2 * size * chunk, size, rank).cuda()
    assert dist.group.WORLD is not None
    layout = Grid.from_group(dist.group.WORLD, rows=grid[0], cols=grid[1], ulysses_size=head_ranks)
    runs = []
    for _ in range(2):
        shards = (batch_first(x[mine]) if name in moved else x[mine] for name, x in zip("qkv", whole, strict=False))
        q, k, v = (x.requires_grad_() for x in shards)
        with mock.patch.object(overlap, "SMALLEST_HALF", smallest_half):
            if mode == "ring":
                out = ring_attention(q, k, v, dist.group.WORLD, causal=causal, backend=backend)
            else:
                out = attention2d(q, k, v, layout, causal=causal, backend=backend, overlap_groups=head_groups)
            runs.append([out.detach(), *torch.autograd.grad(out, (q, k, v), whole[3][mine])])
    # Fast backward kernels add dQ up in no fixed order; all else has one.
    all_ordered = deterministic or backend == "reference" or dtype in (torch.float32, torch.float64)
    ordered = len(runs[0]) if all_ordered else 1
    assert all(torch.equal(a, b) for a, b in zip(*(run[:ordered] for run in runs), strict=True)), "two runs differ"
    references = dense(*whole, causal=causal)
    return [((a.double() - b[mine]).norm() / b[mine].norm()).item() for a, b in zip(runs[0], references, strict=True)]


def check(pool: GpuRanks, mode: str, grid: tuple[int, int], **case: object) -> None:
    heads: int = case.get("head_ranks", 1)  # type: ignore[assignment]
    found = pool.run(errors, heads * grid[0] * grid[1], mode, grid, init_group=False, hosts=True, **case)
    bound = BOUNDS[case.get("dtype", torch.bfloat16)]  # type: ignore[index]
    worst = [max(column) for column in zip(*found, strict=True)]
    print("O dQ dK dV:", *(f"{x:.2e}" for x in worst))
    assert max(worst) <= bound


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
def test_grids(pool: GpuRanks, grid: tuple[int, int], causal: bool) -> None:
    check(pool, "attention2d", grid, causal=causal)


@pytest.mark.parametrize("mode", ["attention2d", "ring"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_dtypes(pool: GpuRanks, mode: str, dtype: torch.dtype) -> None:
    check(pool, mode, (2, 2), dtype=dtype)


@pytest.mark.parametrize(
    "dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)], ids=str
)
def test_head_dims(pool: GpuRanks, dims: tuple[int, int]) -> None:
    check(pool, "attention2d", (2, 1), dims=dims)
    check(pool, "attention2d", (1, 2), dims=dims)


@pytest.mark.parametrize("backend", ["flash_attn_4", "cudnn", "transformer_engine", "flash", "reference"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)], ids=str)
def test_backends_and_grouped_heads(pool: GpuRanks, heads: tuple[int, int], backend: str) -> None:
    if (package := {"flash_attn_4": "cutlass", "transformer_engine": "transformer_engine"}.get(backend)) is not None:
        pytest.importorskip(package)
    check(pool, "attention2d", (2, 2), heads=heads, backend=backend)


@pytest.mark.parametrize("mode", ["attention2d", "ring"])
def test_deterministic_algorithms_give_the_same_bits(pool: GpuRanks, mode: str) -> None:
    check(pool, mode, (2, 2), chunk=512, heads=(8, 4), dims=(128, 128), deterministic=True)


@pytest.mark.parametrize(("head_ranks", "grid"), [(2, (1, 1)), (2, (2, 1)), (2, (1, 2)), (2, (2, 2)), (4, (2, 1))])
def test_head_axis(pool: GpuRanks, head_ranks: int, grid: tuple[int, int]) -> None:
    check(pool, "attention2d", grid, heads=(8, 4), head_ranks=head_ranks)


@pytest.mark.parametrize("chunk", [1, 3, 127])
@pytest.mark.parametrize("mode", ["attention2d", "ring"])
def test_odd_chunks(pool: GpuRanks, mode: str, chunk: int) -> None:
    check(pool, mode, (2, 2), chunk=chunk)


@pytest.mark.parametrize("head_groups", [1, 2, 4, 8])
@pytest.mark.parametrize("batch", [1, 2])
def test_head_groups_and_batch(pool: GpuRanks, batch: int, head_groups: int) -> None:
    check(pool, "attention2d", (2, 2), heads=(16, 8), batch=batch, head_groups=head_groups)


@pytest.mark.parametrize("moved", ["q", "k", "v", "kv"])
def test_shards_may_lie_in_memory_in_other_orders(pool: GpuRanks, moved: str) -> None:
    check(pool, "attention2d", (2, 1), heads=(4, 4), batch=2, moved=moved)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_half_of_the_heads_after_the_tile(pool: GpuRanks, grid: tuple[int, int], batch: int) -> None:
    check(pool, "attention2d", grid, heads=(8, 4), batch=batch, head_groups=1, smallest_half=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(pool: GpuRanks, dtype: torch.dtype) -> None:
    check(pool, "attention2d", (2, 2), logits=12.0, dtype=dtype, chunk=512)


def replayed(rank: int, layout: tuple[int, int, int] | None, p: float) -> list[bool]:
    """Whether output and gradients of two replays of a CUDA graph equal those of plain calls on the same inputs.

    Args:
        rank: of two.
        layout: U, R, C; None for a ring.
        p: of dropout, whose seed each replay draws: the last answer is whether the two drew different ones.
    """
    start()
    group = dist.group.WORLD
    assert group is not None
    heads, rows, cols = layout or (1, 1, 1)
    grid = Grid.single() if layout is None else Grid.from_group(group, ulysses_size=heads, rows=rows, cols=cols)
    q, k, v = (torch.randn(512, 1, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    dout = torch.randn_like(q)

    def call(seed: Tensor) -> list[Tensor]:
        dropout = Dropout(p, seed) if p else None
        if layout is None:
            out = ring_attention(q, k, v, group, dropout=dropout)
        else:
            out = attention2d(q, k, v, grid, dropout=dropout)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    torch.use_deterministic_algorithms(True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(torch.ones(1, dtype=torch.int64, device="cuda"))
    torch.cuda.synchronize()
    torch.cuda.manual_seed(1)  # the same on both ranks
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        seed = torch.randint(2**62, (1,), device="cuda")
        static = call(seed)
    same, seeds = [], []
    for _ in range(2):
        with torch.no_grad():
            for x in (q, k, v):
                x.copy_(torch.randn_like(x))
        graph.replay()
        seeds.append(seed.item())
        same += [torch.equal(a, b) for a, b in zip(static, call(seed), strict=True)]
    graph.reset()
    return [*same, seeds[0] != seeds[1]]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("layout", [(1, 2, 1), (1, 1, 2), (2, 1, 1), None], ids=str)
def test_cuda_graph(pool: GpuRanks, layout: tuple[int, int, int] | None, p: float) -> None:
    assert all(map(all, pool.run(replayed, 2, layout, p, init_group=False, hosts=True)))
