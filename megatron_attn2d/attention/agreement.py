"""Do all ranks of a group ask for the same attention? The first call on a group compares their arguments.

A rank sees only its own arguments. With another length or dtype on a peer, messages would end early or be read as the
wrong numbers, without an error. The comparison waits for the other ranks and for the GPU, once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.groups import over_nccl
from megatron_attn2d.attention.layout import Band
from megatron_attn2d.attention.messages import named
from megatron_attn2d.attention.packing import Packing

_met: WeakSet[dist.ProcessGroup] = WeakSet()


def facts_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Packing,
    band: Band,
    scale: float,
    sink: Tensor | None,
    dropout: Dropout | None,
    overlap_groups: int | None = None,
) -> dict[str, object]:
    """What has to be the same on all ranks of a call, by its name in errors."""
    return {
        "shape of q": tuple(q.shape),
        "shape of k": tuple(k.shape),
        "shape of v": tuple(v.shape),
        "dtype": q.dtype,
        "mask": tuple(band),
        "packed sequences": sequences.facts,
        "softmax_scale": scale,
        "sink": sink is not None,
        "dropout": None if dropout is None else dropout.p,
        "overlap_groups": overlap_groups,
    }


def check_agreement(
    groups: Sequence[dist.ProcessGroup | None], facts: Mapping[str, object], device: torch.device, label: str
) -> None:
    """Compare `facts` with those of other ranks in the first call on each of these groups; all of its ranks must call.

    Groups are compared one after the other, so that each rank of a grid hears of a difference in any row and column.
    Nothing is compared while a CUDA graph is captured, nor over groups whose ranks are faked.

    Args:
        groups: the axes on which the caller exchanges messages; None for an axis without a group.
        facts: by name, as `facts_of` gives them.
        device: of the tensors.
        label: names the call in errors.

    Raises:
        ValueError: on every rank, where facts differ anywhere.
        ExchangeError: as messages do.
    """
    # By group, as all of its ranks know the same of it: a ring and a grid that share a group compare there once.
    axes = [group for group in groups if group is not None and group not in _met]
    if not axes or any(dist.get_backend(group) == "fake" for group in axes):
        return
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    differing: list[str] = []
    elsewhere = 0
    for group in axes:
        on = device if over_nccl(group) else torch.device("cpu")
        mine = torch.tensor([*map(_number, facts.values()), elsewhere], device=on)
        theirs = [torch.empty_like(mine) for _ in range(group.size())]
        ranks = dist.get_process_group_ranks(group)
        with named(f"{label}: comparing arguments of ranks {ranks}"):
            dist.all_gather(theirs, mine, group=group)
        *columns, flags = zip(*(numbers.tolist() for numbers in theirs), strict=True)
        for (name, value), column in zip(facts.items(), columns, strict=True):
            others = [rank for rank, number in zip(ranks, column, strict=True) if number != column[group.rank()]]
            if others:
                differing.append(f"{name} is {value} here and another on global rank {others[0]}")
        elsewhere = int(bool(differing) or any(flags))
    if elsewhere:
        what = "; ".join(differing) or "those of other ranks of the grid differ, as told there"
        raise ValueError(f"{label}: all ranks must pass the same on rank {dist.get_rank()}: {what}")
    _met.update(axes)


def _number(value: object) -> int:
    """A number of int64 that is the same for equal values."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7])
