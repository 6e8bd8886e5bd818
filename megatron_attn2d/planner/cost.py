"""How long a layer's attention takes on a cluster, and how much memory, for every mode, grid and placement.

A phase of messages takes as long as its busiest link: the cards of a node together, those that one rank can use, or a
rank's links within the node, in the busier direction, a latency, and a little for each message that a rank receives.
Kernels run at the given rates. Then, with m the time of the messages around a tile and c that of its kernels,

    attention2d in G groups of heads     (m + c) / G + (G - 1) / G max(m, c) - h  first gather and last return show
    ring of P ranks                      c / P + (P - 1) max(m / (P - 1), c / P)  each step hides the next messages

and the exchange over heads, before and after, hides behind nothing. h: under a causal mask a rank attends its own two
chunks, 1/(2 R C) of its kernels (1/(R C) where R or C is 1), while the first gather flies, and hides as much of it. In
one group half of that may be kept for the returns.

No pass is shorter than the CPU takes to start what it consists of, each kernel call and each exchange of each group,
which a GPU with few tokens waits for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_attn2d.attention.overlap import SMALLEST_HALF
from megatron_attn2d.planner.peak import grid_shards, ring_shards
from megatron_attn2d.planner.traffic import (
    Phase,
    Traffic,
    Workload,
    attention2d_traffic,
    ring_traffic,
)


@dataclass(frozen=True)
class Cluster:
    """What a context-parallel rank has; rates in one direction.

    Attributes:
        ranks_per_node: context-parallel ranks on a node: its GPUs over the tensor-parallel size.
        intra_bytes_per_s: of one rank's links within its node.
        nic_bytes_per_s: of the cards of a node, over its ranks.
        rank_nic_bytes_per_s: what one rank alone gets of the cards: its own, or all of those that the node shares.
        intra_latency_s, nic_latency_s: from one rank to another, for messages that fly at once.
        message_s: what each message costs its rank besides.
        forward_flops, backward_flops: of the attention kernel, FLOP/s.
        launch_s: what starting a kernel call or an exchange costs the CPU, while the GPU works; 0 leaves it out.
    """

    ranks_per_node: int
    intra_bytes_per_s: float
    nic_bytes_per_s: float
    rank_nic_bytes_per_s: float
    intra_latency_s: float
    nic_latency_s: float
    message_s: float
    forward_flops: float
    backward_flops: float
    launch_s: float = 0.0


class Candidate(NamedTuple):
    """A way to run context parallelism. `axes` are U, R, C; None for the ring."""

    mode: str
    axes: tuple[int, int, int] | None
    tile: tuple[int, int] | None

    @property
    def label(self) -> str:
        """As people write it: 'attention2d 2x4x4, tile 4x2'."""
        if self.axes is None:
            return self.mode
        u, r, c = self.axes
        shape = f"{r}x{c}" if u == 1 else f"{u}x{r}x{c}"
        tiled = "" if self.tile is None else f", tile {self.tile[0]}x{self.tile[1]}"
        return self.mode if self.mode in ("all_gather", "ulysses") else f"{self.mode} {shape}{tiled}"


@dataclass(frozen=True)
class Prediction:
    """What a layer's attention costs on the slowest rank.

    Attributes:
        head_groups: the number of head groups that the time assumes.
        forward_s, backward_s: seconds.
        device_s: seconds of both, if starting kernels cost nothing.
        messages_s: seconds of its messages alone, both passes.
        kernels_s: seconds of its kernels alone, both passes.
        intra_bytes, nic_bytes: received per rank within a node and from other nodes, mean over the ranks, both passes.
        transient_bytes: of the backward pass at its peak, besides its inputs.
    """

    candidate: Candidate
    head_groups: int
    forward_s: float
    backward_s: float
    device_s: float
    messages_s: float
    kernels_s: float
    intra_bytes: float
    nic_bytes: float
    transient_bytes: float

    @property
    def total_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s


CLOSE = 1.03
"""Predictions are not good to 3%: such a gain decides nothing."""


def predict(
    candidate: Candidate, ranks: int, work: Workload, cluster: Cluster, head_groups: Sequence[int] = (1, 2, 4, 8)
) -> Prediction:
    """Predict one candidate with the fewest of `head_groups`, ascending, that are as good as the best of them."""
    node = cluster.ranks_per_node
    traffic = (
        ring_traffic(ranks, work, ranks_per_node=node)
        if candidate.axes is None
        else attention2d_traffic(candidate.axes, work, tile=candidate.tile, ranks_per_node=node)
    )
    flops = 4 * work.seq**2 * work.batch * work.heads * work.head_dim / ranks / (2 if work.causal else 1)
    kernels = flops / cluster.forward_flops, 2.5 * flops / cluster.backward_flops
    if candidate.axes is None:
        timed = [(1, *_ring_seconds(traffic, kernels, ranks, cluster))]
    else:
        kv_heads = max(1, work.kv_heads // candidate.axes[0])
        own = diagonal_share(candidate, work)
        cut = kv_heads > 1 and own * flops / 2 >= SMALLEST_HALF
        timed = [
            (g, *_grouped_seconds(traffic, kernels, g, cluster, own, cut)) for g in head_groups if kv_heads % g == 0
        ]
    started = []
    for g, forward, backward in timed:
        starts = [n * cluster.launch_s for n in launches(candidate, ranks, g)]
        started.append((g, max(forward, starts[0]), max(backward, starts[1]), forward + backward))
    enough = CLOSE * min(forward + backward for _, forward, backward, _ in started)
    groups, forward, backward, device = next(s for s in started if s[1] + s[2] <= enough)
    messages = sum(phase.times * phase_seconds(phase, cluster) for phase in (*traffic.forward, *traffic.backward))
    return Prediction(
        candidate,
        groups,
        forward,
        backward,
        device,
        messages,
        sum(kernels),
        (traffic.total - traffic.outside) / ranks,
        traffic.outside / ranks,
        transient_bytes(candidate, ranks, work, groups),
    )


def candidates(ranks: int, heads: int, kv_heads: int, ranks_per_node: int) -> Iterator[Candidate]:
    """The ring, the gather of all keys, Ulysses, and attention2d on every U x R x C with every tile of a node."""
    yield Candidate("ring", None, None)
    yield Candidate("all_gather", (1, ranks, 1), None)
    for u in _divisors(ranks):
        if heads % u or (kv_heads % u and u % kv_heads):
            continue
        if u == ranks:
            yield Candidate("ulysses", (u, 1, 1), None)
            continue
        for rows in _divisors(ranks // u):
            cols = ranks // u // rows
            for tile in _tiles(rows, cols, max(1, ranks_per_node // u)):
                if rows < ranks or tile is not None:  # without tiles that is all_gather
                    yield Candidate("attention2d", (u, rows, cols), tile)


def plan(ranks: int, work: Workload, cluster: Cluster) -> list[Prediction]:
    """Predictions of all candidates, the fastest first; where starts decide, the GPU's time; then memory."""
    found = [
        predict(candidate, ranks, work, cluster)
        for candidate in candidates(ranks, work.heads, work.kv_heads, cluster.ranks_per_node)
    ]
    return sorted(found, key=lambda p: (p.total_s, p.device_s, p.transient_bytes))


def phase_seconds(phase: Phase, cluster: Cluster, head_groups: int = 1) -> float:
    """Seconds of messages that fly at once; head groups share their bytes, but each sends all the messages."""
    seconds = max(
        phase.busiest_node / (cluster.nic_bytes_per_s * cluster.ranks_per_node),
        phase.busiest_rank / cluster.rank_nic_bytes_per_s,
        phase.busiest_link / cluster.intra_bytes_per_s,
    )
    latency = cluster.nic_latency_s if phase.outside else cluster.intra_latency_s
    return seconds + head_groups * (latency + phase.messages * cluster.message_s)


class Starts(NamedTuple):
    """What a pass of a mode makes the CPU start, in launches of `Cluster.launch_s`: `fixed`, and more for each rank."""

    fixed: float
    per_rank: float


# Fitted to what calls cost the host with 4 to 256 ranks (docs/planner.md, "Host time"); a launch took 0.38 ms.
RING_STARTS = Starts(4.0, 0.575)
"""Transformer Engine's p2p: a step's kernel and messages follow each other quickly once the first has started."""
ALL_GATHER_STARTS = Starts(4.5, 0.065)
"""Transformer Engine's all_gather: chunks are put in order before and after the kernels."""
PEER_STARTS = 0.025
"""Of a launch, for each rank that a stage of an exchange has messages with: the stage itself is one launch."""


def launches(candidate: Candidate, ranks: int, groups: int) -> tuple[float, float]:
    """Kernel calls and exchanges that the CPU starts, forward and backward; a ring's and all_gather's as measured.

    On a grid: the own chunks, the tile in two, the merge; in the backward pass also delta, and sums for a merge. Keys
    are gathered, and return in the backward pass; queries do both in both. The exchange over heads brings q, k, v and
    their copies, then the output, and the gradients alike.
    """
    if candidate.axes is None or candidate.mode == "all_gather":
        starts = RING_STARTS if candidate.axes is None else ALL_GATHER_STARTS
        one_pass = starts.fixed + starts.per_rank * ranks
        return one_pass, one_pass
    spread, rows, cols = candidate.axes
    node_rows, node_cols = candidate.tile or (1, 1)
    keys, queries = _exchange_starts(rows, node_rows), _exchange_starts(cols, node_cols)
    kernels = (4, 5) if rows * cols > 1 else (3, 4)
    forward = kernels[0] + keys + 2 * queries
    backward = kernels[1] + 2 * keys + 2 * queries
    copies = (1, 2) if spread > 1 else (0, 0)
    over_heads = 2 * _exchange_starts(spread, 1)
    return groups * forward + over_heads + copies[0], groups * backward + over_heads + copies[1]


def _exchange_starts(members: int, node: int) -> float:
    """Of one exchange along an axis: a stage between nodes, and one within them where `node` members share one."""
    others = members // node - 1, node - 1
    return sum(1 + PEER_STARTS * count for count in others if count)


def diagonal_share(candidate: Candidate, work: Workload) -> float:
    """Of a rank's kernels on a grid, what needs no other rank's chunks.

    Of the 2 R C squares of its tile that is 1, and 2 where only keys or only queries travel (see `layout`).
    """
    if candidate.axes is None or not work.causal:
        return 0.0
    _, rows, cols = candidate.axes
    return (2 if 1 in (rows, cols) else 1) / (2 * rows * cols)


def transient_bytes(candidate: Candidate, ranks: int, work: Workload, groups: int) -> float:
    """What the backward pass takes at its peak besides its inputs, in bytes (`peak`).

    Where heads are spread Q, O, dO, dQ and K, V, dK, dV are there once more, with other heads.
    """
    shard = work.shard_bytes(ranks)
    if candidate.axes is None:
        return shard * ring_shards(work.kv_heads / work.heads)
    spread, rows, cols = candidate.axes
    kv = max(work.kv_heads, spread) / work.heads  # fewer key/value heads than U are repeated
    return shard * (grid_shards(rows, cols, kv, groups) + (4 + 4 * kv if spread > 1 else 0))


_GROUP_COST = 0.02
"""What a head group adds to the time of kernels, which are smaller.

On two H100 at 64K tokens, 2x1, two groups cost 2% and four 5%, though they hide 0.7% and 1.0%: so much of the kernels'
time their returns take.
"""


_CUT_S = 1e-4
"""What two kernel calls of half the heads take longer than one of all; two H200, 32K tokens, backward pass."""


def _grouped_seconds(
    traffic: Traffic, kernels: tuple[float, float], groups: int, cluster: Cluster, own: float, cut: bool
) -> tuple[float, float]:
    """Seconds forward and backward; `own` of the kernels hides messages, and `cut` if half of it may hide returns."""
    seconds = []
    for side, alone in zip((traffic.forward, traffic.backward), kernels, strict=True):
        compute = alone * (1 + _GROUP_COST * (groups - 1))
        spread = sum(phase_seconds(p, cluster) for p in side if p.over_heads)
        gather, back = (
            sum(phase_seconds(p, cluster, groups) for p in side if not p.over_heads and p.returns == returns)
            for returns in (False, True)
        )
        messages, hiding = gather + back, own * compute
        if groups == 1 and cut and back:
            hidden = min(gather, hiding / 2) + min(back, hiding / 2) - _CUT_S
        else:
            hidden = min(gather, hiding) / groups
        seconds.append(spread + (messages + compute) / groups + (groups - 1) / groups * max(messages, compute) - hidden)
    return seconds[0], seconds[1]


def _ring_seconds(traffic: Traffic, kernels: tuple[float, float], ranks: int, cluster: Cluster) -> tuple[float, float]:
    seconds = []
    for side, compute in zip((traffic.forward, traffic.backward), kernels, strict=True):
        step = compute / ranks
        seconds.append(step + sum(phase.times * max(phase_seconds(phase, cluster), step) for phase in side))
    return seconds[0], seconds[1]


def _tiles(rows: int, cols: int, places: int) -> list[tuple[int, int] | None]:
    """No tile, and those of at most `places` places that are contained in no other.

    A whole column in a node has no chunk to pass on: it is the order of the ranks without tiles.
    """
    fitting = [(r, c) for r in _divisors(rows) for c in _divisors(cols) if r * c <= places]
    largest = [t for t in fitting if not any(t != o and t[0] <= o[0] and t[1] <= o[1] for o in fitting)]
    return [None, *(tile for tile in largest if tile not in ((1, 1), (rows, 1)))]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
