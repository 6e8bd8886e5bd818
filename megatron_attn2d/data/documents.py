"""Megatron's data set in which each document is a sequence of its own: padded to places that context ranks can share.

Megatron cuts the stream of all documents into samples. Here the stream is that of the documents' places, each a
multiple of `document_multiple` tokens, so that a sample begins and ends on such a multiple too. No token is lost; what
the end of a sample cuts in two is two sequences.

    documents      aaaaaaa bbb cccccccccc
    places of 4    aaaaaaa.bbb.cccccccccc..
    samples of 12  aaaaaaa.bbb.   cccccccccc..    . is padding: it sees nobody, and no loss counts there
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset

PADDING = -1
"""In place of a token's id, where a place holds no token."""
TOTALS, PLACES = "document_totals", "document_places"
"""Keys of a sample. Not upstream's cu_seqlens, whose helpers would slice the batch by other rules."""

Sample = dict[str, torch.Tensor]


@dataclass
class DocumentDatasetConfig(GPTDatasetConfig):
    """Upstream's, and how documents are padded."""

    document_multiple: int = 1
    """Tokens of which each place is a multiple."""


class PaddedDocuments:
    """An indexed data set whose documents lie in places; of upstream's interface what GPTDataset reads."""

    def __init__(self, indexed: Any, multiple: int) -> None:
        self.indexed = indexed
        self._multiple = multiple

    def __len__(self) -> int:
        return len(self.indexed.sequence_lengths)

    @property
    def path_prefix(self) -> str:
        """Of the files."""
        return str(self.indexed.path_prefix)

    @property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each place, int32; not kept, as there may be a billion of them."""
        return places(self.indexed.sequence_lengths, self._multiple)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Ids of `length` tokens of a place from `offset` on, int64; None: to its end."""
        held = int(self.indexed.sequence_lengths[idx])
        place = -(-held // self._multiple) * self._multiple
        length = place - offset if length is None else length
        ids = np.full(length, PADDING, dtype=np.int64)
        if offset < held:
            found = self.indexed.get(idx, offset=offset, length=min(length, held - offset))
            ids[: len(found)] = found
        return ids


def places(lengths: np.ndarray, multiple: int) -> np.ndarray:
    """The tokens that are set apart for documents of `lengths` tokens, int32."""
    return (-(-lengths.astype(np.int64) // multiple) * multiple).astype(np.int32)


class DocumentDataset(GPTDataset):
    """Samples of whole documents and of pieces of them, each a sequence of its own; see the module."""

    config: DocumentDatasetConfig

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: PaddedDocuments) -> int:
        """The number of documents."""
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str | None, config: DocumentDatasetConfig) -> PaddedDocuments:
        """The documents of a prefix, or made-up ones."""
        source: Any = MockGPTDataset if config.mock else GPTDataset
        return PaddedDocuments(source.build_low_level_dataset(dataset_path, config), config.document_multiple)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "document_multiple"]

    def __getitem__(self, idx: int | None) -> Sample:
        """The sample `idx`; None: one that counts nowhere, to fill a batch."""
        stream, _, lengths = self._query_document_sample_shuffle_indices(idx or 0)
        taken = [*lengths[:-1], lengths[-1] - 1]  # one token more than the sample's, for its last label
        goes_on = taken[-1] > 0
        sample = packed(stream, [length for length in taken if length], goes_on, self.config.document_multiple)
        if idx is None:
            sample["loss_mask"].zero_()
        return sample


def packed(stream: np.ndarray, taken: Sequence[int], goes_on: bool, multiple: int) -> Sample:
    """The sample of consecutive places.

    Args:
        stream: [s + 1] ids, PADDING where a place has no token, and the id that follows.
        taken: tokens of each place, in all s.
        goes_on: whether the id that follows is of the last document.
        multiple: each place is one of it, by which the number of places is bounded.

    Returns:
        tokens, labels, loss_mask and position_ids, [s]; int32 running totals of the documents' tokens and of their
        places, [s / multiple + 1], which go on with their last number behind the last document. A document's last token
        predicts nothing.
    """
    ids = torch.from_numpy(stream)
    tokens, labels = ids[:-1].clone(), ids[1:].clone()
    ends = np.cumsum(taken)
    starts = ends - taken
    counted = (tokens != PADDING) & (labels != PADDING)
    counted[torch.from_numpy(ends[:-1] - 1)] = False
    counted[-1] &= goes_on
    real = np.add.reduceat((stream[:-1] != PADDING).astype(np.int32), starts)
    return {
        "tokens": tokens.clamp_(min=0),
        "labels": labels.clamp_(min=0),
        "loss_mask": counted.float(),
        "position_ids": torch.from_numpy(np.arange(ends[-1]) - np.repeat(starts, taken)),
        TOTALS: _running(real, int(ends[-1]) // multiple),
        PLACES: _running(np.asarray(taken), int(ends[-1]) // multiple),
    }


def _running(numbers: np.ndarray, most: int) -> torch.Tensor:
    """[0, first, first and second, ...] of at most `most` numbers, in a tensor of one size for all batches."""
    totals = np.full(most + 1, numbers.sum(), dtype=np.int32)
    totals[0] = 0
    totals[1 : len(numbers) + 1] = np.cumsum(numbers)
    return torch.from_numpy(totals)
