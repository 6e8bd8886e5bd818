"""What full recomputation keeps: the same gradients wherever it waits, and attention computed once where it is kept."""

from __future__ import annotations

import gc
import weakref
from argparse import Namespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_attn2d import Grid, attention2d
from megatron_attn2d.attention.kernels.reference import ReferenceKernel
from megatron_attn2d.megatron.host_store import HostStore
from megatron_attn2d.megatron.recomputation import attentions, keeping
from megatron_attn2d.megatron.upstream import cpu

LAYERS = 3


def gradients(offload: bool, attention: bool) -> tuple[list[torch.Tensor], int, int]:
    """Of recomputed layers: gradients, calls of the kernel, and layer inputs alive after the forward pass."""
    from megatron.core import tensor_parallel

    generator = torch.Generator().manual_seed(0)
    shape = {"dtype": torch.float64, "generator": generator}
    weights = [torch.randn(16, 16, **shape).requires_grad_() for _ in range(LAYERS)]
    table = torch.randn(12, 1, 16, **shape)  # as positions are: the same for all layers
    inputs: list[Any] = []
    calls: list[None] = []
    attend = ReferenceKernel.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return attend(*args, **kwargs)

    def layer(x: torch.Tensor, table: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(2, (2, 8)) for y in (x @ weight, x + table, x))
        return x + attention2d(q, k, v, Grid.single(), results=attentions()).flatten(2)

    with (
        cpu.seam(),
        keeping(Namespace(offload_activations=offload, keep_attention_outputs=attention)),
        mock.patch.object(ReferenceKernel, "forward", counted),
    ):
        leaf = torch.randn(12, 1, 16, **shape).requires_grad_()
        x = leaf * 1
        for weight in weights:
            inputs.append(weakref.ref(x))
            x = tensor_parallel.checkpoint(layer, False, x, table, weight)
        gc.collect()
        alive = sum(one() is not None for one in inputs)
        x.sum().backward()
    assert attentions() is None
    return [leaf.grad, *(weight.grad for weight in weights)], len(calls), alive


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_gradients_are_those_of_plain_recomputation(offload: bool, attention: bool) -> None:
    expected, _, _ = gradients(False, False)
    found, calls, alive = gradients(offload, attention)
    assert all(map(torch.equal, found, expected))
    assert calls == LAYERS * (1 if attention else 2)
    assert alive == (0 if offload else LAYERS)


def test_buffers_are_used_again() -> None:
    store = HostStore()
    tensors = [torch.full((4, 3), float(i)) for i in range(5)]
    for _ in range(2):
        bundles = [store.bundle() for _ in tensors]
        for bundle, tensor in zip(bundles, tensors, strict=True):
            assert bundle.put(tensor) == 0
            assert bundle.put(2 * tensor) == 1
        for bundle, tensor in zip(reversed(bundles), reversed(tensors), strict=True):
            assert torch.equal(bundle.take(1), 2 * tensor)
            assert torch.equal(bundle.take(0), tensor)
        assert store.bytes == sum(2 * tensor.nbytes for tensor in tensors)
    store.bundle().put(tensors[0])  # dropped before it is taken
    bundle = store.bundle()
    bundle.put(tensors[1])
    assert store.bytes == sum(2 * tensor.nbytes for tensor in tensors)
