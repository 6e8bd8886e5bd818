"""Chunks between the ranks of one axis of the grid: gather them into a tile, give partial results back.

One `Axis` is a row (its chunks are queries) or a column (keys and values). `gather` brings the chunks a tile needs
into one buffer, in the order of the tile's plan; `give_back` returns one partial result a slot to the chunk's owner.
All messages of one are a batched launch, and kernels may run until `Pending.wait`. Where ranks share nodes (see
`routes`) there are two launches, between nodes and within: `gather` makes the second in `wait`; `give_back` waits for
its first, within nodes, before it makes the second and returns.

Point-to-point messages rather than all-gathers, for they place each chunk where the plan wants it, so that no buffer is
permuted by a copy, and they leave out what the causal mask hides. The bytes a rank moves are an all-gather's at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.attention.grid import Grid
from megatron_attn2d.attention.layout import LOWER, UPPER, Chunk, Mask, TilePlan, tile_plan, tile_slots
from megatron_attn2d.attention.routes import Message, Routes, by_nodes, plan_routes

_BETWEEN, _WITHIN = 0, 1
_MOST_MASKS = 64


class ExchangeError(RuntimeError):
    """Messages were not delivered: a peer hangs beyond the group's timeout, or is gone."""


@contextmanager
def named(what: str) -> Iterator[None]:
    """Names what messages were about in the error of torch.distributed."""
    try:
        yield
    except RuntimeError as error:  # what torch.distributed raises, whatever the backend
        raise ExchangeError(f"{what} failed on rank {dist.get_rank()}: {error}") from error


@dataclass
class Pending:
    """Messages in flight. They keep their buffers alive until `wait`; `what` they are stands in errors."""

    works: list[dist.Work] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    then: Callable[[], Pending] | None = None
    what: str = "exchange of chunks"

    def wait(self) -> None:
        """Make the current stream (on CPU: the caller) wait for the messages, and for those that follow on them.

        Raises:
            ExchangeError: on CPU ranks, naming the messages. On GPUs NCCL's watchdog ends the process instead.
        """
        with named(self.what):
            for work in self.works:
                work.wait()
        self.works.clear()
        self.buffers.clear()
        if self.then is not None:
            following, self.then = self.then, None
            following().wait()


type Returned = tuple[list[list[list[Tensor]]], Pending]
"""What `Axis.give_back` returns: the tensors on their way, [kind][half], and the messages to wait for."""

type Combine = Callable[[list[list[Tensor]]], list[Tensor]]
"""Partial results of one chunk, [kind][partial], into one of each kind."""


@dataclass(frozen=True)
class Axis:
    """What one rank sends and receives along one axis of the grid.

    Attributes:
        group: process group of the axis; None if it has one rank.
        own: context-parallel rank of the caller.
        slots: the chunks that the caller's tile needs, by slot.
        routes: the messages of all ranks of the axis.
        peers: global rank of each context-parallel rank of the axis.
        label: whose axis it is, in errors.
    """

    group: dist.ProcessGroup | None
    own: int
    slots: tuple[Chunk, ...]
    routes: Routes
    peers: dict[int, int]
    label: str = "attention, axis"

    def describe(self, what: str) -> str:
        """What is exchanged, and between which global ranks."""
        return f"{self.label} of ranks {list(self.peers.values())}: {what}"

    def own_slot(self, half: int) -> int | None:
        """Slot of the caller's own chunk; None where the tile has no use for it."""
        return self._slot_of.get(Chunk(self.own, half))

    def gather(self, shards: Sequence[Tensor], *, tag: int) -> tuple[list[Tensor], Pending]:
        """Start to gather the tile's chunks of each tensor.

        Args:
            shards: tensors [2, n, ...], lower and upper chunk of n tokens.
            tag: tells messages apart that are in flight on the same axis at once.

        Returns:
            A buffer [slots, n, ...] for each shard, to be read after `Pending.wait`. It is a view of the shard where
            nothing has to be moved.
        """
        if self.group is None:
            halves = [chunk.half for chunk in self.slots]
            assert halves == sorted(halves), "a rank's own chunks stand in token order"
            first = halves[0] if halves else LOWER
            return [shard[first : first + len(halves)] for shard in shards], Pending()
        buffers = [shard.new_empty((len(self.slots), *shard.shape[1:])) for shard in shards]
        # Chunks to carry that the own tile has no use for.
        carried = {
            m.chunk: [x.new_empty(x.shape[1:]) for x in shards]
            for m in self._to_me(_BETWEEN)
            if self._slot(m.chunk) is None
        }
        outgoing, later = self._outgoing(shards, buffers)

        def place(kind: int, chunk: Chunk) -> Tensor:
            if chunk.rank == self.own:
                return outgoing[kind][chunk.half]
            slot = self._slot(chunk)
            return carried[chunk][kind] if slot is None else buffers[kind][slot]

        def start(stage: int) -> Pending:
            sends, receives = (
                [(self.peers[other(m)], place(kind, m.chunk)) for kind in range(len(shards)) for m in messages]
                for messages, other in ((self._from_me(stage), _receiver), (self._to_me(stage), _sender))
            )
            assert self.group is not None
            return launch(self.group, sends, receives, 2 * tag + stage, self.describe("gathering"))

        pending = start(_BETWEEN)
        for slot, chunk in later:
            slot.copy_(chunk)
        if self.routes.within:
            pending.then = lambda: start(_WITHIN)
        return buffers, pending

    def _outgoing(
        self, shards: Sequence[Tensor], buffers: Sequence[Tensor]
    ) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
        """What to send of each shard, [kind][half], and the copies (to, from) of own chunks that can wait until then.

        Messages are contiguous. A head group's chunk is not: it is copied into its slot first and leaves from there.
        """
        outgoing: list[list[Tensor]] = []
        later = []
        for shard, buffer in zip(shards, buffers, strict=True):
            outgoing.append([])
            for half in (LOWER, UPPER):
                chunk, slot = shard[half], self.own_slot(half)
                if slot is None:
                    chunk = chunk.contiguous()
                elif chunk.is_contiguous():
                    later.append((buffer[slot], chunk))
                else:
                    chunk = buffer[slot].copy_(chunk)
                outgoing[-1].append(chunk)
        return outgoing, later

    def give_back(
        self, partials: Sequence[Sequence[Tensor]], like: Sequence[Tensor], combine: Combine, *, tag: int
    ) -> Returned:
        """Start to return each slot's partial results to the chunk's owner.

        Args:
            partials: for each kind of result, a tensor for each slot; all of one kind have one shape.
            like: a tensor of the shape and dtype of each kind: the own tile may have no slot.
            combine: makes one partial result of those that several ranks of a node have of one chunk.
            tag: as in `gather`.

        Returns:
            For each kind the received tensors, [kind][half]: a list in a fixed order of their senders.
        """
        kinds = range(len(partials))
        received: list[list[list[Tensor]]] = [[[], []] for _ in kinds]
        if self.group is None:
            return received, Pending()
        mine = {chunk: [partials[kind][slot] for kind in kinds] for slot, chunk in enumerate(self.slots)}
        # The way back: what came to me goes out again, what I sent returns.
        near = self._landing(self._from_me(_WITHIN), like)
        if self.routes.within:
            self._return(_WITHIN, mine, near, tag).wait()
        combined = {}
        for message in self._to_me(_BETWEEN):
            found = [mine[message.chunk]] if message.chunk in mine else []
            found += [tensors for m, tensors in near.items() if m.chunk == message.chunk]
            combined[message.chunk] = (
                found[0] if len(found) == 1 else combine([list(x) for x in zip(*found, strict=True)])
            )
        far = self._landing(self._from_me(_BETWEEN), like)
        pending = self._return(_BETWEEN, combined, far, tag)
        for message, tensors in (*near.items(), *far.items()):
            if message.chunk.rank == self.own:
                for kind, tensor in enumerate(tensors):
                    received[kind][message.chunk.half].append(tensor)
        return received, pending

    def _return(
        self, stage: int, results: dict[Chunk, list[Tensor]], landing: dict[Message, list[Tensor]], tag: int
    ) -> Pending:
        """Send `results` against the direction of the stage's messages, receive into `landing`."""
        kinds = range(len(next(iter((results or landing).values())))) if results or landing else range(0)
        sends = [
            (self.peers[m.sender], results[m.chunk][kind].contiguous()) for kind in kinds for m in self._to_me(stage)
        ]
        receives = [(self.peers[m.receiver], tensors[kind]) for kind in kinds for m, tensors in landing.items()]
        assert self.group is not None
        return launch(self.group, sends, receives, 2 * tag + stage, self.describe("returning results"))

    def _landing(self, messages: Sequence[Message], like: Sequence[Tensor]) -> dict[Message, list[Tensor]]:
        """Buffers for what returns of `messages`, in one allocation a kind."""
        buffers = [kind.new_empty((len(messages), *kind.shape)).unbind() for kind in like]
        return {m: [buffer[i] for buffer in buffers] for i, m in enumerate(messages)}

    def _slot(self, chunk: Chunk) -> int | None:
        return self._slot_of.get(chunk)

    def _from_me(self, stage: int) -> list[Message]:
        return self._messages[stage][0]

    def _to_me(self, stage: int) -> list[Message]:
        return self._messages[stage][1]

    # A layer makes the same calls in each step: what they need of the routes is picked out once.
    @cached_property
    def _slot_of(self) -> dict[Chunk, int]:
        return {chunk: slot for slot, chunk in enumerate(self.slots)}

    @cached_property
    def _messages(self) -> tuple[tuple[list[Message], list[Message]], ...]:
        """By stage: from the caller and to it."""
        return tuple(
            ([m for m in stage if m.sender == self.own], [m for m in stage if m.receiver == self.own])
            for stage in (self.routes.between, self.routes.within)
        )


def _sender(message: Message) -> int:
    return message.sender


def _receiver(message: Message) -> int:
    return message.receiver


def launch(
    group: dist.ProcessGroup,
    sends: Sequence[tuple[int, Tensor]],
    receives: Sequence[tuple[int, Tensor]],
    tag: int,
    what: str,
) -> Pending:
    """Start all messages, (global rank, contiguous tensor) each, as one batch; `what` they are stands in errors.

    The k-th message to a rank meets that rank's k-th from here.
    """
    operations = []
    for call, messages in ((dist.irecv, receives), (dist.isend, sends)):
        count: dict[int, int] = {}
        for peer, buffer in messages:
            k = count[peer] = count.get(peer, -1) + 1
            operations.append(dist.P2POp(call, buffer, peer, group, tag * 4096 + k))
    if not operations:
        return Pending()
    with named(what):
        return Pending(dist.batch_isend_irecv(operations), [buffer for _, buffer in (*sends, *receives)], what=what)


def axes(grid: Grid, mask: Mask, label: str) -> tuple[TilePlan, Axis, Axis]:
    """The plan of the caller's tile, its row (queries) and its column (keys and values); `label` names the layer."""
    if mask not in grid.derived:
        if len(grid.derived) >= _MOST_MASKS:  # packed sequences: each batch has lengths of its own
            del grid.derived[next(iter(grid.derived))]
        grid.derived[mask] = {}
    by_label: dict[str, tuple[TilePlan, Axis, Axis]] = grid.derived[mask]
    if label not in by_label:
        plan, row, column = next(iter(by_label.values()), None) or _axes(grid, mask)
        row = replace(row, label=f"{label}, queries in the row")
        by_label[label] = plan, row, replace(column, label=f"{label}, keys and values in the column")
    return by_label[label]


def _axes(grid: Grid, mask: Mask) -> tuple[TilePlan, Axis, Axis]:
    row, column = grid.query_ranks, grid.key_ranks(grid.column)
    plan = tile_plan(row, column, mask)
    queries = {rank: tile_slots(row, grid.key_ranks(c), mask)[0] for c, rank in enumerate(row)}
    keys = {rank: tile_slots(line, column, mask)[1] for line, rank in zip(grid.ranks, column, strict=True)}
    return (
        plan,
        Axis(
            grid.q_group,
            grid.rank,
            plan.queries,
            plan_routes(by_nodes(row, grid.node_cols), queries),
            dict(zip(row, grid.q_peers, strict=True)),
        ),
        Axis(
            grid.kv_group,
            grid.rank,
            plan.keys,
            plan_routes(by_nodes(column, grid.node_rows), keys),
            dict(zip(column, grid.kv_peers, strict=True)),
        ),
    )
