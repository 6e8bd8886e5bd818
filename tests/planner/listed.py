"""What travels between context-parallel ranks, message by message: the planner's counts are held against it.

Listed from the same tile plans and routes that the attention runs, so nothing here can drift from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from megatron_attn2d.attention.layout import CAUSAL, FULL, Band, Mask, place_ranks, tile_plan
from megatron_attn2d.attention.routes import Routes, by_nodes, plan_routes
from megatron_attn2d.planner.traffic import Phase, Traffic, Workload

_STATISTIC_BYTES = 4  # log-sum-exp and delta are fp32
type Window = tuple[int, int] | None


def mask_of(work: Workload, window: Window, places: int) -> Mask:
    """Who sees whom on so many places of the grid."""
    if window is None:
        return Mask(CAUSAL if work.causal else FULL, places)
    left, right = window
    return Mask.of_one(Band(left, 0 if work.causal else right), places, work.seq // (2 * places))


@dataclass(frozen=True)
class Listed:
    """Messages that fly at once.

    Attributes:
        sent: bytes by (sender, receiver), context-parallel ranks.
        messages: the most messages that a rank receives.
    """

    name: str
    sent: dict[tuple[int, int], float]
    messages: int
    over_heads: bool = False
    returns: bool = False

    def counted(self, ranks_per_node: int) -> Phase:
        """As the planner counts it."""
        loads: dict[str, Counter[int]] = {kind: Counter() for kind in ("link out", "link in", "out", "in")}
        nodes: dict[str, Counter[int]] = {"out": Counter(), "in": Counter()}
        outside = 0.0
        for (sender, receiver), sent in self.sent.items():
            source, target = sender // ranks_per_node, receiver // ranks_per_node
            link = "link " if source == target else ""
            loads[f"{link}out"][sender] += sent  # type: ignore[assignment]
            loads[f"{link}in"][receiver] += sent  # type: ignore[assignment]
            if source != target:
                outside += sent
                nodes["out"][source] += sent  # type: ignore[assignment]
                nodes["in"][target] += sent  # type: ignore[assignment]

        def most(*counters: Counter[int]) -> float:
            return float(max((load for counter in counters for load in counter.values()), default=0.0))

        return Phase(
            self.name,
            sum(self.sent.values()),
            outside,
            most(loads["link out"], loads["link in"]),
            most(loads["out"], loads["in"]),
            most(nodes["out"], nodes["in"]),
            self.messages,
            self.over_heads,
            self.returns,
        )


@dataclass(frozen=True)
class Listing:
    """All phases of a layer's forward and backward pass, in order."""

    forward: list[Listed] = field(default_factory=list)
    backward: list[Listed] = field(default_factory=list)

    def counted(self, ranks_per_node: int) -> Traffic:
        """As the planner counts it; steps of a ring one by one."""
        sides = ([phase.counted(ranks_per_node) for phase in side] for side in (self.forward, self.backward))
        return Traffic(*sides)


def list_attention2d(
    axes: tuple[int, int, int], work: Workload, *, tile: tuple[int, int] | None = None, window: Window = None
) -> Listing:
    """Messages of attention2d on U x R x C ranks: over heads, gathered, returned, over heads again."""
    u, rows, cols = axes
    places = rows * cols
    token_head = work.batch * work.head_dim * work.element_bytes
    chunk = work.seq / (2 * places) * work.batch  # tokens of a chunk of the R x C zigzag, of all sequences
    heads, kv_heads = work.heads / u, max(work.kv_heads / u, 1.0)
    q = chunk * heads * work.head_dim * work.element_bytes
    kv = chunk * kv_heads * work.head_dim * work.element_bytes
    row_statistic = chunk * heads * _STATISTIC_BYTES

    queries, keys = _links(rows, cols, tile, mask_of(work, window, places))
    spread = work.seq / (places * u) * token_head  # one head of one rank's tokens
    forward = [
        _over_heads("q, k, v", places, u, spread * (heads + 2 * kv_heads), 3),
        *_phases("gather q; k, v", u, _GATHER, [(queries, q, 1), (keys, 2 * kv, 2)]),
        *_phases("return o", u, _RETURN, [(queries, q + row_statistic, 2)]),
        _over_heads("o", places, u, spread * heads, 1),
    ]
    backward = [
        _over_heads("do", places, u, spread * heads, 1),
        *_phases("gather q, do; k, v", u, _GATHER, [(queries, 2 * q + 2 * row_statistic, 3), (keys, 2 * kv, 2)]),
        *_phases("return dq; dk, dv", u, _RETURN, [(queries, q, 1), (keys, 2 * kv, 2)]),
        _over_heads("dq, dk, dv", places, u, spread * (heads + 2 * kv_heads), 3),
    ]
    return Listing([p for p in forward if p.sent], [p for p in backward if p.sent])


def list_ring(ranks: int, work: Workload) -> Listing:
    """Messages of ring attention: P-1 steps of keys and values, backward their gradients as well."""
    kv = 2 * work.shard_bytes(ranks) * work.kv_heads / work.heads
    steps = range(1, ranks)

    def step(name: str, sent: float, messages: int) -> Listed:
        return Listed(name, {(rank, (rank + 1) % ranks): sent for rank in range(ranks)}, messages)

    return Listing(
        [step(f"k, v, step {i}", kv, 2) for i in steps],
        [step(f"k, v, dk, dv, step {i}", 2 * kv, 4) for i in steps],
    )


type _Links = tuple[Counter[tuple[int, int]], Counter[tuple[int, int]]]
"""Chunks by (sender, receiver), places of the grid: between nodes, and within them."""


@lru_cache(maxsize=256)
def _links(rows: int, cols: int, tile: tuple[int, int] | None, mask: Mask) -> tuple[_Links, _Links]:
    """What gathers the queries along all rows, and the keys along all columns; without a tile, each rank for itself."""
    ranks = place_ranks(rows, cols, *(tile or (rows, 1)))
    columns = tuple(zip(*ranks, strict=True))
    node_rows, node_cols = tile or (1, 1)
    queries: _Links = (Counter(), Counter())
    keys: _Links = (Counter(), Counter())
    for row in ranks:
        slots = {rank: tile_plan(row, column, mask).queries for rank, column in zip(row, columns, strict=True)}
        _add(queries, plan_routes(by_nodes(row, node_cols), slots))
    for column in columns:
        slots = {rank: tile_plan(row, column, mask).keys for rank, row in zip(column, ranks, strict=True)}
        _add(keys, plan_routes(by_nodes(column, node_rows), slots))
    return queries, keys


def _add(links: _Links, routes: Routes) -> None:
    for counter, messages in zip(links, (routes.between, routes.within), strict=True):
        counter.update((m.sender, m.receiver) for m in messages)


_GATHER, _RETURN = (0, 1), (1, 0)  # the order of the two stages


def _phases(name: str, u: int, order: tuple[int, int], parts: list[tuple[_Links, float, int]]) -> Iterator[Listed]:
    """Links, bytes per chunk and messages per chunk -> the phases of both stages between context-parallel ranks."""
    for stage in order:
        sent: dict[tuple[int, int], float] = {}
        messages: Counter[int] = Counter()
        for links, chunk_bytes, chunk_messages in parts:
            for link, chunks in links[stage].items():
                sender, receiver = reversed(link) if order == _RETURN else link
                messages[receiver] += chunks * chunk_messages
                for head in range(u):
                    pair = sender * u + head, receiver * u + head
                    sent[pair] = sent.get(pair, 0.0) + chunks * chunk_bytes
        where = f"{name}, {'within' if stage else 'between'} nodes"
        yield Listed(where, sent, max(messages.values(), default=0), returns=order == _RETURN)


def _over_heads(name: str, places: int, u: int, sent: float, tensors: int) -> Listed:
    """Every rank of a head group sends every other one its heads of its tokens, two chunks per tensor."""
    links = {
        (place * u + sender, place * u + receiver): sent
        for place in range(places)
        for sender in range(u)
        for receiver in range(u)
        if sender != receiver
    }
    return Listed(f"{name} over heads", links, 2 * tensors * (u - 1), over_heads=True)
