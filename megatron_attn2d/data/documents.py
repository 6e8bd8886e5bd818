"""Megatron's data sets in which each document is a sequence of its own, padded so that context ranks can share it.

Megatron cuts the stream of all documents into samples. Here each document lies in a place, whose tokens are a multiple
of `document_multiple`, and the stream is that of the places. So a sample begins and ends on such a multiple too. No
token is lost: a document that the end of a sample cuts in two becomes two sequences.

    documents      aaaaaaa bbb cccccccccc
    places of 4    aaaaaaa.bbb.cccccccccc..
    samples of 12  aaaaaaa.bbb.   cccccccccc..    . is padding: it sees nobody, and no loss counts there

Examples of fine-tuning are not cut: a sample takes those of the next examples that fit, and ends with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset

from megatron_attn2d.data import examples

PADDING = -1
"""Stands in the place of a token id for padding."""
TOTALS, PLACES = "document_totals", "document_places"
"""Keys of a sample. They differ from upstream's cu_seqlens, by which its helpers would slice the batch."""

_AHEAD = 64
"""Number of next examples among which a sample finds those that fit; samples of four examples then have 3% padding."""

Sample = dict[str, torch.Tensor]


@dataclass
class DocumentDatasetConfig(GPTDatasetConfig):
    """Upstream's configuration, and how documents are padded."""

    document_multiple: int = 1
    """Each place is a multiple of this many tokens."""


class PaddedDocuments:
    """An indexed data set whose documents lie in places; it has what GPTDataset reads of upstream's interface."""

    def __init__(self, indexed: Any, multiple: int) -> None:
        self.indexed = indexed
        self._multiple = multiple

    def __len__(self) -> int:
        return len(self.indexed.sequence_lengths)

    @property
    def path_prefix(self) -> str:
        """The prefix of the data set."""
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
    """The tokens of the places of documents, int32 [n].

    Args:
        lengths: tokens of each document, [n].
        multiple: each place is a multiple of this many tokens.
    """
    return (-(-lengths.astype(np.int64) // multiple) * multiple).astype(np.int32)


class DocumentDataset(GPTDataset):
    """Samples of whole documents and of pieces of documents, each a sequence of its own; see the module."""

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

    @property
    def most_documents(self) -> int:
        """The most documents and pieces of documents in a sample."""
        if not len(self):
            return 0
        first, last = self.sample_index[:-1, 0], self.sample_index[1:]  # (document, offset) where samples begin and end
        return int((last[:, 0] - first + (last[:, 1] > 0)).max())

    def __getitem__(self, idx: int | None) -> Sample:
        """The sample `idx`; None: one that counts nowhere, to fill a batch."""
        stream, _, lengths = self._query_document_sample_shuffle_indices(idx or 0)
        taken = [*lengths[:-1], lengths[-1] - 1]  # one token more than the sample's, for its last label
        goes_on = taken[-1] > 0
        sample = packed(stream, [length for length in taken if length], goes_on, self.config.document_multiple)
        return sample if idx is not None else _uncounted(sample)


class Examples:
    """An indexed data set of examples, with the tokens of them that count in the loss.

    Raises:
        ValueError: the file PREFIX.loss belongs to another data set.
    """

    def __init__(self, indexed: Any, prefix: Path) -> None:
        self.sequence_lengths: np.ndarray = indexed.sequence_lengths
        self._indexed = indexed
        self._counts = np.memmap(examples.path(prefix), dtype=np.uint8, mode="r")
        if self._counts.size != (tokens := int(self.sequence_lengths.sum(dtype=np.int64))):
            raise ValueError(
                f"{examples.path(prefix)} is about {self._counts.size} tokens, {prefix} holds {tokens}: build it again"
            )

    def get(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        """The token ids [n] of an example, and for each of them 1 where it is to be predicted, else 0, uint8 [n]."""
        index = self._indexed.index
        first = int(index.sequence_pointers[idx]) // np.dtype(index.dtype).itemsize
        return self._indexed.get(idx), self._counts[first : first + int(self.sequence_lengths[idx])]


class ExampleDataset(MegatronDataset):
    """Samples of whole examples, in an order of its own in each epoch.

    Raises:
        ValueError: an example is longer than a sample, or there is none.
    """

    config: DocumentDatasetConfig
    dataset: Examples

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._order, self._bounds = self._dealt()

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Examples) -> int:
        """The number of examples."""
        return len(low_level_dataset.sequence_lengths)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: DocumentDatasetConfig) -> Examples:
        """The examples of a prefix."""
        return Examples(GPTDataset.build_low_level_dataset(dataset_path, config), Path(dataset_path))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def most_documents(self) -> int:
        """The most examples in a sample, where the padding at its end counts as one."""
        return 1 + int(np.diff(self._bounds).max(initial=0))

    def __getitem__(self, idx: int | None) -> Sample:
        """The sample `idx`; None: one that counts nowhere, to fill a batch."""
        length, multiple = self.config.sequence_length, self.config.document_multiple
        stream = np.full(length + 1, PADDING, dtype=np.int64)
        counts = np.zeros(length + 1, dtype=bool)
        taken, first = [], 0
        for example in self._order[slice(*self._bounds[(idx or 0) : (idx or 0) + 2])]:
            ids, counted = self.dataset.get(int(example))
            stream[first : first + len(ids)] = ids
            counts[first : first + len(ids)] = counted
            taken.append(-(-len(ids) // multiple) * multiple)
            first += taken[-1]
        if first < length:  # the padding is a place too, as upstream's rotary positions go through all places
            taken.append(length - first)
        sample = packed(stream, taken, False, multiple, counts)
        return sample if idx is not None else _uncounted(sample)

    def _dealt(self) -> tuple[np.ndarray, np.ndarray]:
        """The examples of all samples, over as many epochs as they take, and where among these each sample begins."""
        lengths, most = self.dataset.sequence_lengths[self.indices], self.config.sequence_length
        if not len(lengths):
            raise ValueError(f"the {self.index_split.name} split of {self.dataset_path} holds no example")
        if (longest := int(lengths.max())) > most:
            raise ValueError(
                f"{self.dataset_path} has an example of {longest} tokens, a sample has {most}: choose a longer "
                f"training.seq_length, or leave it out by megatron-attn2d data build --longest {most}"
            )
        multiple, samples, epochs = self.config.document_multiple, self.num_samples, 1
        if samples is not None:  # enough at once, as dealing a million examples takes a second
            epochs += samples * most // int(places(lengths, multiple).sum(dtype=np.int64))
        while True:
            # A generator whose numbers NumPy keeps as they are.
            shuffles = (np.random.RandomState([self.config.random_seed, epoch]) for epoch in range(epochs))
            order = np.concatenate([shuffle.permutation(self.indices) for shuffle in shuffles])
            dealt, bounds = _fitted(places(self.dataset.sequence_lengths[order], multiple), most, samples is None)
            if samples is None:
                return order[dealt], bounds
            if len(bounds) > samples:
                return order[dealt[: bounds[samples]]], bounds[: samples + 1]
            epochs *= 2


def _fitted(taken: np.ndarray, most: int, to_the_end: bool) -> tuple[np.ndarray, np.ndarray]:
    """Distribute places to samples: each takes those of the next `_AHEAD` that fit, in their order.

    Args:
        taken: tokens of each place, [n].
        most: tokens of a sample.
        to_the_end: whether no places follow. Else it stops at the first sample that further places could change.

    Returns:
        Indices of places, sample by sample, and where among these each sample begins and the last one ends.
    """
    sizes: list[int] = taken.tolist()
    dealt: list[int] = []
    bounds = [0]
    ahead: list[int] = []
    following = 0
    while True:
        refilled = min(following + _AHEAD - len(ahead), len(sizes))
        ahead += range(following, refilled)
        following = refilled
        if not ahead or (len(ahead) < _AHEAD and not to_the_end):
            return np.array(dealt, dtype=np.int64), np.array(bounds)
        room, left = most, []
        for place in ahead:  # the first one always fits, so that no place waits for ever
            if sizes[place] <= room:
                dealt.append(place)
                room -= sizes[place]
            else:
                left.append(place)
        ahead = left
        bounds.append(len(dealt))


def most_documents(built: Any) -> int:
    """The most documents in a sample of a data set, a blend or a list of them; 0 where there is no sample."""
    if isinstance(built, list | tuple):
        return max(map(most_documents, built), default=0)
    parts = getattr(built, "datasets", None)  # of a blend
    if parts is not None:
        return most_documents(list(parts))
    return 0 if built is None else int(built.most_documents)


def _uncounted(sample: Sample) -> Sample:
    return {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])}


def packed(
    stream: np.ndarray, taken: Sequence[int], goes_on: bool, multiple: int, counts: np.ndarray | None = None
) -> Sample:
    """Make a sample of consecutive places.

    Args:
        stream: [s + 1] ids, PADDING where a place has no token; the last one is the id that follows the sample.
        taken: tokens of each place, whose sum is s.
        goes_on: whether the id that follows belongs to the last document.
        multiple: each place is a multiple of this many tokens, which bounds the number of places.
        counts: [s + 1], whether an id is to be predicted; None: all ids are.

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
    if counts is not None:
        counted &= torch.from_numpy(counts[1:])
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
