"""What waits for the backward pass is what it needs, no larger tensor that an input is a part of; and its layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention.call import compact_for_save, prepare, run
from megatron_attn2d.attention.kernels.base import BackwardRows
from megatron_attn2d.attention.kernels.reference import ReferenceKernel
from megatron_attn2d.attention.single_rank import SingleRank
from tests.attention.dense import dense_gradients, zigzag
from tests.pool import RankPool

TOKENS, HEADS, DIM = 12, 2, 8  # of a rank
PARTS = {  # which of q, k and v are parts of one projection's output; what is saved in shards of Q; whether that lives
    "no positions": ("qkv", 4, True),
    "rotary positions": ("v", 4, False),
    "rotary queries": ("kv", 5, True),  # two copies would free one
}


def attend(mode: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    world = dist.group.WORLD
    assert world is not None
    if mode == "ring":
        return ring_attention(q, k, v, world)
    rows, cols = map(int, mode.split("x"))
    return attention2d(q, k, v, Grid.from_group(world, rows=rows, cols=cols))


def saved(rank: int, mode: str, parts: str) -> tuple[float, bool, float]:
    """What the backward pass keeps, in shards of Q; whether the projection's output lives; error of its gradient."""
    ranks = dist.get_world_size()
    whole, dout = (torch.randn(ranks * TOKENS, 1, n, DIM, dtype=torch.float64) for n in (3 * HEADS, HEADS))
    dist.broadcast(whole, 0)
    dist.broadcast(dout, 0)
    mine = zigzag(ranks * TOKENS, ranks, rank)
    projected = whole[mine].requires_grad_()
    mixed = projected * 1.0
    q, k, v = (x if name in parts else x * 1.0 for name, x in zip("qkv", mixed.split(HEADS, 2), strict=True))
    held = StorageWeakRef(mixed.untyped_storage())
    out = attend(mode, q, k, v)
    del mixed, q, k, v
    assert out.grad_fn is not None
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in out.grad_fn.saved_tensors if x is not None
    }  # type: ignore[attr-defined]
    lives = not held.expired()
    (gradient,) = torch.autograd.grad(out, projected, dout[mine])
    expected = torch.cat(dense_gradients(*whole.split(HEADS, 2), dout, True)[1:], 2)[mine]
    return sum(storages.values()) / (TOKENS * HEADS * DIM * 8), lives, (gradient - expected).abs().max().item()


@pytest.mark.parametrize(
    ("width", "differentiated", "recorded", "copied"),
    [
        (3, True, True, True),
        (3, True, False, False),  # the first pass of a checkpoint, evaluation
        (3, False, True, False),
        (2, True, True, True),
        (1, True, True, False),
    ],
)
def test_copies_are_made_where_they_free_memory(width: int, differentiated: bool, recorded: bool, copied: bool) -> None:
    """Of values that are one of `width` parts of a storage."""
    q, k = (torch.randn(4, 1, 1, 8, requires_grad=differentiated) for _ in range(2))
    v = torch.randn(4, 1, width, 8, requires_grad=differentiated)[:, :, -1:]
    with torch.set_grad_enabled(recorded):
        kept = compact_for_save(q, k, v)
    assert [mine is x for mine, x in zip(kept, (q, k, v), strict=True)] == [True, True, not copied]
    assert torch.equal(kept[2], v)


@pytest.mark.parametrize(("parts", "shards", "lives"), PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("mode", ["2x1", "1x2", "2x2", "1x1", "ring"])
def test_no_larger_tensor_is_kept(mode: str, parts: str, shards: int, lives: bool, pool: RankPool) -> None:
    ranks = {"1x1": 1, "2x2": 4}.get(mode, 2)
    for found, living, error in pool.run(saved, ranks, mode, parts):
        assert found == shards + 1 / DIM  # q, k, v, the output, and its log-sum-exp
        assert living == lives
        assert error < 1e-12


class AsksForContiguousHeads(ReferenceKernel):
    """As the seam promises, and as kernels in Triton assert."""

    needs_out = True

    def forward_segments(self, *arguments: Any) -> None:
        assert all(x.stride(-1) == 1 for x in arguments[:3])
        super().forward_segments(*arguments)

    def backward_segments(self, rows: BackwardRows, *arguments: Any) -> None:
        assert rows.out is not None
        assert all(x.stride(-1) == 1 for x in (rows.q, rows.dout, rows.out, *arguments[:2]))
        super().backward_segments(rows, *arguments)


def test_kernels_are_given_a_contiguous_last_dim() -> None:
    """Inputs have another, and the gradient of a sum is one number that is expanded."""
    gradients = []
    whole = torch.randn(3, HEADS, TOKENS, DIM, dtype=torch.float64)
    for lie in (lambda x: x.contiguous(), lambda x: x.mT.contiguous().mT):
        inputs = [lie(x.transpose(0, 1)).requires_grad_() for x in whole]
        call, *shards = prepare(
            *inputs,
            (None,),
            1,
            causal=True,
            window=None,
            sink=None,
            dropout=None,
            cu_seqlens=(0, 4, 10),
            cu_seqlens_padded=None,
            max_seqlen=None,
            softmax_scale=None,
            backend="reference",
            label="attention",
        )
        call = replace(call, op=replace(call.op, kernel=AsksForContiguousHeads()))
        out = run(SingleRank(call), *shards, None)
        gradients.append(torch.autograd.grad(out.squeeze(1).sum(), inputs))
    for expected, found in zip(*gradients, strict=True):
        assert torch.equal(expected, found)
