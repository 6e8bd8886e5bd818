"""Predicts the time and memory of a layer's attention on a cluster, for every mode, grid and placement.

A phase of messages takes as long as its busiest link, in the busier direction: the network cards of a node together,
the cards that one rank can use, or a rank's links within the node. To that come a latency, and a little time for each
message that a rank receives. Kernels run at the given rates. Then, with m the time of the messages around a tile and c
that of its kernels,

    attention2d in G groups of heads     (m + c) / G + (G - 1) / G max(m, c) - h  first gather and last return show
    ring of P ranks                      c / P + (P - 1) max(m / (P - 1), c / P)  each step hides the next messages

and no kernel hides the exchange over heads, before and after. h is what a rank's own two chunks hide: under a causal
mask it attends them, 1/(2 R C) of its kernels (1/(R C) where R or C is 1), while the first gather is under way. With
one group half of these kernels may wait, to hide the returns.

No pass is shorter than the time that the CPU takes to start its kernel calls and exchanges, group by group; a GPU with
few tokens waits for that.
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
    """The rates of a context-parallel rank; those of links are in one direction.

    Attributes:
        ranks_per_node: context-parallel ranks on a node: its GPUs over the tensor-parallel size.
        intra_bytes_per_s: bandwidth of one rank's links within its node.
        nic_bytes_per_s: bandwidth of a node's network cards, over its ranks.
        rank_nic_bytes_per_s: bandwidth of the cards that one rank can use alone: its own, or all that the node shares.
        intra_latency_s, nic_latency_s: seconds from one rank to another, for messages that are sent at once.
        message_s: seconds that each message costs its rank besides.
        forward_flops, backward_flops: rates of the attention kernel, in FLOP/s.
        stock_speed: share of these rates that the kernels of a ring and of all_gather reach, which are not ours.
        launch_s: CPU seconds to start a kernel call or an exchange; 0 leaves them out.
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
    stock_speed: float = 1.0


class Candidate(NamedTuple):
    """A way to run context parallelism.

    Attributes:
        mode: attention2d, ring, all_gather or ulysses.
        axes: U, R and C; None for the ring.
        tile: rows and columns of the block of the grid that consecutive ranks fill; None: whole columns.
    """

    mode: str
    axes: tuple[int, int, int] | None
    tile: tuple[int, int] | None

    @property
    def label(self) -> str:
        """The candidate as text: 'attention2d 2x4x4, tile 4x2'."""
        if self.axes is None:
            return self.mode
        u, r, c = self.axes
        shape = f"{r}x{c}" if u == 1 else f"{u}x{r}x{c}"
        tiled = "" if self.tile is None else f", tile {self.tile[0]}x{self.tile[1]}"
        return self.mode if self.mode in ("all_gather", "ulysses") else f"{self.mode} {shape}{tiled}"

    @property
    def stock(self) -> bool:
        """Whether it runs in other kernels than a grid's: Transformer Engine's, where that is installed."""
        return self.mode in ("ring", "all_gather")


@dataclass(frozen=True)
class Prediction:
    """The time and memory of a layer's attention on the slowest rank.

    Attributes:
        head_groups: the number of head groups that the time assumes.
        forward_s, backward_s: seconds of each pass.
        device_s: seconds of both passes, if starting kernels cost nothing.
        messages_s: seconds of the messages alone, in both passes.
        kernels_s: seconds of the kernels alone, in both passes.
        intra_bytes, nic_bytes: bytes that a rank receives within its node and from other nodes, in both passes; the
            mean over the ranks.
        transient_bytes: bytes that the backward pass takes at its peak, besides its inputs.
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
        """Seconds of both passes."""
        return self.forward_s + self.backward_s


CLOSE = 1.03
"""Factor below which two times count as equal: predictions are not accurate to 3%."""


def predict(
    candidate: Candidate, ranks: int, work: Workload, cluster: Cluster, head_groups: Sequence[int] = (1, 2, 4, 8)
) -> Prediction:
    """Predict one candidate, with the fewest head groups whose time is close to that of the best number.

    Args:
        candidate: the mode and grid.
        ranks: of the context.
        work: the layer.
        cluster: its rates.
        head_groups: numbers of groups to choose from, ascending.
    """
    node = cluster.ranks_per_node
    traffic = (
        ring_traffic(ranks, work, ranks_per_node=node)
        if candidate.axes is None
        else attention2d_traffic(candidate.axes, work, tile=candidate.tile, ranks_per_node=node)
    )
    flops = 4 * work.seq**2 * work.batch * work.heads * work.head_dim / ranks / (2 if work.causal else 1)
    speed = cluster.stock_speed if candidate.stock else 1.0
    kernels = flops / (cluster.forward_flops * speed), 2.5 * flops / (cluster.backward_flops * speed)
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
    """Yields the ring, all_gather, Ulysses, and attention2d on every U x R x C with every tile that a node holds."""
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
                yield Candidate("attention2d", (u, rows, cols), tile)


def plan(ranks: int, work: Workload, cluster: Cluster) -> list[Prediction]:
    """Predictions of all candidates, by total time, then by the GPU's time, then by memory, the least first."""
    found = [
        predict(candidate, ranks, work, cluster)
        for candidate in candidates(ranks, work.heads, work.kv_heads, cluster.ranks_per_node)
    ]
    return sorted(found, key=lambda p: (p.total_s, p.device_s, p.transient_bytes))


def phase_seconds(phase: Phase, cluster: Cluster, head_groups: int = 1) -> float:
    """Seconds of messages that are sent at once; head groups share the bytes, but each sends as many messages."""
    seconds = max(
        phase.busiest_node / (cluster.nic_bytes_per_s * cluster.ranks_per_node),
        phase.busiest_rank / cluster.rank_nic_bytes_per_s,
        phase.busiest_link / cluster.intra_bytes_per_s,
    )
    latency = cluster.nic_latency_s if phase.outside else cluster.intra_latency_s
    return seconds + head_groups * (latency + phase.messages * cluster.message_s)


class Starts(NamedTuple):
    """CPU time to start a pass of a mode, in launches of `Cluster.launch_s`: a fixed part, and a part per rank."""

    fixed: float
    per_rank: float


# Fitted to what calls cost the host with 4 to 256 ranks (docs/planner.md, "Host time"), where a launch of Transformer
# Engine's modes took 0.38 ms. What a grid starts is counted in the same unit.
RING_STARTS = Starts(4.0, 0.575)
"""Transformer Engine's p2p: each step starts a kernel and messages, which cost less than a launch each."""
ALL_GATHER_STARTS = Starts(4.5, 0.065)
"""Transformer Engine's all_gather: chunks are put in order before and after the kernels."""
GRID_STARTS = (2.8, 3.8)
"""A grid's own chunks, tile and merges, forward and backward; in the backward pass also delta and sums."""
HEADS_STARTS = (1.8, 2.6)
"""The same where heads alone are spread, with the copies before and after the exchange over heads."""
SPREAD_STARTS = (1.0, 2.0)
"""Those copies where a grid spreads heads too."""
EXCHANGE_STARTS = 0.43
"""A stage of an exchange."""
PEER_STARTS = 0.012
"""What it takes more for each rank that it has messages with."""


def launches(candidate: Candidate, ranks: int, groups: int) -> tuple[float, float]:
    """What the CPU starts, forward and backward, in launches of `Cluster.launch_s`.

    On a grid keys are gathered, and return in the backward pass; queries do both in both. The exchange over heads
    brings q, k, v, then the output, and the gradients alike.
    """
    if candidate.axes is None or candidate.stock:
        starts = RING_STARTS if candidate.axes is None else ALL_GATHER_STARTS
        one_pass = starts.fixed + starts.per_rank * ranks
        return one_pass, one_pass
    spread, rows, cols = candidate.axes
    node_rows, node_cols = candidate.tile or (1, 1)
    keys, queries = _exchange_starts(rows, node_rows), _exchange_starts(cols, node_cols)
    over_heads = 2 * _exchange_starts(spread, 1)
    if rows * cols == 1:
        return HEADS_STARTS[0] + over_heads, HEADS_STARTS[1] + over_heads
    copies = SPREAD_STARTS if spread > 1 else (0.0, 0.0)
    forward = GRID_STARTS[0] + keys + 2 * queries
    backward = GRID_STARTS[1] + 2 * keys + 2 * queries
    return groups * forward + over_heads + copies[0], groups * backward + over_heads + copies[1]


def _exchange_starts(members: int, node: int) -> float:
    """Launches of one exchange along an axis of `members` ranks, of which `node` share a node.

    There is a stage between nodes and a stage within them, each if it has peers.
    """
    others = members // node - 1, node - 1
    return sum(EXCHANGE_STARTS + PEER_STARTS * count for count in others if count)


def diagonal_share(candidate: Candidate, work: Workload) -> float:
    """The share of a rank's kernels on a grid that need no other rank's chunks.

    That is 1 of the 2 R C squares of its tile, and 2 where only keys or only queries travel (see `layout`). all_gather
    attends them with the rest.
    """
    if candidate.stock or candidate.axes is None or not work.causal:
        return 0.0
    _, rows, cols = candidate.axes
    return (2 if 1 in (rows, cols) else 1) / (2 * rows * cols)


def transient_bytes(candidate: Candidate, ranks: int, work: Workload, groups: int) -> float:
    """Bytes that the backward pass takes at its peak besides its inputs (`peak`).

    With an exchange over heads, Q, O, dO, dQ and K, V, dK, dV exist twice, before and after it.
    """
    shard = work.shard_bytes(ranks)
    if candidate.axes is None:
        return shard * ring_shards(work.kv_heads / work.heads)
    spread, rows, cols = candidate.axes
    kv = max(work.kv_heads, spread) / work.heads  # fewer key/value heads than U are repeated
    return shard * (grid_shards(rows, cols, kv, groups) + (4 + 4 * kv if spread > 1 else 0))


_GROUP_COST = 0.02
"""Share of the kernels' time that each further head group adds, as its kernels are smaller.

On two H100 at 64K tokens, 2x1, two groups cost 2% and four groups 5%, although they hide returns of 0.7% and 1.0% of
the kernels' time.
"""


_CUT_S = 1e-4
"""Seconds by which two kernel calls of half the heads exceed one of all; two H200, 32K tokens, backward pass."""


def _grouped_seconds(
    traffic: Traffic, kernels: tuple[float, float], groups: int, cluster: Cluster, own: float, cut: bool
) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass on a grid.

    Args:
        traffic: the messages.
        kernels: seconds of the kernels in each pass.
        groups: head groups.
        cluster: its rates.
        own: the share of the kernels that runs while messages are under way (`diagonal_share`).
        cut: whether half of that share may wait to hide the returns.
    """
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
    """No tile, and the tiles of at most `places` ranks that no other such tile contains.

    A tile of one whole column is left out, as it is the order of ranks without tiles, and so is a whole grid.
    """
    fitting = [(r, c) for r in _divisors(rows) for c in _divisors(cols) if r * c <= places]
    largest = [t for t in fitting if not any(t != o and t[0] <= o[0] and t[1] <= o[1] for o in fitting)]
    return [None, *(tile for tile in largest if tile not in ((1, 1), (rows, 1), (rows, cols)))]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
