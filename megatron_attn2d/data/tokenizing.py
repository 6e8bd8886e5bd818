"""Tokenizes raw documents in several processes, in the order of the files."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_attn2d.data import examples
from megatron_attn2d.data.readers import BadDocument, Raw, read
from megatron_attn2d.data.tokenizers import Tokenizer
from megatron_attn2d.errors import UsageError

_BATCH_BYTES, _BATCH_DOCUMENTS = 1 << 20, 1024
_LONGEST = 2**31 - 1  # tokens: Megatron's index holds lengths as int32


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch of documents."""

    ids: np.ndarray
    """Token ids of all documents, one after the other, [n]."""
    lengths: list[int]
    """Tokens of each document."""
    bad: list[tuple[str, str, bool]]
    """For each document that is left out: its file and line, the reason, and whether that may end the build."""
    counts: np.ndarray | None
    """For examples, 1 for each token that counts in the loss, else 0, uint8 [n]; None for texts."""
    read: int
    """Bytes of the input on disk that were read for this batch."""


@dataclass(frozen=True)
class Work:
    """How to tokenize a document."""

    tokenizer: Tokenizer
    key: str | None
    """Key of the text in a JSON object, or its column; None: documents are examples."""
    longest: int | None
    """Most tokens of a document; None: no limit."""

    def encode(self, raw: Raw) -> tuple[np.ndarray, np.ndarray | None]:
        """The token ids of a document, and for an example which of them count (see `Tokens.counts`)."""
        if self.key is not None:
            return self.tokenizer.encode(raw.text(self.key)), None
        return examples.encode(raw.record(), self.tokenizer)


@contextlib.contextmanager
def tokenized(files: Iterable[Path], key: str, work: Work, processes: int) -> Iterator[Iterator[Tokens]]:
    """While entered, processes tokenize; yields an iterator over the batches of tokens, in the order of the documents.

    Args:
        files: text, JSONL or Parquet files.
        key: of the text in a JSON object, or its column in a Parquet file.
        work: how to tokenize.
        processes: number of processes.

    Raises:
        UsageError: a tokenizing process was killed.
    """
    with _executor(processes, work) as submit:
        yield _ordered(submit, _batches(files, key), ahead=2 * processes)


@contextlib.contextmanager
def _executor(processes: int, work: Work) -> Iterator[Callable[[list[Raw], int], Future[Tokens]]]:
    """Yields a function that has a batch tokenized by a forked process, which shares the loaded tokenizer."""
    global _worker
    _worker = work
    executor: Executor = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin_worker)
    try:
        yield lambda batch, size: executor.submit(_tokenize, batch, size)
    except BrokenProcessPool as error:
        raise UsageError("a tokenizing process was ended from outside: was there too little memory?") from error
    finally:
        executor.shutdown(cancel_futures=True)


_worker: Work
"""How a forked process tokenizes: set right before the fork, as not all tokenizers can be pickled."""


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group: the parent ends its workers
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _batches(files: Iterable[Path], key: str) -> Iterator[tuple[list[Raw], int]]:
    """Yields batches of documents large enough for a process, each with the bytes on disk that were read for it."""
    for file in files:
        batch: list[Raw] = []
        size = begun = 0
        for raw in read(file, key):
            batch.append(raw)
            size += len(raw.content) if isinstance(raw.content, bytes | str) else 0
            if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
                yield batch, raw.position - begun
                begun, batch, size = raw.position, [], 0
        yield batch, file.stat().st_size - begun


def _ordered(
    submit: Callable[[list[Raw], int], Future[Tokens]], batches: Iterable[tuple[list[Raw], int]], ahead: int
) -> Iterator[Tokens]:
    """Yields the results in the order of the batches, of which at most `ahead` are in memory at once."""
    waiting: deque[Future[Tokens]] = deque()
    for batch, size in batches:
        waiting.append(submit(batch, size))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _tokenize(batch: list[Raw], size: int) -> Tokens:
    longest = _worker.longest
    documents, counted, bad = [], [], []
    for raw in batch:
        try:
            ids, counts = _worker.encode(raw)
            if longest is not None and ids.size > longest:
                bad.append((raw.where, f"longer than {longest:,} tokens ({ids.size:,})", False))
                continue
            if ids.size > _LONGEST:
                raise BadDocument(f"{ids.size} tokens, more than a document may have ({_LONGEST})")
            documents.append(ids)
            counted += [] if counts is None else [counts]
        except BadDocument as error:
            bad.append((raw.where, str(error), True))
    lengths = [ids.size for ids in documents]
    ids = np.concatenate(documents) if documents else np.empty(0, np.uint16)
    return Tokens(ids, lengths, bad, np.concatenate(counted) if counted else None, size)
