"""What waits for the backward pass is what it needs: no larger tensor that an input is a part of."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention.call import compact_for_save
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
