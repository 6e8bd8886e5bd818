"""Messages between the ranks of a process group: a batch of messages is a constant number of calls into torch.

Messages are ordered in *rounds*. A round has, per rank of the group, one tensor that goes to the rank and one that
comes from it; a tensor is empty where there is no message. So the k-th message from one rank to another is in round k
on both.

NCCL takes a round as one all-to-all of lists of tensors. To NCCL these are sends and receives: an empty tensor is not
sent, and the others are sent from and received into the tensors themselves. All rounds of a batch are one launch. Gloo
has no such all-to-all: there each message is an operation of its own. So it is under TORCH_DISTRIBUTED_DEBUG=DETAIL,
where torch demands that the lists of all ranks have the same shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllToAllOptions


class ExchangeError(RuntimeError):
    """Messages were not delivered: a peer hangs beyond the group's timeout, or is gone."""


@contextmanager
def named(what: str) -> Iterator[None]:
    """Within it, an error of torch.distributed names the messages that failed."""
    try:
        yield
    except RuntimeError as error:  # what torch.distributed raises, whatever the backend
        raise _failed(what, error) from error


def _failed(what: str, error: RuntimeError) -> ExchangeError:
    return ExchangeError(f"{what} failed on rank {dist.get_rank()}: {error}")


@dataclass
class Pending:
    """Messages in flight. They keep their buffers alive until `wait`; `what` names them in errors."""

    works: list[dist.Work] = field(default_factory=list)
    buffers: list[Any] = field(default_factory=list)
    then: Callable[[], Pending] | None = None
    what: str = "exchange of chunks"

    def wait(self) -> None:
        """Make the current stream (on CPU: the caller) wait for the messages and for those that follow them.

        Raises:
            ExchangeError: on CPU ranks, naming the messages. On GPUs NCCL's watchdog ends the process instead.
        """
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise _failed(self.what, error) from error
        self.works.clear()
        self.buffers.clear()
        if self.then is not None:
            following, self.then = self.then, None
            following().wait()


type Lists = tuple[Sequence[Tensor], Sequence[Tensor]]
"""A round: contiguous tensors that go to each rank of a group and that come from it, by rank in the group."""


def launch(group: dist.ProcessGroup, rounds: Sequence[Lists], tag: int, what: str) -> Pending:
    """Start all messages as one batch.

    Args:
        group: has all ranks that may have messages. Each of them calls, with the same number of rounds.
        rounds: see above; the tensors of a round share a dtype.
        tag: tells batches apart that are in flight at once, where messages have tags.
        what: names the messages in errors.
    """
    if not rounds:
        return Pending()
    device = rounds[0][0][0].device
    transport = _transport(group, device)
    if transport.lists:
        try:
            return Pending(_all_to_all(group, rounds, device, transport), [rounds], what=what)
        except RuntimeError as error:
            raise _failed(what, error) from error
    ranks = dist.get_process_group_ranks(group)
    receives, sends = (
        [(ranks[peer], tensor) for each in rounds for peer, tensor in enumerate(each[side]) if tensor.numel()]
        for side in (1, 0)
    )
    return send_receive(group, sends, receives, tag, what)


def send_receive(
    group: dist.ProcessGroup,
    sends: Sequence[tuple[int, Tensor]],
    receives: Sequence[tuple[int, Tensor]],
    tag: int,
    what: str,
) -> Pending:
    """Start messages, each (global rank, contiguous tensor), as one batch; arguments as in `launch`.

    The k-th message sent to a rank is the k-th that this rank receives from here.
    """
    operations = []
    for call, messages in ((dist.irecv, receives), (dist.isend, sends)):
        count: Counter[int] = Counter()
        for peer, tensor in messages:
            operations.append(dist.P2POp(call, tensor, peer, group, tag * 4096 + count[peer]))
            count[peer] += 1
    if not operations:
        return Pending()
    with named(what):
        return Pending(dist.batch_isend_irecv(operations), [sends, receives], what=what)


def nothing(like: Tensor) -> Tensor:
    """The empty tensor of a round where there is no message."""
    return _empty(like.dtype, like.device)


@lru_cache
def _empty(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


class _Transport(NamedTuple):
    """How messages of a group travel.

    Attributes:
        lists: a round at once; else one by one.
        coalesces: all rounds of a batch are one launch.
        faked: they go nowhere.
    """

    lists: bool
    coalesces: bool
    faked: bool


_transports: WeakKeyDictionary[dist.ProcessGroup, dict[str, _Transport]] = WeakKeyDictionary()


def _transport(group: dist.ProcessGroup, device: torch.device) -> _Transport:
    known = _transports.setdefault(group, {})
    if device.type not in known:
        backend = group._get_backend(device)
        name, coalesces = backend.name(), bool(getattr(backend, "supports_coalescing", False))
        lists = name != "gloo" and dist.get_debug_level() != dist.DebugLevel.DETAIL
        known[device.type] = _Transport(lists, coalesces, name == "fake")
    return known[device.type]


def _all_to_all(
    group: dist.ProcessGroup, rounds: Sequence[Lists], device: torch.device, transport: _Transport
) -> list[dist.Work]:
    options = AllToAllOptions()
    if hasattr(options, "asyncOp"):  # before torch 2.8 there was nothing else
        options.asyncOp = True
    if transport.faked:  # newer versions of torch copy the first list to the second, and ask that they fit
        rounds = [(receives, receives) for _, receives in rounds]
    if transport.coalesces:
        group._start_coalescing(device)
    works = [group.alltoall(list(receives), list(sends), options) for sends, receives in rounds]
    return [group._end_coalescing(device)] if transport.coalesces else works
