"""torch.compile around a layer: attention breaks its graph, and outputs and gradients are the same."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from megatron_attn2d import Grid, attention2d, ring_attention
from tests.pool import RankPool


class Layer(torch.nn.Module):
    """A projection, attention over the ranks, a projection."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mode = mode
        self.first, self.second = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        group = dist.group.WORLD
        assert group is not None
        self.group = group
        self.grid = Grid.from_group(group, rows=2, cols=dist.get_world_size() // 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.first(x).unflatten(2, (6, 8)).chunk(3, 2)
        call = {"window": (5, 0)}
        if self.mode == "ring":
            out = ring_attention(q, k, v, self.group, **call)
        else:
            out = attention2d(q, k, v, self.grid, **call)
        return x + self.second(out.flatten(2)).relu()


def compiled(rank: int, mode: str) -> tuple[float, int]:
    """Largest difference of outputs and gradients from eager ones, and how many graphs were compiled."""
    counter = CompileCounterWithBackend("aot_eager")  # which also traces gradients, as inductor does
    layer, generator = Layer(mode), torch.Generator().manual_seed(rank)
    x = torch.randn(8, 2, 16, generator=generator, requires_grad=True)
    results = []
    for function in (layer, torch.compile(layer, backend=counter)):
        out = function(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    torch._dynamo.reset()
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True)), counter.frame_count


def test_a_compiled_layer_is_the_layer(pool: RankPool) -> None:
    for mode in ("attention2d", "ring"):
        for error, graphs in pool.run(compiled, 2, mode):
            assert error <= 1e-5
            assert graphs >= 1
