"""The installed Megatron-Core has what we use of it, and our module what Megatron-Core uses of a core attention."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron.test_core_attention import built
from tests.megatron.upstream.sources import moved, uses
from tests.pool import RankPool


def test_nothing_of_upstreams_that_we_use_has_moved() -> None:
    assert moved() == []
    assert len(list(uses())) > 100


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from megatron.core.utils import no_name\n", "megatron.core.utils.no_name, used in one.py:1, is gone"),
        ("from megatron.core.no_module import name\n", "megatron.core.no_module.name, used in one.py:1, is gone"),
        (
            "from megatron.core import parallel_state as mpu\nmpu.no_name()\n",
            "megatron.core.parallel_state.no_name, used in one.py:2, is gone",
        ),
        (
            "from megatron.core.utils import divide\n\n\ndivide(1, 2, rounded=True)\n",
            "megatron.core.utils.divide is no longer called as in one.py:4: got an unexpected keyword argument",
        ),
    ],
)
def test_what_moved_is_named(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(source)
    assert any(line.startswith(message) for line in moved(tmp_path))


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "args", "kwargs"}


def parameters_in_source(module: Any, cls: str, function: str) -> set[str]:
    """Of a class that cannot be imported here; of the last one of that name."""
    [*_, found] = [n for n in ast.walk(ast.parse(inspect.getsource(module))) if getattr(n, "name", "") == cls]
    [method] = [n for n in found.body if getattr(n, "name", "") == function]
    return {argument.arg for argument in (*method.args.args, *method.args.kwonlyargs)} - {"self"}


def test_it_takes_what_upstream_hands_to_a_core_attention() -> None:
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer.attention import CoreAttentionBuilder, CoreAttentionInterface
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_attn2d.megatron.core_attention import ContextParallelAttention as Ours

    kernels_own = {"num_splits"}  # of FlashAttention, in inference
    for function in ("__init__", "forward"):
        ours = parameters(getattr(Ours, function))
        assert parameters(getattr(DotProductAttention, function)) <= ours
        theirs = parameters_in_source(transformer_engine, "TEDotProductAttention", function)
        assert len(theirs) > 5
        assert theirs - kernels_own <= ours
    assert parameters(CoreAttentionBuilder.__call__) <= parameters(Ours.__init__)
    assert list(inspect.signature(Ours.forward).parameters) == list(
        inspect.signature(CoreAttentionInterface.forward).parameters
    )


def contract(rank: int) -> dict[str, Any]:
    """What the tools of Megatron and others look at, in a module on a grid of 2 x 1."""
    import torch.distributed as dist

    with built(2, "attention2d", [2, 1]) as module:
        module.load_state_dict({}, strict=True)
        sharded = module.sharded_state_dict("layers.0.", metadata={"dp_cp_group": dist.group.WORLD})
        inputs = [torch.randn(8, 1, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
        kept: list[Tensor] = []

        def offload(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor.clone()

        def gradients() -> tuple[Tensor, ...]:
            return torch.autograd.grad(module(*inputs, None).square().sum(), inputs)

        expected = gradients()
        with torch.autograd.graph.saved_tensors_hooks(offload, lambda tensor: tensor.clone()):
            offloaded = gradients()
        recomputed = torch.autograd.grad(
            torch.utils.checkpoint.checkpoint(module, *inputs, None, use_reentrant=False).square().sum(), inputs
        )
        return {
            "module": isinstance(module, torch.nn.Module),
            "state": [dict(module.state_dict()), sharded, list(module.parameters()), list(module.buffers())],
            "offloaded": [any(tensor is x for tensor in kept) for x in inputs],
            "same": [
                all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
                for found in (offloaded, recomputed)
            ],
        }


def test_state_offloading_and_recomputation(pool: RankPool) -> None:
    for found in pool.run(contract, 2):
        assert found == {"module": True, "state": [{}, {}, [], []], "offloaded": [True] * 3, "same": [True] * 2}
