"""An axis whose ranks share nodes: a chunk crosses the network once per node, and its carrier sends it on (`routes`).

A rank *holds* what ranks of its node get from it: its own chunks and the chunks that it carries, side by side in one
buffer, in token order. What another rank's tile needs of them is a run of that order, or a few runs where a mask hides
what lies between. So it is one message per run, however many nodes there are. It lands beside what other ranks send and
is copied into the slots of the tile.

Results go back the same way. Those of another rank's chunks are laid side by side and sent as one message. The carrier
combines what its node has of them, for all chunks at once, and sends that to the owners.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_attn2d.attention.axis import GATHERING, RETURNING, Arriving, Axis, Combine, copy, landing
from megatron_attn2d.attention.layout import LOWER, UPPER, Chunk
from megatron_attn2d.attention.messages import Pending, nothing
from megatron_attn2d.attention.routes import Round, Routes, Run, own_slots, returns, rounds

_BETWEEN, _WITHIN = 0, 1


@dataclass(frozen=True)
class Relay:
    """What one rank does along the axis in each call.

    Attributes:
        own_slots: half and slot of the own chunks that the own tile needs.
        halves: which of its own chunks the rank sends within its node; they are the first that it holds.
        held: slot of each chunk that it holds, None where its tile does not need the chunk.
        between: rounds over [own lower chunk, own upper chunk, held chunks, nothing].
        within: rounds over [runs of held chunks to others of the node, runs from them, nothing].
        to_others: position of the receiver among the other ranks of the node, and the run of held chunks.
        from_others: the runs in `staged`.
        staged: slot of each chunk that others send, in the order in which they land.
        others: how many other ranks the node has.
        complete: they and the own tile need all that is held.
        back: rounds over [results of the carried chunks, what returns from other nodes, nothing].
        returning: how many results other nodes return of the own lower and upper chunk.
    """

    own_slots: tuple[tuple[int, int], ...]
    halves: tuple[int, ...]
    held: tuple[int | None, ...]
    between: tuple[Round, ...]
    within: tuple[Round, ...]
    to_others: tuple[tuple[int, int, int], ...]
    from_others: tuple[tuple[int, int], ...]
    staged: tuple[int, ...]
    others: int
    complete: bool
    back: tuple[Round, ...]
    returning: tuple[int, int]


def relay_of(routes: Routes, node: Sequence[int], rank: int, slots: Sequence[Chunk], order: Mapping[int, int]) -> Relay:
    """The relay of `rank`, whose tile needs `slots`.

    Args:
        routes: the messages of all ranks of the axis.
        node: the ranks of the axis that share the node of `rank`.
        rank, slots: as above.
        order: the rank in the group, by rank of the axis.
    """
    slot_of = {chunk: slot for slot, chunk in enumerate(slots)}
    passed: dict[tuple[int, int], set[Chunk]] = {}
    for message in routes.within:
        passed.setdefault((message.sender, message.receiver), set()).add(message.chunk)
    owned = {chunk for (sender, _), chunks in passed.items() for chunk in chunks if chunk.rank == sender}
    held = {each: [Chunk(each, half) for half in (LOWER, UPPER) if Chunk(each, half) in owned] for each in order}
    halves = tuple(chunk.half for chunk in held[rank])
    for message in sorted(routes.between, key=lambda m: m.chunk.token_order):
        held[message.receiver].append(message.chunk)
    runs = [run for pair, chunks in passed.items() for run in _runs(*pair, held[pair[0]], chunks)]
    to_others = [run for run in runs if run.sender == rank]
    from_others = [run for run in runs if run.receiver == rank]
    staged: list[int] = []
    bounds: list[tuple[int, int]] = []
    for run in from_others:
        bounds.append((len(staged), len(staged) + run.last - run.first))
        staged += [slot_of[chunk] for chunk in held[run.sender][run.first : run.last]]
    others = [each for each in node if each != rank]
    position = {chunk: i for i, chunk in enumerate(held[rank])}
    carried = held[rank][len(halves) :]
    position_of, returning = returns(routes.between, rank)
    back = rounds(
        routes.between, rank, order, lambda m: len(carried) + position_of[m], lambda m: position[m.chunk] - len(halves)
    )
    return Relay(
        own_slots(rank, slot_of),
        halves,
        tuple(slot_of.get(chunk) for chunk in held[rank]),
        rounds(routes.between, rank, order, lambda m: m.chunk.half, lambda m: 2 + position[m.chunk]),
        rounds(runs, rank, order, to_others.index, lambda run: len(to_others) + from_others.index(run)),
        tuple((others.index(run.receiver), run.first, run.last) for run in to_others),
        tuple(bounds),
        tuple(staged),
        len(others),
        all(chunk in slot_of for chunk in carried)
        and sum(run.last - run.first for run in to_others) == len(others) * len(held[rank]),
        tuple(each.back for each in back),
        returning,
    )


def _runs(sender: int, receiver: int, held: Sequence[Chunk], chunks: set[Chunk]) -> list[Run]:
    """The runs of what `sender` holds that make up `chunks`."""
    runs: list[Run] = []
    for i, chunk in enumerate(held):
        if chunk in chunks and runs and runs[-1].last == i:
            runs[-1] = runs[-1]._replace(last=i + 1)
        elif chunk in chunks:
            runs.append(Run(sender, receiver, i, i + 1))
    return runs


@dataclass(frozen=True, kw_only=True)
class RelayAxis(Axis):
    """Several ranks share a node, so that there are two launches, between nodes and within.

    `gather` starts the one within nodes when it is waited for. `return_partials` waits for the one within nodes, starts
    the one between them and returns.
    """

    relay: Relay

    @property
    def own_slots(self) -> tuple[tuple[int, int], ...]:
        """See `Axis.own_slots`."""
        return self.relay.own_slots

    def gather(self, shards: Sequence[Tensor], *, tag: int) -> tuple[list[Tensor], Pending]:
        """See `Axis.gather`."""
        relay = self.relay
        buffers, between, within = [], [], []
        now: list[tuple[Tensor, Tensor]] = []
        last: list[tuple[Tensor, Tensor]] = []
        for shard in shards:
            buffer = shard.new_empty((len(self.slots), *shard.shape[1:]))
            room = shard.new_empty((len(relay.held) + len(relay.staged), *shard.shape[1:]))
            held, staged = room[: len(relay.held)], room[len(relay.held) :]
            slots, chunks, pieces = buffer.unbind(), shard.unbind(), room.unbind()
            now += [(pieces[i], chunks[half]) for i, half in enumerate(relay.halves)]
            now += [(slots[slot], chunks[half]) for half, slot in relay.own_slots]
            come = [*relay.held, *relay.staged]
            last += [
                (slots[slot], pieces[i]) for i, slot in enumerate(come) if slot is not None and i >= len(relay.halves)
            ]
            buffers.append(buffer)
            between.append((*(chunk.contiguous() for chunk in chunks), *pieces[: len(relay.held)], nothing(shard)))
            runs = [held[first:stop] for _, first, stop in relay.to_others]
            runs += [staged[first:stop] for first, stop in relay.from_others]
            within.append((*runs, nothing(shard)))

        def send_within() -> Pending:
            sending = self.launch(relay.within, within, 2 * tag + _WITHIN, GATHERING)
            sending.then = fill_slots
            return sending

        def fill_slots() -> Pending:
            copy(last)
            last.clear()
            return Pending()

        pending = self.launch(relay.between, between, 2 * tag + _BETWEEN, GATHERING)
        copy(now)
        pending.then = send_within
        return buffers, pending

    def return_partials(
        self, partials: Sequence[Sequence[Tensor]], like: Sequence[Tensor], combine: Combine, *, tag: int
    ) -> Arriving:
        """See `Axis.return_partials`."""
        relay = self.relay
        received: list[list[list[Tensor]]] = [[[], []] for _ in like]
        within, carried = [], []
        for kind, sample, empty, halves in zip(partials, like, combine.empty, received, strict=False):
            shape = relay.others, len(relay.held), *sample.shape
            room = sample.new_empty(shape) if relay.complete else sample.new_full(shape, empty)
            runs = [room[other, first:last] for other, first, last in relay.to_others]
            if relay.staged:
                sent = torch.stack([kind[slot] for slot in relay.staged])
                runs += [sent[first:last] for first, last in relay.from_others]
            within.append((*runs, nothing(sample)))
            for i, half in enumerate(relay.halves):
                halves[half].append(room[:, i])
            slots = relay.held[len(relay.halves) :]
            if slots:
                missing = sample.new_full(sample.shape, empty) if None in slots else sample
                local = torch.stack([missing if slot is None else kind[slot] for slot in slots])
                carried.append([local, room[:, len(relay.halves) :]])
        back = [each.back for each in relay.within]
        self.launch(back, within, 2 * tag + _WITHIN, RETURNING).wait()
        results = [x.unbind() for x in combine.results(carried)] if carried else [() for _ in like]
        kinds = [
            (*result, *landing(sample, relay.returning, halves).unbind(), nothing(sample))
            for result, sample, halves in zip(results, like, received, strict=True)
        ]
        return received, self.launch(relay.back, kinds, 2 * tag + _BETWEEN, RETURNING)
