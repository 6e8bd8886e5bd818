"""Recomputed layers on a GPU: what waits in pinned memory comes back in time, and leaves the GPU meanwhile.

pytest -m gpu tests/gpu/test_recomputation.py -s
"""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from megatron_attn2d import Grid, attention2d
from megatron_attn2d.megatron.recomputation import attentions, keeping

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYERS, TOKENS, WIDTH, STEPS = 12, 8192, 1024, 3
SHARD = TOKENS * WIDTH * 2
"""Bytes of a layer's input."""


def train(offload: bool, attention: bool) -> tuple[list[torch.Tensor], int]:
    """Gradients of some steps of recomputed layers, and by how many bytes a forward pass made the GPU fuller."""
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    initialize_rng_tracker()
    torch.manual_seed(0)
    shape = {"device": "cuda", "dtype": torch.bfloat16}
    weights = [(torch.randn(WIDTH, WIDTH, **shape) / WIDTH**0.5).requires_grad_() for _ in range(LAYERS)]

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(2, (8, WIDTH // 8)) for y in (x @ weight, x, torch.sin(x)))
        return x + attention2d(q, k, v, Grid.single(), results=attentions()).flatten(2)

    found, left = [], 0
    with keeping(Namespace(offload_activations=offload, keep_attention_outputs=attention)):
        for step in range(STEPS):
            leaf = torch.randn(TOKENS, 1, WIDTH, **shape).requires_grad_()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            x = leaf * 1
            for weight in weights:
                x = tensor_parallel.checkpoint(layer, False, x, weight)
            torch.cuda.synchronize()
            left = torch.cuda.memory_allocated() - before
            x.float().square().sum().backward()
            assert leaf.grad is not None
            found.append(leaf.grad)
            if step + 1 < STEPS:
                continue
            found += [weight.grad for weight in weights if weight.grad is not None]
    return found, left


@pytest.mark.parametrize("attention", [False, True])
def test_offloaded_layers_have_the_gradients_of_plain_recomputation(attention: bool) -> None:
    expected, all_of_them = train(False, False)
    found, left = train(True, attention)
    apart = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(found, expected, strict=True))
    print(f"attention kept {attention}: apart {apart:.1e}, {(all_of_them - left) / SHARD:.1f} inputs left the GPU")
    assert apart <= 1e-2  # the kernels' sums in the backward pass have no fixed order
    assert all_of_them - left >= (LAYERS - 2) * SHARD
