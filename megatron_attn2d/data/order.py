"""Counts how many tokens to come a continued run has trained on already, where the order of its data has changed.

Megatron orders samples by a seed, the number of epochs and the length of a sequence, and a run continues after the
number of samples that it has consumed. In another order that number points at other samples, some of which the run has
seen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_attn2d.config.arguments import data_blend, embedded_data
from megatron_attn2d.config.prefixes import is_complete
from megatron_attn2d.config.schema import RunConfig
from megatron_attn2d.data.inspect import open_indexed
from megatron_attn2d.megatron.upstream.quiet_imports import hushed

_MOST = 50_000_000
"""Most documents, over all epochs, that are counted, in a minute and some GB; beyond that the share is estimated."""
_UNCOUNTED = ("dataloader_type", "data_args_path", "per_split_data_args_path", "iterations_to_skip")
"""Arguments of Megatron under which a run does not take the samples in the order of their index."""
_STRIDE = 1 << 48
"""More tokens than a data set can have, so that places of different sets do not meet."""


@dataclass(frozen=True)
class Repeats:
    """Tokens to come, and how many of them the run has trained on: in the changed order, and in the unchanged one."""

    following: int
    seen: int
    unchanged_following: int
    unchanged_seen: int


def consumed_samples(before: RunConfig, step: int) -> int:
    """Samples that `step` steps of `before` have taken."""
    return step * before.training.global_batch_size


def describe(before: RunConfig, now: RunConfig, step: int) -> str:
    """A sentence on the tokens that repeat when a run that made `step` steps of `before` continues as `now`."""
    if before.data.mock or now.data.mock:
        return "made-up data: what repeats is not counted"
    if "sft" in (before.data.format, now.data.format):
        return "what repeats is not counted under data.format = sft"
    if named := [name for name in _UNCOUNTED if before.megatron_args.get(name) or now.megatron_args.get(name)]:
        return f"what repeats is not counted under megatron_args.{named[0]}"
    prefixes = [*_prefixes(before), *_prefixes(now)]
    if gone := [str(prefix) for prefix in prefixes if not is_complete(prefix)]:
        return f"what repeats can't be counted: {gone[0]} is gone"
    epochs = 1 + now.training.train_iters * now.training.global_batch_size * now.training.seq_length // _tokens(now)
    if epochs * sum(len(_lengths(prefix)) for prefix in prefixes) > _MOST:
        share = min(1.0, consumed_samples(before, step) * before.training.seq_length / _tokens(before))
        return (
            f"about {share:.0%} of the tokens to come have been trained on before, as is to be expected where data is "
            "dealt anew (not counted: too many documents)"
        )
    found = repeats(before, now, step)
    text = (
        f"{_share(found.seen, found.following)} of the {found.following:,} tokens to come have been trained on before"
    )
    if not found.unchanged_following:
        return f"{text}; the order that the run was begun with is at its end"
    unchanged = _share(found.unchanged_seen, found.unchanged_following)
    return f"{text}; it would be {unchanged} if nothing had changed"


def repeats(before: RunConfig, now: RunConfig, step: int) -> Repeats:
    """What repeats when a run that made `step` steps of `before` continues as `now`, to the last step of either."""
    consumed = consumed_samples(before, step)
    bases: dict[str, int] = {}
    old, new = (_training_set(run, _samples(run, step, consumed)) for run in (before, now))
    trained = _Coverage(*_intervals(old, 0, consumed, bases))

    def following(run: RunConfig, dataset: Any) -> tuple[int, int]:
        last = consumed + max(0, run.training.train_iters - step) * run.training.global_batch_size
        starts, ends = _intervals(dataset, consumed, last, bases)
        return int((ends - starts).sum()), trained.of(starts, ends)

    return Repeats(*following(now, new), *following(before, old))


def _prefixes(run: RunConfig) -> list[Path]:
    return [Path(prefix) for prefix in run.data.paths or [embedded_data(run)]]


def _lengths(prefix: Path) -> np.ndarray:
    """Tokens of each document."""
    indexed = open_indexed(prefix)  # kept alive here: its arrays are views of its mapping
    return np.array(indexed.sequence_lengths)


def _tokens(run: RunConfig) -> int:
    """Tokens of an epoch, at least 1."""
    training, *others = map(float, run.data.split.split(","))
    held = sum(int(_lengths(prefix).sum(dtype=np.int64)) for prefix in _prefixes(run))
    return max(1, int(held * training / (training + sum(others))))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _samples(run: RunConfig, step: int, consumed: int) -> int:
    """The number of samples that `training.datasets` asks for."""
    steps, batch = run.training.train_iters, run.training.global_batch_size
    return max(steps * batch, consumed + max(0, steps - step) * batch)


def _training_set(run: RunConfig, samples: int) -> Any:
    """Megatron's training set of `run`, built without writing a file or reading a token."""
    with hushed():
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset
        from megatron.core.datasets.utils import get_blend_from_list

        from megatron_attn2d.data.documents import DocumentDataset, DocumentDatasetConfig
        from megatron_attn2d.megatron.upstream.compat import REFUSING_NO_TOKENS
        from megatron_attn2d.megatron.upstream.patching import applied

        config = DocumentDatasetConfig(
            document_multiple=run.document_multiple,
            random_seed=run.training.seed,
            sequence_length=run.training.seq_length,
            blend=get_blend_from_list(data_blend(run)),
            split=run.data.split,
            path_to_cache="",  # None would be a folder beside the data
            tokenizer=SimpleNamespace(vocab_size=None, unique_identifiers={}),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            mid_level_dataset_surplus=run.megatron_args.get("mid_level_dataset_surplus") or 0.005,
        )
        config.split_matrix = [config.split_matrix[0], None, None]
        with applied([REFUSING_NO_TOKENS]):
            kind = DocumentDataset if run.document_multiple else GPTDataset
            return BlendedMegatronDatasetBuilder(kind, [samples, 0, 0], lambda: True, config).build()[0]


def _intervals(dataset: Any, first: int, last: int, bases: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """The intervals of tokens that the samples from `first` to before `last` take: starts and ends, int64, unsorted.

    Positions count through all data sets, one after the other.

    Args:
        dataset: Megatron's, or a blend of several.
        first: number of the first sample.
        last: number after the last sample.
        bases: the first position of each data set, by a checksum of its lengths; new data sets are added.
    """
    samples = np.arange(first, min(last, len(dataset)))
    if not hasattr(dataset, "datasets"):
        return _single_intervals(dataset, samples, bases)
    which, inner = dataset.dataset_index[samples], dataset.dataset_sample_index[samples]
    parts = [_single_intervals(one, inner[which == i], bases) for i, one in enumerate(dataset.datasets)]
    starts, ends = zip(*parts, strict=True)
    return np.concatenate(starts), np.concatenate(ends)


def _single_intervals(dataset: Any, samples: np.ndarray, bases: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    # Padded documents take more of the stream than they have tokens.
    taken = dataset.dataset.sequence_lengths
    lengths = getattr(dataset.dataset, "indexed", dataset.dataset).sequence_lengths
    identity = hashlib.sha256(lengths.tobytes()).hexdigest()  # by content: a data set may have been moved
    base = bases.setdefault(identity, max(bases.values(), default=-_STRIDE) + _STRIDE)
    places = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    # The documents in training order are one stream of tokens, and a sample is an interval of it.
    documents = np.asarray(dataset.document_index)
    stream = np.concatenate([[0], np.cumsum(taken[documents], dtype=np.int64)])
    index, order = np.asarray(dataset.sample_index), np.asarray(dataset.shuffle_index)[samples].astype(np.int64)
    begin = stream[index[order, 0]] + index[order, 1]
    end = stream[index[order + 1, 0]] + index[order + 1, 1]
    # A sample covers one document or several, and has an interval in each.
    head = np.searchsorted(stream, begin, "right") - 1
    tail = np.searchsorted(stream, end, "left") - 1
    counts = np.maximum(tail - head + 1, 0)
    sample = np.repeat(np.arange(len(order)), counts)
    document = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + head[sample]
    shift, real = base + places[documents[document]], lengths[documents[document]]
    low = np.maximum(begin[sample] - stream[document], 0)
    high = np.minimum(end[sample] - stream[document], real)
    return np.minimum(low, real) + shift, high + shift


class _Coverage:
    """The union of intervals of token positions."""

    def __init__(self, starts: np.ndarray, ends: np.ndarray) -> None:
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], np.maximum.accumulate(ends[order]) if len(order) else ends
        first = np.ones(len(starts), dtype=bool)
        first[1:] = starts[1:] > ends[:-1]
        self._starts = starts[first]
        self._ends = ends[np.append(np.flatnonzero(first)[1:] - 1, len(ends) - 1)] if len(ends) else ends
        self._before = np.concatenate([[0], np.cumsum(self._ends - self._starts)])

    def of(self, starts: np.ndarray, ends: np.ndarray) -> int:
        """How many tokens of the intervals from `starts` to before `ends` lie in the union."""
        return int((self._below(ends) - self._below(starts)).sum())

    def _below(self, places: np.ndarray) -> np.ndarray:
        if not len(self._starts):
            return np.zeros_like(places)
        at = np.searchsorted(self._starts, places, "right") - 1
        inside = np.clip(np.minimum(places, self._ends[at]) - self._starts[at], 0, None)
        return np.where(at < 0, 0, self._before[at] + inside)
