"""attention2d between other work, as in training: many calls in a row, and memory that others used.

The other tests on GPUs make a call at a time, at small sizes. Here forward and backward passes of several layers are
apart, with products and allocations between. Every result is compared with one kernel over the whole sequence, and
outputs, whose sums have one order, bit for bit with those of the first call. Ranks that have a GPU each talk as they
would in training (NVLink). Where they share GPUs the sequence is shorter, and shorter yet on CPU ranks.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_attn2d import Grid, attention2d
from tests.attention.dense import zigzag
from tests.gpu.ranks import GpuRanks, take_gpu

GPUS = torch.cuda.device_count()
BOUND = 1.2e-2  # on the relative error, 2-norm; both sides round to bf16

pytestmark = pytest.mark.gpu


def amount(ranks: int) -> tuple[int, int, int]:
    """Tokens, steps and layers for this many ranks."""
    if ranks <= GPUS:
        return 2**16, 8, 4
    return (2**13, 3, 3) if GPUS else (2**8, 2, 2)


def whole_sequence(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """Output and gradients of all tokens by torch's kernel, [s, 1, heads, d]."""
    leaves = [x.permute(1, 2, 0, 3).detach().requires_grad_() for x in (q, k, v)]
    shared = [x.repeat_interleave(q.size(2) // k.size(2), 1) for x in leaves[1:]]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # any other might hold all scores
        out = scaled_dot_product_attention(leaves[0], *shared, is_causal=True)
    gradients = torch.autograd.grad(out, leaves, dout.permute(1, 2, 0, 3))
    return [x.detach().permute(2, 0, 1, 3) for x in (out, *gradients)]


def worst_errors(rank: int, axes: tuple[int, int, int], heads: tuple[int, int], groups: int | None) -> list[float]:
    """The largest relative errors of O, dQ, dK, dV in any step and layer on this rank."""
    device = take_gpu() if GPUS else torch.device("cpu")
    dist.init_process_group("nccl" if GPUS else "gloo")
    heads_ranks, rows, cols = axes
    size = heads_ranks * rows * cols
    tokens, steps, layers_in_step = amount(size)
    assert dist.group.WORLD is not None
    grid = Grid.from_group(dist.group.WORLD, rows=rows, cols=cols, ulysses_size=heads_ranks)
    generator = torch.Generator(device).manual_seed(0)
    whole = [
        torch.randn(tokens, 1, n, 128, generator=generator, device=device).to(torch.bfloat16)
        for n in (heads[0], heads[1], heads[1], heads[0])
    ]
    mine = zigzag(tokens, size, rank).to(device)
    references = [x[mine].float() for x in whole_sequence(*whole)]
    *shards, dout = (x[mine] for x in whole)
    del whole
    first: Tensor | None = None
    worst = [0.0] * 4
    for step in range(steps):
        layers: list[tuple[list[Tensor], Tensor]] = []
        for _ in range(layers_in_step):
            leaves = [x.clone().requires_grad_() for x in shards]
            layers.append((leaves, attention2d(*leaves, grid, overlap_groups=groups)))
            other_work(device, tokens, step)
        for leaves, out in reversed(layers):
            gradients = torch.autograd.grad(out, leaves, dout)
            other_work(device, tokens, step)
            first = out.detach() if first is None else first
            assert torch.equal(out, first), "forward passes differ"
            found = [out.detach(), *gradients]
            distances = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, references, strict=True)]
            worst = [max(pair) for pair in zip(worst, distances, strict=True)]
    return worst


def other_work(device: torch.device, tokens: int, step: int) -> None:
    """What an MLP would do: products, and memory taken, overwritten and given back, of another size in each step."""
    x = torch.full((tokens // 8 + 64 * step, 1024), float("nan"), device=device, dtype=torch.bfloat16)
    (x @ x.T[:, :1024]).add_(1.0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("heads", [(20, 20), (16, 4)], ids=str)
@pytest.mark.parametrize(
    "axes", [(1, 2, 1), (1, 1, 2), (1, 4, 1), (1, 1, 4), (1, 2, 2), (2, 2, 1), (1, 8, 1), (1, 4, 2), (1, 2, 4)], ids=str
)
def test_every_call_is_right(pool: GpuRanks, axes: tuple[int, int, int], heads: tuple[int, int], groups: int) -> None:
    size = axes[0] * axes[1] * axes[2]
    found = pool.run(worst_errors, size, axes, heads, groups, init_group=False)
    worst = [max(column) for column in zip(*found, strict=True)]
    print("O dQ dK dV:", *(f"{x:.2e}" for x in worst))
    assert max(worst) <= BOUND
