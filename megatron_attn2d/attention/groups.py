"""The process groups of a grid's axes: streams of high priority, names of their own, all ranks connected at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def subgroup(ranks: tuple[int, ...], parent: dist.ProcessGroup, reuse: bool) -> dist.ProcessGroup | None:
    """The group of these global ranks, one of which is the caller; all of them must call. None for one rank.

    It is `parent` itself where that has the same ranks and either `reuse` is set or its streams serve as they are.
    """
    if len(ranks) == 1:
        return None
    backend, nccl = dist.get_backend(parent), over_nccl(parent)
    if backend == "undefined":  # init_process_group was left to choose one for each device
        backend = dist.get_backend_config(parent)
    timeout, options = _option(parent, "_timeout"), None
    reuse |= not nccl or bool(_option(parent, "is_high_priority_stream"))
    if len(ranks) == parent.size() and reuse:
        return parent
    if nccl:
        # Where messages and the kernel that is to hide them become ready together, the kernel's blocks may take every
        # SM, and messages begin when it ends. A stream of high priority gets the first SMs that become free.
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        if timeout is not None:
            options._timeout = timeout
    with nullcontext() if backend == "fake" else new_name(ranks):  # a fake group's store does not count
        group = dist.new_group(
            list(ranks), timeout=timeout, backend=backend, pg_options=options, use_local_synchronization=True
        )
    assert isinstance(group, dist.ProcessGroup), "the caller is among the ranks"
    return group


@contextmanager
def new_name(ranks: tuple[int, ...]) -> Iterator[None]:
    """Within it, a group that these ranks make gets a name that no group of theirs ever had.

    Under the name of a group its ranks find each other's addresses in the store. For a group that its own ranks alone
    make, torch derives the name from what the process has counted. torch 2.11 counts the groups that exist: a group
    made after another was destroyed finds the addresses of that one. torch 2.15 counts the calls of `new_group`: ranks
    that have made different numbers of calls wait for each other under different names. Here the store counts for all
    ranks, and no rank makes their next group before all have made this one. torch's own count is restored.
    """
    members = "_".join(map(str, ranks))
    calls = distributed_c10d._get_default_store().add(f"megatron_attn2d/groups/{members}", 1)
    name = hashlib.sha1(f"{members}:{(calls - 1) // len(ranks)}".encode(), usedforsecurity=False).hexdigest()
    original, counted = distributed_c10d._hash_ranks_to_str, distributed_c10d._world.group_count
    distributed_c10d._hash_ranks_to_str = lambda ranks: name
    try:
        yield
    finally:
        distributed_c10d._hash_ranks_to_str = original
        distributed_c10d._world.group_count = counted


def connect(*groups: dist.ProcessGroup | None) -> None:
    """Run one collective on each group, by all of its ranks.

    NCCL connects a group in its first call and waits for all of its ranks there. But a rank may have no message in
    attention's first calls, where its chunks see nothing of the others', under a window or in padding.
    """
    for group in groups:
        if group is not None and group.size() > 1:
            device = "cuda" if over_nccl(group) else "cpu"
            dist.all_reduce(torch.zeros(1, device=device), group=group)


def over_nccl(group: dist.ProcessGroup) -> bool:
    """Whether NCCL serves the group's CUDA tensors; another backend may serve its CPU tensors."""
    return "nccl" in dist.get_backend_config(group)


def _option(group: dist.ProcessGroup, name: str) -> Any:
    """An option of the group's backend, of NCCL where it has several; None where the backend doesn't tell."""
    devices = group._device_types
    cuda = [device for device in devices if device.type == "cuda"]
    backend = group._get_backend((cuda or devices)[0])
    return getattr(getattr(backend, "options", None), name, None)
