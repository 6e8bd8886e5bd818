"""What a CUDA graph can't hold: an attention that waits for numbers on their way from the GPU to the CPU."""

from __future__ import annotations

import gc
import weakref
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention import call as api
from megatron_attn2d.attention import packing as packing_module
from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.kernels.reference import ReferenceKernel
from megatron_attn2d.attention.packing import Packing
from tests.pool import RankPool

WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")
"""Methods of tensors that wait for the GPU."""
_aten = torch.ops.aten
_WAITS = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.is_nonzero.default,
}


class Blind(ReferenceKernel):
    """Takes tables and does not read them."""

    def forward_segments(self, *arguments: Any) -> None:
        for into in arguments[-1]:
            into.zero_()

    backward_segments = forward_segments


class Refuses(TorchDispatchMode):
    """Operations that wait for the GPU fail, those below autograd too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _WAITS, f"{func} waits for the GPU"
        return func(*args, **(kwargs or {}))


def waits_nowhere(rank: int, layout: tuple[int, ...] | None, **how: Any) -> bool:
    """A second call, forward and backward; in the first one ranks meet, and compare what they ask for."""
    group = dist.group.WORLD
    assert group is not None
    if layout is not None:
        heads, rows, cols, *tile = layout
        tiles = {"node_block": (tile[0], tile[1])} if tile else {}
        grid = Grid.from_group(group, ulysses_size=heads, rows=rows, cols=cols, **tiles)
    q, k, v = (torch.randn(16, 2, heads, 8).requires_grad_() for heads in (4, 2, 2))
    dout, sink, seed = torch.randn(16, 2, 4, 8), torch.randn(4).requires_grad_(), torch.tensor([3])
    patches: list[Any] = []
    if "cu_seqlens" in how:
        q, k, v, dout = (x[:, 0].detach().requires_grad_() for x in (q, k, v, dout))
        how |= {name: torch.tensor(totals) for name, totals in how.items() if name.startswith("cu_seqlens")}
        patches.append(mock.patch.object(Packing, "on_gpu", lambda totals: isinstance(totals, Tensor)))
        patches.append(mock.patch.object(api, "choose_kernel", return_value=Blind()))

    def call() -> tuple[Tensor, ...]:
        asked = {**how, "dropout": Dropout(how["dropout"], seed)} if "dropout" in how else dict(how)
        if asked.pop("sinks", False):
            asked["sink"] = sink
        attend = ring_attention(q, k, v, group, **asked) if layout is None else attention2d(q, k, v, grid, **asked)
        return torch.autograd.grad(attend, (q, k, v), dout)

    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        call()
        packing_module._packs.clear()  # a graph makes anew what depends on totals
        for name in WAITS:
            fails = mock.Mock(side_effect=AssertionError(f"Tensor.{name} waits for the GPU"))
            stack.enter_context(mock.patch.object(Tensor, name, fails))
        stack.enter_context(Refuses())
        return len(call()) == 3


@pytest.mark.parametrize(
    ("layout", "how"),
    [
        ((1, 2, 2), {}),
        ((1, 2, 2), {"causal": False}),
        ((1, 4, 1), {"overlap_groups": 2}),
        ((1, 1, 4), {"dropout": 0.1}),
        ((2, 2, 1), {"dropout": 0.1, "sinks": True}),
        ((2, 1, 2), {"window": (5, 0)}),
        ((4, 1, 1), {}),
        ((1, 2, 2, 1, 2), {}),
        ((1, 2, 2), {"cu_seqlens": (0, 24, 64)}),
        ((2, 2, 1), {"cu_seqlens": (0, 24, 64), "window": (5, 3), "causal": False}),
        ((1, 2, 2), {"cu_seqlens": (0, 20, 60, 60), "cu_seqlens_padded": (0, 24, 64, 64), "max_seqlen": 40}),
        ((4, 1, 1), {"cu_seqlens": (0, 0, 0)}),
        (None, {"cu_seqlens": (0, 24, 64)}),
        (None, {"cu_seqlens": (0, 20, 60, 60), "cu_seqlens_padded": (0, 24, 64, 64), "causal": False}),
        (None, {"dropout": 0.1}),
        (None, {"window": (5, 0), "sinks": True}),
    ],
    ids=str,
)
def test_nothing_waits_for_the_gpu(pool: RankPool, layout: tuple[int, ...] | None, how: dict[str, Any]) -> None:
    assert all(pool.run(waits_nowhere, 4, layout, **how))


@pytest.mark.parametrize("captured", [True, False])
def test_tables_that_a_graph_reads_outlive_other_packs(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays read them, however many packs come between."""
    monkeypatch.setattr(packing_module, "_captured", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    gpu = torch.device("cuda")
    packing = Packing.of([0, 8], None, 8, 2, gpu).over(2)
    packing.keep_if_captured()
    kept = weakref.ref(packing)
    del packing
    for tokens in range(3, 3 + packing_module._MOST_PACKS):
        Packing.of([0, 4 * tokens], None, 4 * tokens, 2, gpu)
    gc.collect()
    assert (kept() is not None) == captured


def test_what_waits_is_noticed() -> None:
    for wait in (Tensor.item, Tensor.nonzero, lambda x: x.masked_select(x > 0)):
        with pytest.raises(AssertionError, match="waits for the GPU"), Refuses():
            wait(torch.ones(1))
