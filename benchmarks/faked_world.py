"""A world whose rank 0 is this process and whose other ranks are faked: one GPU shows what a rank of many does.

Collectives are those of torch's `fake` backend, in which nothing travels. Kernels, host time and memory are those of a
real rank. Results are wrong, and messages take no time on a wire.

With `refilled` what would arrive is copied on the device from what is sent. Kernels then meet numbers as they are in a
real run: on zeros a GPU clocks higher, and one NaN makes everything NaN. A message costs its copy in memory.
"""

from __future__ import annotations

import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_attn2d.attention import messages
from megatron_attn2d.launch.ranks import name_rank

PORT = 29500
"""Which nobody listens on."""


@contextmanager
def faked_world(ranks: int, refilled: bool = False) -> Iterator[None]:
    """While entered this process is rank 0 of so many, in the default group and in all groups that are made.

    Enter it before Megatron is imported, which keeps some functions of torch.distributed.
    """
    with ExitStack() as stack:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        stack.callback(dist.destroy_process_group)
        replaced: dict[str, Callable[..., Any]] = {
            "new_group": _faked_group,
            "all_gather_object": _all_say_the_same,
            "broadcast_object_list": _said_by_this_rank,
        }
        if refilled:
            single = _Messages()
            replaced |= {
                "isend": single.isend,
                "irecv": single.irecv,
                "all_to_all_single": _output_from_input("all_to_all_single"),
                "reduce_scatter_tensor": _output_from_input("reduce_scatter_tensor"),
                "_reduce_scatter_base": _output_from_input("_reduce_scatter_base"),
            }
            stack.enter_context(mock.patch.object(messages, "_all_to_all", _lists_refilled(messages._all_to_all)))
        for name, function in replaced.items():
            for module in (distributed_c10d, dist):
                stack.enter_context(mock.patch.object(module, name, function))
        yield


def as_first_rank(function: Callable[..., None], args: Namespace) -> None:
    """Run function(0, args) as rank 0 of `args.ranks` on `args.device`, what arrives being refilled."""
    name_rank(0, args.ranks, PORT)
    if args.device == "cuda":
        torch.cuda.set_device(0)
    else:
        torch.set_num_threads(1)
    with faked_world(args.ranks, refilled=True):
        function(0, args)


def received_bytes(call: Callable[[], object]) -> int:
    """What `call` makes this rank receive from others, counted by its collectives; reductions by their outputs."""
    with _Received() as counted:
        call()
    return counted.bytes


class _Received(TorchDispatchMode):
    """Counts what collectives bring, the rank's own part left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if space == "c10d" and args:
            self.bytes += _arriving(name.partition(".")[0].strip("_"), args)
        return func(*args, **(kwargs or {}))


def _arriving(name: str, args: Sequence[Any]) -> int:
    if name in ("recv", "alltoall"):  # lists, in which nothing is for the rank itself
        return sum(x.nbytes for x in args[0])
    if name in ("allgather", "alltoall_base", "allgather_base", "all_gather_single", "all_to_all_single"):
        whole = args[0]
        if not isinstance(whole, Tensor):
            return sum(x.nbytes for outputs in whole for x in outputs[1:])
        ranks = whole.numel() // args[1].numel() if "gather" in name else _size(args)
        return whole.nbytes - whole.nbytes // ranks
    if name in ("reduce_scatter_base", "reduce_scatter_single"):
        return int(args[1].nbytes - args[0].nbytes)
    return 0


def _size(args: Sequence[Any]) -> int:
    group = next(dist.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject))
    return int(group.size())


_new_group = dist.new_group


def _faked_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **options: Any) -> Any:
    """`new_group` of the fake backend, whichever is asked for."""
    return _new_group(ranks, timeout, "fake", **{**options, "pg_options": None})


def _all_say_the_same(found: list[Any], said: Any, group: Any = None) -> None:
    """`all_gather_object` where all ranks say what this one does."""
    found[:] = [said] * len(found)


def _said_by_this_rank(objects: list[Any], *args: Any, **options: Any) -> None:
    """`broadcast_object_list` of what this rank has."""


_isend, _irecv = dist.isend, dist.irecv


class _Messages:
    """Sends and receives: what is received is filled from what was sent last, whose memory is not kept for it."""

    def __init__(self) -> None:
        self._sent: Callable[[], Tensor | None] = lambda: None

    def isend(self, tensor: Tensor, *args: Any, **options: Any) -> Any:
        """As `torch.distributed.isend`."""
        self._sent = weakref.ref(tensor)
        return _isend(tensor, *args, **options)

    def irecv(self, tensor: Tensor, *args: Any, **options: Any) -> Any:
        """As `torch.distributed.irecv`."""
        sent = self._sent()
        _refill([tensor], [] if sent is None else [sent])
        return _irecv(tensor, *args, **options)


def _output_from_input(name: str) -> Callable[..., Any]:
    """A collective of torch.distributed whose output is filled from its input."""
    original = getattr(dist, name)

    def collective(output: Tensor, given: Tensor, *args: Any, **options: Any) -> Any:
        if output.data_ptr() != given.data_ptr():  # a shard of its own input stays as it is
            _refill([output], [given])
        return original(output, given, *args, **options)

    return collective


def _lists_refilled(all_to_all: Callable[..., Any]) -> Callable[..., Any]:
    """Attention's exchange of lists, in which what is received is filled from what is sent."""

    def exchange(group: Any, rounds: Sequence[messages.Lists], *args: Any) -> Any:
        for sends, receives in rounds:
            _refill(receives, sends)
        return all_to_all(group, rounds, *args)

    return exchange


@torch.no_grad()
def _refill(arriving: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    """Fill tensors from others of their dtype, one after the other, repeating them; else with random numbers."""
    sources = [x for x in given if x.numel()]
    for i, target in enumerate(x for x in arriving if x.numel()):
        source = sources[i % len(sources)] if sources else None
        if source is None or source.dtype != target.dtype or not (source.is_contiguous() and target.is_contiguous()):
            if target.is_floating_point():
                target.normal_()
            continue
        flat, whole = source.view(-1), target.view(-1)
        for begin in range(0, whole.numel(), flat.numel()):
            part = whole[begin : begin + flat.numel()]
            part.copy_(flat[: part.numel()])
