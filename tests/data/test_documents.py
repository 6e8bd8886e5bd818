"""Samples of padded documents: whose tokens they hold, what each predicts, and where documents begin."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.megatron.documents import build

SEQ = 24
LENGTHS = (5, 1, 30, 8, 3, 24, 17, 2, 4, 9)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents in which no token occurs twice."""
    ends = np.cumsum(LENGTHS)
    return build(
        tmp_path_factory.mktemp("data") / "set",
        [np.arange(end - length, end) for end, length in zip(ends, LENGTHS, strict=True)],
    )


def dataset(prefix: Path, multiple: int, samples: int) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    from megatron_attn2d.data.documents import DocumentDataset, DocumentDatasetConfig

    config = DocumentDatasetConfig(
        random_seed=1,
        sequence_length=SEQ,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache="",
        tokenizer=SimpleNamespace(vocab_size=None, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        document_multiple=multiple,
    )
    config.split_matrix = [config.split_matrix[0], None, None]
    return BlendedMegatronDatasetBuilder(DocumentDataset, [samples, 0, 0], lambda: True, config).build()[0]


def documents(sample: dict[str, torch.Tensor]) -> list[tuple[int, int, int]]:
    """Of each document of a sample where its place begins, how many tokens it has, and its place."""
    totals, places = (sample[key].tolist() for key in ("document_totals", "document_places"))
    found = [(places[i], totals[i + 1] - totals[i], places[i + 1] - places[i]) for i in range(len(places) - 1)]
    return [one for one in found if one[2]]


@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
def test_samples_hold_each_token_once_and_predict_within_documents(multiple: int, prefix: Path) -> None:
    places = sum(-(-length // multiple) * multiple for length in LENGTHS)
    samples = (places - 1) // SEQ
    found = dataset(prefix, multiple, samples)
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    seen: list[int] = []
    for sample in (found[i] for i in range(samples)):
        tokens, labels, counted = (sample[key].numpy() for key in ("tokens", "labels", "loss_mask"))
        assert len(sample["document_places"]) == SEQ // multiple + 1
        assert sum(place for *_, place in documents(sample)) == SEQ
        for start, length, place in documents(sample):
            assert place % multiple == 0
            assert 0 <= place - length < multiple
            own = tokens[start : start + length]
            assert len(set(owner[own])) == 1
            assert np.array_equal(own, np.arange(own[0], own[0] + length))
            assert sample["position_ids"][start : start + place].tolist() == list(range(place))
            seen += own.tolist()
            for i, token in enumerate(own):
                # The last token of a document predicts nothing; that of a piece predicts what the piece breaks off at.
                goes_on = token + 1 < len(owner) and owner[token + 1] == owner[token]
                breaks_off = i == length - 1 and start + place < SEQ
                assert counted[start + i] == (goes_on and not breaks_off)
                if counted[start + i]:
                    assert labels[start + i] == token + 1
            assert not counted[start + length : start + place].any()
    assert len(seen) == len(set(seen))
    assert len(seen) >= sum(LENGTHS) - SEQ


@pytest.mark.parametrize("multiple", [1, 4])
def test_bins_hold_the_documents_of_the_fullest_sample(multiple: int, prefix: Path) -> None:
    from megatron_attn2d.data.documents import most_documents

    found = dataset(prefix, multiple, 16)  # of several epochs
    fullest = max(len(documents(found[i])) for i in range(len(found)))
    assert most_documents([found, None]) == fullest > 2


def test_bins_and_positions_are_those_of_the_documents() -> None:
    from megatron_attn2d.megatron import document_bins

    totals = torch.tensor([[0, 3, 7, 7, 7], [0, 6, 6, 6, 6]], dtype=torch.int32)
    places = torch.tensor([[0, 4, 8, 8, 8], [0, 8, 8, 8, 8]], dtype=torch.int32)
    bins = document_bins.of_samples(totals, places, 3)
    assert bins.tolist() == [[0, 3, 7, 7, 13, 13, 13], [0, 4, 8, 8, 16, 16, 16]]
    assert document_bins.of_samples(totals, places, 5).tolist()[1] == [0, 4, 8, 8, 8, 8, 16, 16, 16, 16, 16]
    assert document_bins.are_bins(bins)
    assert not document_bins.are_bins(torch.ones(1, 1, 4, 4, dtype=torch.bool))
    found = [document_bins.rows_and_positions(bins, 16, rank, 2) for rank in (0, 1)]
    rows, positions = (torch.cat(both) for both in zip(*found, strict=True))
    assert rows.tolist() == [0, 3, 4, 7, 8, 9, 14, 15, 1, 2, 5, 6, 10, 11, 12, 13]
    assert positions.tolist() == [0, 3, 0, 3, 0, 1, 6, 7, 1, 2, 1, 2, 2, 3, 4, 5]


def test_a_sample_that_fills_a_batch_counts_nowhere(prefix: Path) -> None:
    found = dataset(prefix, 4, 4)
    assert found[0]["loss_mask"].any()
    assert not found[None]["loss_mask"].any()


def test_documents_of_several_samples_follow_each_other() -> None:
    from megatron_attn2d.data.documents import packed
    from megatron_attn2d.training.packed_batch import Pack

    first = packed(np.array([1, 2, 3, -1, 4, 5, 6, 7, 8]), [4, 4], goes_on=True, multiple=4)
    second = packed(np.array([1, 2, 3, 4, 5, 6, 7, -1, -1]), [8], goes_on=False, multiple=4)
    both = (torch.stack([one[key] for one in (first, second)]) for key in ("document_totals", "document_places"))
    pack = Pack.of(*both)
    assert pack == Pack([0, 3, 7, 14], [0, 4, 8, 16])
    assert first["loss_mask"].tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
    assert second["loss_mask"].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("places", "length"),
    [
        ([0, 64], 64),
        ([0, 16, 64], 48),
        ([0, 8, 16, 64], 48),
        ([0, 4, 64], 60),  # 64 would be that of all tokens, in whose table upstream lets positions go on
        ([0, 6, 12, 64], 56),
        ([0, 4, 8, 12, 16], 4),
    ],
)
def test_rotary_angles_reach_the_longest_document_in_few_lengths(places: list[int], length: int) -> None:
    from megatron_attn2d.training.packed_batch import Pack

    assert Pack(places, places)._rotary_length() == length
