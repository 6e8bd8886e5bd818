"""Tables of segments as properties: every visible pair exactly once, none else, whatever is packed."""

from __future__ import annotations

import random
from collections import Counter
from itertools import accumulate
from time import process_time
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from megatron_attn2d.attention import segments
from megatron_attn2d.attention.layout import CAUSAL, FULL, LOWER, UPPER, Band, Chunk, tile_plan
from megatron_attn2d.attention.packing import Packing
from megatron_attn2d.attention.segments import Segments
from megatron_attn2d.attention.staging import to_device
from megatron_attn2d.attention.tables import TileTables, diagonal_tables, tile_tables, whole_tables
from tests.attention.test_layout import grid

CPU = torch.device("cpu")
SHAPES = [(2, 2), (1, 4), (4, 1), (3, 2)]
BANDS = [FULL, CAUSAL, *(Band(left, right) for left in (0, 1, 3, 4, 9, None) for right in (0, 2, 4, None))]
PACKS: list[list[tuple[int, int]]] = [[(3, 0)], [(3, 11)], [(2, 0), (1, 0), (3, 0)], [(3, 1), (1, 100), (2, 5), (1, 3)]]
"""Of each sequence the tokens of a chunk, and how many tokens it is shorter than its place."""


def packing_of(pack: list[tuple[int, int]], ranks: int, known: bool = True) -> Packing:
    places = [2 * ranks * chunk for chunk, _ in pack]
    lengths = [max(0, place - less) for place, (_, less) in zip(places, pack, strict=True)]
    totals, padded = ([0, *accumulate(x)] for x in (lengths, places))
    packing = Packing.of(totals, padded, sum(places), ranks, CPU)
    return packing if known else unknown(packing)


def unknown(packing: Packing) -> Packing:
    """As if a GPU alone knew where its sequences lie."""
    chunks, lengths = (torch.as_tensor(x) for x in (packing.chunks, packing.lengths))
    return Packing(chunks, lengths, packing.ranks, packing.tokens, packing.longest, True, packing.device)


def tokens_of(packing: Packing, chunks: tuple[Chunk, ...]) -> np.ndarray:
    """(sequence, token) of each row of chunks by sequence, [rows, 2]."""
    return np.array(
        [
            (number, chunk.position(packing.ranks) * n + i)
            for number, n in enumerate(packing.chunks.tolist())
            for chunk in chunks
            for i in range(n)
        ]
    ).reshape(-1, 2)


def pairs_of(
    packing: Packing, tables: TileTables, queries: np.ndarray, keys: np.ndarray
) -> Counter[tuple[int, int, int]]:
    """How often (sequence, query token, key token) is attended; and all that a table promises."""
    seen: Counter[tuple[int, int, int]] = Counter()
    layers: dict[int, Counter[int]] = {}
    for group in tables.groups:
        of_keys: Counter[int] = Counter()
        for call in group.calls:
            check_table(call.segments, len(queries), len(keys))
            of_rows = layers.setdefault(call.layer, Counter())
            for q_start, q_length, k_start, k_length in call.segments:
                of_rows.update(range(q_start, q_start + q_length))
                of_keys.update(range(k_start, k_start + k_length))
                left, right = call.segments.band
                for i in range(q_length):
                    at = i + k_length - q_length
                    visible = range(
                        0 if left is None else max(0, at - left),
                        k_length if right is None else min(k_length, at + right + 1),
                    )
                    assert visible, "a row without a key"
                    sequence, row = queries[q_start + i]
                    assert (keys[k_start : k_start + k_length, 0] == sequence).all()
                    seen.update((int(sequence), int(row), int(keys[k_start + j, 1])) for j in visible)
        assert set(of_keys.values()) <= {1}, "calls of a group share a key row"
        assert not group.covered or len(of_keys) == sum(group.slots * n for n in packing.chunks.tolist())
    assert not tables.groups or tables.groups[-1].slots * packing.tokens == len(keys), "a key without a gradient"
    for layer, of_rows in layers.items():
        assert set(of_rows.values()) <= {1}, "calls of a layer share a query row"
        assert not tables.covered[layer] or len(of_rows) == len(queries)
    assert sorted(layers) == list(range(len(layers)))
    return seen


def check_table(table: Segments, rows: int, keys: int) -> None:
    for starts, lengths, end, most in (
        (table.q_starts, table.q_lengths, rows, table.most_q),
        (table.k_starts, table.k_lengths, keys, table.most_k),
    ):
        assert starts.dtype == lengths.dtype == torch.int32
        assert starts.is_contiguous()
        assert starts[-1] == end
        assert (starts.diff() >= lengths).all()
        assert (starts >= 0).all()
        assert (lengths >= 0).all()
        assert lengths.max() <= most
    assert torch.equal(table.q_lengths == 0, table.k_lengths == 0)


def expected_pairs(packing: Packing, band: Band) -> set[tuple[int, int, int]]:
    left, right = (10**9 if side is None else side for side in band)
    return {
        (number, i, j)
        for number, length in enumerate(packing.lengths.tolist())
        for i in range(length)
        for j in range(max(0, i - left), min(length, i + right + 1))
    }


def pair(rank: int) -> tuple[Chunk, Chunk]:
    return Chunk(rank, LOWER), Chunk(rank, UPPER)


def all_tiles(
    packing: Packing, shape: tuple[int, int], band: Band, share_keys: bool = True
) -> Counter[tuple[int, int, int]]:
    """What all ranks of a grid attend together."""
    seen: Counter[tuple[int, int, int]] = Counter()
    ranks = grid(*shape, "columns")
    for row in ranks:
        for own, column in zip(row, zip(*ranks, strict=True), strict=True):
            plan = tile_plan(tuple(row), tuple(column), packing.mask(band))
            tables = tile_tables(plan, packing, band, share_keys)
            seen += pairs_of(packing, tables, *(tokens_of(packing, chunks) for chunks in (plan.queries, plan.keys)))
            mine = tokens_of(packing, pair(own))
            seen += pairs_of(packing, diagonal_tables(plan, packing, own, band), mine, mine)
    return seen


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("pack", PACKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_visible_pair_once(shape: tuple[int, int], pack: list[tuple[int, int]], known: bool) -> None:
    for band in BANDS[(PACKS.index(pack) + shape[1]) % 2 :: 2] if known else BANDS[::4]:
        packing = packing_of(pack, shape[0] * shape[1], known)
        seen = all_tiles(packing, shape, band)
        assert set(seen) == expected_pairs(packing, band), band
        assert set(seen.values()) <= {1}, band


@pytest.mark.parametrize("pack", PACKS, ids=str)
def test_calls_that_share_no_keys(pack: list[tuple[int, int]]) -> None:
    for band in (FULL, CAUSAL):
        for known in (True, False):
            packing = packing_of(pack, 4, known)
            seen = all_tiles(packing, (4, 1), band, share_keys=False)
            assert set(seen) == expected_pairs(packing, band)
            assert set(seen.values()) <= {1}


@pytest.mark.parametrize("shape", [(2, 2), (3, 1), (1, 1)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("seed", range(3))
def test_packs_drawn_at_random(shape: tuple[int, int], seed: int) -> None:
    """Documents of a token, shorter than a chunk of one token, empty ones, and one over nearly all tokens."""
    dice, ranks = random.Random(seed), shape[0] * shape[1]
    pack = [
        (chunk, dice.choice([0, 1, 2 * ranks * chunk - 1, 2 * ranks * chunk])) for chunk in dice.choices([1, 2], k=9)
    ]
    pack.insert(dice.randint(0, 9), (8, dice.randint(0, 5)))
    for known in (True, False):
        packing = packing_of(pack, ranks, known)
        for band in [FULL, CAUSAL, *dice.sample(BANDS, 3)]:
            seen = all_tiles(packing, shape, band)
            assert set(seen) == expected_pairs(packing, band), band
            assert set(seen.values()) <= {1}, band


@pytest.mark.parametrize("band", [FULL, CAUSAL, Band(3, 0), Band(40, 2)], ids=str)
@pytest.mark.parametrize("known", [True, False])
def test_whole_sequences(band: Band, known: bool) -> None:
    packing = packing_of(PACKS[-1], 1, known)
    tokens = tokens_of(packing, pair(0))
    seen = pairs_of(packing, whole_tables(packing, band), tokens, tokens)
    assert set(seen) == expected_pairs(packing, band)
    assert set(seen.values()) == {1}


def test_new_lengths_of_a_thousand_documents_are_planned_in_two_milliseconds() -> None:
    """On the host's processor, which launches kernels meanwhile; what one process does not wait for does not count."""
    dice = random.Random(0)
    took = []
    for _ in range(12):
        lengths = [max(1, int(dice.lognormvariate(5, 1))) for _ in range(1024)]
        totals, padded = ([0, *accumulate(x)] for x in (lengths, [-(-length // 8) * 8 for length in lengths]))
        start = process_time()
        packing = Packing.of(totals, padded, padded[-1], 4, CPU)
        plan = tile_plan((0, 2), (0, 1), packing.mask(CAUSAL))
        tile_tables(plan, packing, CAUSAL, True)
        diagonal_tables(plan, packing, 0, CAUSAL)
        took.append(process_time() - start)
    print(f"plan of 1,024 documents: {min(took) * 1e3:.2f} ms at best, {sorted(took)[6] * 1e3:.2f} ms in the middle")
    assert min(took) <= 2e-3


def test_short_segments_apart_are_all_segments_of_a_few_rows_by_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Mock(side_effect=to_device)
    monkeypatch.setattr(segments, "to_device", copies)
    host = np.array([(0, 9, 0, 9), (9, 2, 9, 4), (11, 1, 13, 1), (12, 8, 14, 8)])
    bundle = segments.Bundle(CPU)
    table, other = (bundle.add(x.T, CAUSAL, 21, 23, 9, 9) for x in (host, host[1:]))
    whole, none = table.by_length(2, 2)
    assert (whole and list(whole), none) == (list(table), None), "too few"
    copies.reset_mock()
    for parts, rows in ((table.by_length(2, 1), ([0, 3], [1, 2])), (other.by_length(2, 1), ([3], [1, 2]))):
        for part, taken in zip(parts, rows, strict=True):
            assert part is not None
            assert list(part) == [tuple(row) for row in host[taken].tolist()]
            assert torch.equal(
                torch.stack((part.q_starts[:-1], part.k_lengths), 1), torch.as_tensor(host[taken][:, [0, 3]]).int()
            )
            check_table(part, 21, 23)
            aligned = {x.data_ptr() % 16 for x in (part.q_starts, part.q_lengths, part.k_starts, part.k_lengths)}
            assert aligned == {0}, "kernels copy what begins elsewhere"
    copies.assert_called_once()
