"""Counts the bytes that cross each link between context-parallel ranks, phase by phase, as attention sends them.

`chunk_counts` says how many chunks each rank sends along the axes of a grid; here they get bytes and messages.
`tests/planner` lists the messages from the plans and routes that attention runs, and finds the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_attn2d.planner.chunk_counts import Stage, stages

_STATISTIC_BYTES = 4  # log-sum-exp and delta are fp32


@dataclass(frozen=True)
class Workload:
    """One attention layer on one tensor-parallel rank.

    Attributes:
        seq: tokens of the whole sequence.
        heads, kv_heads: query and key/value heads of the tensor-parallel rank.
        head_dim: width of a head of queries, keys and values.
        batch: sequences per micro-batch.
        element_bytes: bytes of a number; 2 for bf16.
        causal: whether the mask is causal; there is no mask otherwise.
    """

    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    element_bytes: int = 2
    causal: bool = True

    def shard_bytes(self, ranks: int) -> float:
        """Bytes of one rank's shard of Q, the unit u of tables."""
        return self.seq * self.batch * self.heads * self.head_dim * self.element_bytes / ranks


@dataclass(frozen=True)
class Phase:
    """Messages that are sent at once, before or after a computation.

    Attributes:
        name: the tensors that are sent.
        total: bytes that all ranks send together.
        outside: bytes of these that cross nodes.
        busiest_link: bytes that the busiest rank sends or receives within its node, in the busier direction.
        busiest_rank: bytes that the busiest rank sends to or receives from other nodes.
        busiest_node: bytes that the busiest node sends to or receives from other nodes.
        messages: the most messages that a rank receives.
        over_heads: whether the messages exchange sequence for heads, before or after all other phases.
        returns: whether the messages return partial results after a computation.
        times: how often the phase happens, one after the other.
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
        """Bytes of both passes that cross nodes."""
        return sum(phase.outside * phase.times for phase in (*self.forward, *self.backward))


def attention2d_traffic(
    axes: tuple[int, int, int], work: Workload, *, tile: tuple[int, int] | None = None, ranks_per_node: int = 1
) -> Traffic:
    """Phases of attention2d on U x R x C ranks: exchange over heads, gather, return, exchange over heads again.

    Args:
        axes: U, R and C.
        work: the layer.
        tile: rows and columns of the blocks of the grid whose ranks forward chunks for each other; None: no forwarding.
        ranks_per_node: number of consecutive ranks that share a node.
    """
    u, rows, cols = axes
    places = rows * cols
    token_head = work.batch * work.head_dim * work.element_bytes
    chunk = work.seq / (2 * places) * work.batch  # tokens of a chunk of the R x C zigzag, of all sequences
    heads, kv_heads = work.heads / u, max(work.kv_heads / u, 1.0)
    q = chunk * heads * work.head_dim * work.element_bytes
    kv = chunk * kv_heads * work.head_dim * work.element_bytes
    row_statistic = chunk * heads * _STATISTIC_BYTES

    both = stages(axes, tile, ranks_per_node, work.causal)
    spread = work.seq / (places * u) * token_head  # one head of one rank's tokens

    def over_heads(name: str, sent: float, tensors: int) -> Iterator[Phase]:
        yield from _over_heads(f"{name} over heads", places, u, ranks_per_node, sent, tensors)

    forward = [
        *over_heads("q, k, v", spread * (heads + 2 * kv_heads), 3),
        *_gather("gather q; k, v", both, _Sent(q, 1), _Sent(2 * kv, 2)),
        *_return("return o", both, _Sent(q + row_statistic, 2), _Sent(0.0, 0)),
        *over_heads("o", spread * heads, 1),
    ]
    backward = [
        *over_heads("do", spread * heads, 1),
        *_gather("gather q, do; k, v", both, _Sent(2 * q + 2 * row_statistic, 3), _Sent(2 * kv, 2)),
        *_return("return dq; dk, dv", both, _Sent(q, 1), _Sent(2 * kv, 2)),
        *over_heads("dq, dk, dv", spread * (heads + 2 * kv_heads), 3),
    ]
    return Traffic(forward, backward)


def ring_traffic(ranks: int, work: Workload, *, ranks_per_node: int = 1) -> Traffic:
    """Phases of ring attention: P-1 steps that send keys and values, and in the backward pass their gradients too."""
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
    """Bytes and messages of one chunk of queries, or of keys."""

    chunk_bytes: float
    messages: int


def _gather(name: str, stages: tuple[Stage, Stage], queries: _Sent, keys: _Sent) -> Iterator[Phase]:
    between, within = stages
    yield from _phase(f"{name}, between nodes", between, queries, keys, returns=False)
    yield from _phase(f"{name}, within nodes", within, queries, keys, returns=False)


def _return(name: str, stages: tuple[Stage, Stage], queries: _Sent, keys: _Sent) -> Iterator[Phase]:
    between, within = stages
    yield from _phase(f"{name}, within nodes", within, queries, keys, returns=True)
    yield from _phase(f"{name}, between nodes", between, queries, keys, returns=True)


def _phase(name: str, stage: Stage, queries: _Sent, keys: _Sent, returns: bool) -> Iterator[Phase]:
    """The phase of one stage of the exchange along the axes; none where it sends nothing."""
    weights = queries.chunk_bytes, keys.chunk_bytes
    received = stage.returned if returns else stage.gathered
    if not (total := stage.total[0] * weights[0] + stage.total[1] * weights[1]):
        return
    yield Phase(
        name,
        total,
        stage.outside[0] * weights[0] + stage.outside[1] * weights[1],
        stage.link.weighed(*weights),
        stage.rank.weighed(*weights),
        stage.node.weighed(*weights),
        round(received.weighed(queries.messages, keys.messages)),
        returns=returns,
    )


def _over_heads(name: str, places: int, u: int, ranks_per_node: int, sent: float, tensors: int) -> Iterator[Phase]:
    """Each of the U ranks of a place sends each other one its heads of its own tokens, two chunks per tensor."""
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
