"""How many bytes cross which links between context-parallel ranks, phase by phase, as the attention sends them.

What the causal mask hides is not sent and not counted. In the zigzag (`attention.layout`) the tile of a row's queries
and a column's keys needs all upper query chunks and all lower key chunks; the lower query chunk of a rank behind the
first rank of the column, as it then sees a key; and the upper key chunk of a rank behind the first rank of the row. So
whatever travels along an axis, a rank that sends to another, or to a node, sends one chunk or two, and which of them
depends on two numbers: its rank, and the first rank on the other side of that tile. Who sends how much is then a matter
of counting ranks behind a rank, for all ranks at once, and nobody lists messages: 4,096 ranks take milliseconds.
`tests/planner` lists them, from the plans and routes that the attention runs, and finds the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_attn2d.attention.layout import place_ranks

_STATISTIC_BYTES = 4  # log-sum-exp and delta are fp32

type _Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Workload:
    """One attention layer on one tensor-parallel rank.

    Attributes:
        seq: tokens of the whole sequence.
        heads, kv_heads: query and key/value heads of the tensor-parallel rank.
        head_dim: of queries, keys and values.
        batch: sequences at once.
        element_bytes: 2 for bf16.
        causal: causal mask, or none.
    """

    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    element_bytes: int = 2
    causal: bool = True

    def shard_bytes(self, ranks: int) -> float:
        """u: one rank's shard of Q."""
        return self.seq * self.batch * self.heads * self.head_dim * self.element_bytes / ranks


@dataclass(frozen=True)
class Phase:
    """Messages that fly at once, before or after a computation; bytes.

    Attributes:
        name: what is sent.
        total: what all ranks send together.
        outside: what of that crosses nodes.
        busiest_link: what the busiest rank sends or receives within its node.
        busiest_rank: what the busiest rank sends to or receives from other nodes.
        busiest_node: what the busiest node sends to or receives from others.
        messages: the most messages that a rank receives.
        over_heads: whether they exchange sequence for heads, before or after all else.
        returns: whether they return partial results after a computation.
        times: how often it happens, one after the other.
    """

    name: str
    total: float
    outside: float
    busiest_link: float
    busiest_rank: float
    busiest_node: float
    messages: int
    over_heads: bool = False
    returns: bool = False
    times: int = 1


@dataclass(frozen=True)
class Traffic:
    """All phases of a layer's forward and backward pass, in order."""

    forward: list[Phase] = field(default_factory=list)
    backward: list[Phase] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Bytes that all ranks send in both passes."""
        return sum(phase.total * phase.times for phase in (*self.forward, *self.backward))

    @property
    def outside(self) -> float:
        """What of them crosses nodes."""
        return sum(phase.outside * phase.times for phase in (*self.forward, *self.backward))


def attention2d_traffic(
    axes: tuple[int, int, int], work: Workload, *, tile: tuple[int, int] | None = None, ranks_per_node: int = 1
) -> Traffic:
    """Messages of attention2d on U x R x C ranks: over heads, gathered, returned, over heads again.

    Args:
        axes: U, R and C.
        tile: rows and columns of the grid's blocks that forward chunks for each other; without one nobody does.
        ranks_per_node: so many consecutive ranks share a node.
    """
    u, rows, cols = axes
    places = rows * cols
    token_head = work.batch * work.head_dim * work.element_bytes
    chunk = work.seq / (2 * places) * work.batch  # tokens of a chunk of the R x C zigzag, of all sequences
    heads, kv_heads = work.heads / u, max(work.kv_heads / u, 1.0)
    q = chunk * heads * work.head_dim * work.element_bytes
    kv = chunk * kv_heads * work.head_dim * work.element_bytes
    row_statistic = chunk * heads * _STATISTIC_BYTES

    stages = _stages(axes, tile, ranks_per_node, work.causal)
    spread = work.seq / (places * u) * token_head  # one head of one rank's tokens

    def over_heads(name: str, sent: float, tensors: int) -> Iterator[Phase]:
        yield from _over_heads(f"{name} over heads", places, u, ranks_per_node, sent, tensors)

    forward = [
        *over_heads("q, k, v", spread * (heads + 2 * kv_heads), 3),
        *_gather("gather q; k, v", stages, _Sent(q, 1), _Sent(2 * kv, 2)),
        *_return("return o", stages, _Sent(q + row_statistic, 2), _Sent(0.0, 0)),
        *over_heads("o", spread * heads, 1),
    ]
    backward = [
        *over_heads("do", spread * heads, 1),
        *_gather("gather q, do; k, v", stages, _Sent(2 * q + 2 * row_statistic, 3), _Sent(2 * kv, 2)),
        *_return("return dq; dk, dv", stages, _Sent(q, 1), _Sent(2 * kv, 2)),
        *over_heads("dq, dk, dv", spread * (heads + 2 * kv_heads), 3),
    ]
    return Traffic(forward, backward)


def ring_traffic(ranks: int, work: Workload, *, ranks_per_node: int = 1) -> Traffic:
    """Messages of ring attention: P-1 steps of keys and values, backward their gradients as well."""
    if ranks == 1:
        return Traffic()
    kv = 2 * work.shard_bytes(ranks) * work.kv_heads / work.heads
    nodes = -(-ranks // ranks_per_node)
    leaving = nodes if nodes > 1 else 0

    def steps(name: str, sent: float, messages: int) -> Phase:
        across = sent if leaving else 0.0
        within = sent if ranks_per_node > 1 else 0.0
        return Phase(name, ranks * sent, leaving * sent, within, across, across, messages, times=ranks - 1)

    return Traffic([steps("k, v", kv, 2)], [steps("k, v, dk, dv", 2 * kv, 4)])


class _Sent(NamedTuple):
    """Bytes and messages that a chunk of queries, or of keys, is."""

    chunk_bytes: float
    messages: int


class _Most(NamedTuple):
    """Chunks of queries and chunks of keys of those ranks or nodes that may be the busiest, whatever a chunk weighs."""

    queries: _Integers
    keys: _Integers

    @classmethod
    def of(cls, queries: _Integers, keys: _Integers) -> _Most:
        """Without those that another one exceeds in both."""
        order = np.lexsort((-keys, -queries))
        queries, keys = queries[order], keys[order]
        before = np.concatenate(([-1], np.maximum.accumulate(keys)[:-1]))
        return cls(queries[keys > before], keys[keys > before])

    def weighed(self, queries: float, keys: float) -> float:
        """The most of them all, with so much for each chunk."""
        return float((self.queries * queries + self.keys * keys).max())


class _Stage(NamedTuple):
    """One stage of the exchange along both axes, between blocks of the grid or within them; chunks.

    Attributes:
        total, outside: of queries and of keys, sent by all ranks together.
        link, rank, node: see `Phase`.
        gathered, returned: received by a rank when chunks are gathered, and when partial results return.
    """

    total: tuple[int, int]
    outside: tuple[int, int]
    link: _Most
    rank: _Most
    node: _Most
    gathered: _Most
    returned: _Most

    def phase(self, name: str, queries: _Sent, keys: _Sent, returns: bool) -> Phase:
        """With what a chunk weighs."""
        weights = queries.chunk_bytes, keys.chunk_bytes
        received = self.returned if returns else self.gathered
        return Phase(
            name,
            self.total[0] * weights[0] + self.total[1] * weights[1],
            self.outside[0] * weights[0] + self.outside[1] * weights[1],
            self.link.weighed(*weights),
            self.rank.weighed(*weights),
            self.node.weighed(*weights),
            round(received.weighed(queries.messages, keys.messages)),
            returns=returns,
        )


def _gather(name: str, stages: tuple[_Stage, _Stage], queries: _Sent, keys: _Sent) -> Iterator[Phase]:
    between, within = stages
    yield from _sending(between.phase(f"{name}, between nodes", queries, keys, returns=False))
    yield from _sending(within.phase(f"{name}, within nodes", queries, keys, returns=False))


def _return(name: str, stages: tuple[_Stage, _Stage], queries: _Sent, keys: _Sent) -> Iterator[Phase]:
    between, within = stages
    yield from _sending(within.phase(f"{name}, within nodes", queries, keys, returns=True))
    yield from _sending(between.phase(f"{name}, between nodes", queries, keys, returns=True))


def _sending(phase: Phase) -> Iterator[Phase]:
    if phase.total:
        yield phase


class _Axis:
    """One axis of the grid: what its ranks send to each other in both stages, in chunks.

    Lines are the rows, along which queries travel, or the columns, along which keys do. Members of a line stand in
    blocks of `size`, nodes of the exchange. Between blocks a chunk goes to the member of each that stands where its
    owner does in its own, and within a block from there to whoever needs it (`attention.routes`).

    Args:
        lines: ranks, [lines, members].
        lowest: by member, the first rank on the other side of its tile, or -1 where no mask hides anything.
    """

    def __init__(self, lines: _Integers, lowest: _Integers, size: int) -> None:
        count, members = lines.shape
        self.blocks, self.size, self.lowest = members // size, size, lowest
        self.block_lowest = lowest.reshape(self.blocks, size).min(1)
        self.line, self.member = (np.empty(lines.size, np.int64) for _ in range(2))  # by rank
        self.line[lines], self.member[lines] = np.indices(lines.shape)
        # Ranks that stand at one place of their blocks: what one member of a block hands on to the others.
        self._classes = np.sort(lines.reshape(count, self.blocks, size).swapaxes(1, 2).reshape(-1, self.blocks), 1)
        self._stride = lines.size + 1
        offsets = self._stride * np.arange(len(self._classes))
        self._sorted = (self._classes + offsets[:, None]).ravel()

    def behind(self, line: _Integers, place: _Integers, rank: _Integers) -> _Integers:
        """How many ranks that stand at `place` of their blocks of a line are behind a rank."""
        which = line * self.size + place
        found = np.searchsorted(self._sorted, which * self._stride + rank, "right")
        return (which + 1) * self.blocks - found

    def between(self) -> tuple[_Integers, _Integers]:
        """Sent and received between blocks, by rank."""
        ranks = np.arange(len(self.line))
        block, place = np.divmod(self.member, self.size)
        own = ranks > self.block_lowest[block]  # what it would send to its own block
        sent = np.searchsorted(np.sort(self.block_lowest), ranks, "left") - own
        received = self.behind(self.line, place, self.block_lowest[block]) - own
        return self.blocks - 1 + sent, self.blocks - 1 + received

    def within(self) -> tuple[_Integers, _Integers]:
        """Sent and received within blocks, by rank."""
        sent, received = (np.zeros(len(self.line), np.int64) for _ in range(2))
        if self.size == 1:
            return sent, received
        block, place = np.divmod(self.member, self.size)
        for other in range(self.size):  # of the block: who sends, then who receives
            apart = place != other
            received += apart * (self.blocks + self.behind(self.line, other + 0 * place, self.lowest[self.member]))
            sent += apart * (self.blocks + self.behind(self.line, place, self.lowest[block * self.size + other]))
        return sent, received

    def pairs(self, sender: _Integers, receiver: _Integers) -> tuple[_Integers, _Integers]:
        """Between and within blocks, from ranks to other ranks."""
        (block, place), (to_block, to_place) = (np.divmod(self.member[r], self.size) for r in (sender, receiver))
        meet = self.line[sender] == self.line[receiver]
        between = meet & (block != to_block) & (place == to_place)
        within = meet & (block == to_block)
        chunks = self.blocks + self.behind(self.line[sender], place, self.lowest[self.member[receiver]])
        return between * (1 + (sender > self.block_lowest[to_block])), within * chunks


@lru_cache(maxsize=4096)
def _stages(
    axes: tuple[int, int, int], tile: tuple[int, int] | None, ranks_per_node: int, causal: bool
) -> tuple[_Stage, _Stage]:
    """Between blocks and within them. Each of the U ranks of a place sends what the place does."""
    u, rows, cols = axes
    ranks = np.array(place_ranks(rows, cols, *(tile or (rows, 1))), np.int64)
    block_rows, block_cols = tile or (1, 1)
    nothing = np.full(rows * cols, -1)
    queries = _Axis(ranks, ranks.min(0) if causal else nothing[:cols], block_cols)
    keys = _Axis(ranks.T, ranks.min(1) if causal else nothing[:rows], block_rows)
    # All pairs of context-parallel ranks that share a node and a place among the U, the lower one first.
    everyone = np.arange(u * rows * cols)
    low, high = [], []
    for apart in range(u, ranks_per_node, u):
        first = everyone[:-apart]
        first = first[first // ranks_per_node == (first + apart) // ranks_per_node]
        low.append(first)
        high.append(first + apart)
    senders, receivers = (np.concatenate([*a, *b, np.empty(0, np.int64)]) for a, b in ((low, high), (high, low)))
    near = [axis.pairs(senders // u, receivers // u) for axis in (queries, keys)]
    sides = [(axis.between(), axis.within()) for axis in (queries, keys)]
    return tuple(  # type: ignore[return-value]
        _stage(u, ranks_per_node, [side[i] for side in sides], [pairs[i] for pairs in near], senders, receivers)
        for i in range(2)
    )


def _stage(
    u: int,
    ranks_per_node: int,
    sides: list[tuple[_Integers, _Integers]],
    near: list[_Integers],
    senders: _Integers,
    receivers: _Integers,
) -> _Stage:
    """From what is sent and received by place, of queries and of keys, and what pairs of ranks of a node send."""
    links, ranks, nodes, totals, outsides = [], [], [], [], []
    for (sent, received), pairs in zip(sides, near, strict=True):
        everything = np.repeat(sent, u), np.repeat(received, u)
        size = len(everything[0])
        within = [np.bincount(ends, pairs, size).astype(np.int64) for ends in (senders, receivers)]
        across = [whole - part for whole, part in zip(everything, within, strict=True)]
        node = np.arange(size) // ranks_per_node
        links.append(np.concatenate(within))
        ranks.append(np.concatenate(across))
        nodes.append(np.concatenate([np.bincount(node, side).astype(np.int64) for side in across]))
        totals.append(int(everything[0].sum()))
        outsides.append(int(across[0].sum()))
    return _Stage(
        (totals[0], totals[1]),
        (outsides[0], outsides[1]),
        _Most.of(*links),
        _Most.of(*ranks),
        _Most.of(*nodes),
        _Most.of(*(received for _, received in sides)),
        _Most.of(*(sent for sent, _ in sides)),
    )


def _over_heads(name: str, places: int, u: int, ranks_per_node: int, sent: float, tensors: int) -> Iterator[Phase]:
    """Every rank of a head group sends every other one its heads of its tokens, two chunks per tensor."""
    if u == 1:
        return
    rank = np.arange(places * u)
    node, group = rank // ranks_per_node, rank // u
    first = np.maximum(node * ranks_per_node, group * u)
    mates = np.minimum((node + 1) * ranks_per_node, (group + 1) * u) - first - 1  # of the group, in the own node
    others = u - 1 - mates
    yield Phase(
        name,
        places * u * (u - 1) * sent,
        int(others.sum()) * sent,
        int(mates.max()) * sent,
        int(others.max()) * sent,
        int(np.bincount(node, others).max()) * sent,
        2 * tensors * (u - 1),
        over_heads=True,
    )
