"""What only GPUs run, on CPU ranks: kernels that ask for the output instead of delta, and Triton's, interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d import Grid, attention2d
from megatron_attn2d.attention import call as api
from megatron_attn2d.attention import merge, overlap
from megatron_attn2d.attention.kernels.base import BackwardRows
from megatron_attn2d.attention.kernels.reference import ReferenceKernel
from tests import pool as rank_pool
from tests.attention.dense import batch_first, dense_gradients, inputs, zigzag
from tests.pool import RankPool

GRIDS = [(r, p // r) for p in (2, 3, 4, 6, 8) for r in range(1, p + 1) if p % r == 0]
NEVER = float("inf")


class AsksForTheOutput(ReferenceKernel):
    """As vendors' kernels do."""

    needs_out = True

    def backward(self, rows: BackwardRows, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        assert rows.out is not None
        assert rows.delta is None
        return super().backward(rows, *others)


def kernel_of(name: str) -> Any:
    from megatron_attn2d.attention.kernels.triton.kernel import TritonKernel

    return {"output": AsksForTheOutput, "triton": TritonKernel}[name]()


def errors(
    rank: int,
    shape: tuple[int, int],
    kernel: str,
    causal: bool,
    heads: tuple[int, int] = (4, 2),
    moved: str = "",
    head_groups: int = 1,
    smallest_half: float = NEVER,
    dtype: torch.dtype = torch.float64,
    merges_on_gpu: bool = False,
) -> float:
    """Largest absolute error of O, dQ, dK, dV on this rank; `moved` names shards that lie batch-first in memory."""
    size = dist.get_world_size()
    whole = inputs(6 * size, 2, heads, dims=(8, 8), dtype=dtype)
    mine = zigzag(6 * size, size, rank)
    q, k, v = (
        (batch_first(x[mine]) if name in moved else x[mine]).requires_grad_()
        for name, x in zip("qkv", whole, strict=False)
    )
    assert dist.group.WORLD is not None
    grid = Grid.from_group(dist.group.WORLD, rows=shape[0], cols=shape[1])
    with (
        mock.patch.object(api, "choose_kernel", return_value=kernel_of(kernel)),
        mock.patch.object(merge, "on_gpu", return_value=merges_on_gpu),
        mock.patch.object(overlap, "SMALLEST_HALF", smallest_half),
    ):
        out = attention2d(q, k, v, grid, causal=causal, overlap_groups=head_groups)
        found = (out, *torch.autograd.grad(out, (q, k, v), whole[3][mine]))
    expected = dense_gradients(*whole, causal)
    return max((a.double() - b[mine]).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("head_groups", "smallest_half"), [(1, NEVER), (1, 0.0), (2, NEVER)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
def test_kernels_that_ask_for_the_output(
    pool: RankPool, grid: tuple[int, int], causal: bool, head_groups: int, smallest_half: float
) -> None:
    """The true one where queries stay, else one that has its delta."""
    how: dict[str, Any] = {"head_groups": head_groups, "smallest_half": smallest_half}
    assert max(pool.run(errors, grid[0] * grid[1], grid, "output", causal, **how)) <= 1e-12


def interpreted() -> None:
    """All of Triton's kernels under attention2d, fp32."""
    rank_pool.PRELOAD[:] = ["torch", "megatron_attn2d.attention.attention2d", "tests.pool"]
    pool = RankPool()
    try:
        merges: list[dict[str, Any]] = [
            {"head_groups": 2},
            {"smallest_half": 0.0},
            {"heads": (4, 4), "smallest_half": 0.0},
            *({"heads": (4, 4), "moved": names} for names in ("q", "k", "v")),
        ]
        for grid in ((2, 1), (1, 2), (2, 2)):
            for kernel, how in (("triton", {}), *(("output", how) for how in merges)):
                fixed: dict[str, Any] = {"dtype": torch.float32, "merges_on_gpu": True}
                found = max(pool.run(errors, grid[0] * grid[1], grid, kernel, True, **fixed, **how))
                assert found <= 5e-6, (grid, kernel, how, found)
    finally:
        pool.close()


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not part of this torch")
def test_interpreted_kernels_under_attention2d() -> None:
    # The interpreter is chosen when Triton is imported, hence a process of its own.
    code = "from tests.attention.test_gpu_path import interpreted\nif __name__ == '__main__': interpreted()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
