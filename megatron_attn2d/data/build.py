"""Text files to PREFIX.bin and PREFIX.idx, tokenized in several processes, in the order of the files.

PREFIX.json beside them says what they were made of, with which tokenizer, and what was left out. All three are written
in a folder of their own and renamed, the index last: a data set is whole or has no index. The folder of a build that
was killed is removed by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from megatron_attn2d.data import examples, tokenizers
from megatron_attn2d.data.indexed import seal_index
from megatron_attn2d.data.readers import BadDocument, Raw, find_files, read
from megatron_attn2d.data.tokenizers import Tokenizer, TokenizerChoice
from megatron_attn2d.errors import UsageError
from megatron_attn2d.megatron.upstream.quiet_imports import indexed_dataset

SUFFIXES = (examples.SUFFIX, ".bin", ".json", ".idx.sha256", ".idx")
"""What a data set consists of, in the order in which it appears; without the last it is none. One of texts has no file
of the first suffix."""
_BATCH_BYTES, _BATCH_DOCUMENTS = 1 << 20, 1024
_LONGEST = 2**31 - 1  # tokens: Megatron's index holds lengths as int32
_NAMED = 20  # bad documents that are named before they are only counted
_STALE_S = 60.0


@dataclass(frozen=True)
class Built:
    """What was written, and what was left out."""

    documents: int
    tokens: int
    skipped: dict[str, int]
    """How many documents for which reason."""
    largest: int
    """The largest token id."""
    longest: int
    """Tokens of the longest document."""
    predicted: int | None
    """Tokens of examples that count in a loss; None for texts."""


@dataclass(frozen=True)
class _Tokens:
    """What became of a batch of documents."""

    ids: np.ndarray
    """Of all documents, one after the other."""
    lengths: list[int]
    bad: list[tuple[str, str, bool]]
    """Where, why, and whether that may end the build."""
    counts: np.ndarray | None
    """Of examples, 1 for each token that counts in a loss; None for texts."""
    read: int
    """Bytes of the input, as on disk, that this batch has brought reading on by."""


def build(
    paths: Sequence[Path],
    prefix: Path,
    choice: TokenizerChoice,
    *,
    key: str = "text",
    format: Literal["text", "sft"] = "text",
    longest: int | None = None,
    processes: int = 1,
    on_bad: Literal["fatal", "skip"] = "fatal",
    overwrite: bool = False,
    console: IO[str] | None = None,
) -> Built:
    """Writes the documents of `paths` as the data set `prefix`.

    Args:
        paths: files, or folders of files, of text (a document per file), JSONL or Parquet (a document per line or row).
        prefix: what Megatron's `--data-path` takes.
        choice: the tokenizer.
        key: of the text in a JSON object, or its column in a Parquet file.
        format: sft: JSONL of examples, see `examples`.
        longest: leaves documents of more tokens out, and counts them.
        processes: that tokenize; what is written doesn't depend on it.
        on_bad: whether a document that can't be used ends the build, or is left out and counted.
        overwrite: replace a data set of that name.
        console: gets a progress bar, and the first documents that are left out; None: nothing.

    Raises:
        UsageError: bad input (named with file and line), a missing library, or a data set that is there already.
    """
    if processes < 1:
        raise UsageError(f"{processes} processes: choose 1 or more")
    if longest is not None and longest < 2:
        raise UsageError(f"documents of {longest} tokens at most: choose 2 or more")
    files = find_files(paths)
    if not overwrite and any(_part(prefix, suffix).exists() for suffix in SUFFIXES):
        raise UsageError(
            f"{prefix}: a data set of that name is there; --overwrite replaces it, or choose another prefix"
        )
    tokenizer = tokenizers.load(choice)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    work = _Work(tokenizer, None if format == "sft" else key, longest)
    with _scratch(prefix) as scratch, _executor(processes, work) as executor:
        batches = _ordered(executor, _batches(files, key), ahead=2 * processes)
        built = _write(batches, scratch / "data", tokenizer.vocab_size, on_bad, files, console)
        description = {
            "tokenizer": tokenizers.to_json(choice),
            "documents": built.documents,
            "tokens": built.tokens,
            "skipped": built.skipped,
            "largest_id": built.largest,
            "format": format,
            "longest": built.longest,
            "predicted": built.predicted,
            "end_of_document": tokenizer.eod,
            "tokenizer_sha256": tokenizers.digest(choice),
            "key": key,
            "files": [str(file) for file in files],
        }
        (scratch / "data.json").write_text(json.dumps(description, indent=1) + "\n")
        seal_index(scratch / "data.idx", prefix)
        _part(prefix, ".idx").unlink(missing_ok=True)
        for suffix in SUFFIXES:
            if (scratch / f"data{suffix}").exists():
                os.replace(scratch / f"data{suffix}", _part(prefix, suffix))
            else:  # that of a data set of examples which this one replaces
                _part(prefix, suffix).unlink(missing_ok=True)
    return built


def _part(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


@contextlib.contextmanager
def _scratch(prefix: Path) -> Iterator[Path]:
    """A folder to write in, locked while its build lives, after removing those of builds that were killed."""
    for left in prefix.parent.glob(f".{prefix.name}-*.partial"):
        _remove_if_abandoned(left)
    folder = Path(tempfile.mkdtemp(dir=prefix.parent, prefix=f".{prefix.name}-", suffix=".partial"))
    try:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_abandoned(folder: Path) -> None:
    try:
        with (folder / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except FileNotFoundError:  # gone meanwhile, or made a moment ago and about to be locked
        with contextlib.suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
        return
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _executor(processes: int, work: _Work) -> Iterator[Callable[[list[Raw], int], Future[_Tokens]]]:
    """What tokenizes a batch: forked processes, which share the tokenizer as it was loaded."""
    global _worker
    _worker = work
    executor: Executor = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin_worker)
    try:
        yield lambda batch, size: executor.submit(_tokenize, batch, size)
    except BrokenProcessPool as error:
        raise UsageError("a tokenizing process was ended from outside: was there too little memory?") from error
    finally:
        executor.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Work:
    """How to tokenize."""

    tokenizer: Tokenizer
    key: str | None
    """Of a text; None: examples."""
    longest: int | None

    def encode(self, raw: Raw) -> tuple[np.ndarray, np.ndarray | None]:
        """The ids of a document, and of an example which of them count."""
        if self.key is not None:
            return self.tokenizer.encode(raw.text(self.key)), None
        return examples.encode(raw.record(), self.tokenizer)


_worker: _Work
"""In a forked process. Set right before forking, as tokenizers can't all be pickled."""


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent ends its workers
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _batches(files: Iterable[Path], key: str) -> Iterator[tuple[list[Raw], int]]:
    """Documents in lots worth a process's while, and by how many bytes each lot brings reading on."""
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
    submit: Callable[[list[Raw], int], Future[_Tokens]], batches: Iterable[tuple[list[Raw], int]], ahead: int
) -> Iterator[_Tokens]:
    """The results in the order of the batches, of which no more than `ahead` are in memory at once."""
    waiting: deque[Future[_Tokens]] = deque()
    for batch, size in batches:
        waiting.append(submit(batch, size))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _tokenize(batch: list[Raw], size: int) -> _Tokens:
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
    return _Tokens(ids, lengths, bad, np.concatenate(counted) if counted else None, size)


def _write(
    batches: Iterable[_Tokens],
    target: Path,
    vocab_size: int,
    on_bad: str,
    files: Sequence[Path],
    console: IO[str] | None,
) -> Built:
    """Writes target.bin and target.idx."""
    from tqdm import tqdm

    upstream = indexed_dataset()
    builder = upstream.IndexedDatasetBuilder(f"{target}.bin", dtype=upstream.DType.optimal_dtype(vocab_size))
    tokens = largest = longest = predicted = 0
    reasons: Counter[str] = Counter()
    total = sum(file.stat().st_size for file in files)
    hidden = None if console else True  # None: unless the console is a terminal
    bar: Any = tqdm(total=total, unit="B", unit_scale=True, file=console or sys.stderr, disable=hidden)
    with bar:
        for batch in batches:
            for where, reason, ends in batch.bad:
                if ends and on_bad == "fatal":
                    raise UsageError(f"{where}: {reason}")
                reasons[reason.partition(" (")[0].partition(";")[0]] += 1
                if console is not None and reasons.total() <= _NAMED:
                    bar.write(f"left out {where}: {reason}", file=console)
                elif console is not None and reasons.total() == _NAMED + 1:
                    bar.write(f"left out more than {_NAMED}: the others are only counted", file=console)
            if batch.lengths:
                _add(builder, batch)
                tokens += batch.ids.size
                largest, longest = max(largest, int(batch.ids.max())), max(longest, *batch.lengths)
            if batch.counts is not None:
                predicted += int(batch.counts.sum())
                with open(f"{target}{examples.SUFFIX}", "ab") as counts:
                    counts.write(batch.counts.tobytes())
            bar.update(batch.read)
            bar.set_postfix_str(f"{len(builder.sequence_lengths):,} documents, {tokens:,} tokens", refresh=False)
    if not tokens:
        raise UsageError(f"no document to build the data set from: {reasons.total()} were left out, and none remained")
    builder.finalize(f"{target}.idx")
    of_examples = Path(f"{target}{examples.SUFFIX}").exists()
    return Built(
        len(builder.sequence_lengths), tokens, dict(reasons), largest, longest, predicted if of_examples else None
    )


def counted(skipped: Mapping[str, int]) -> str:
    """`Built.skipped` in words."""
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())


def _add(builder: Any, batch: _Tokens) -> None:
    """The documents of a batch, in one write."""
    first = len(builder.sequence_lengths)
    builder.add_document(batch.ids, batch.lengths)
    builder.document_indices[-1:] = range(first + 1, first + len(batch.lengths) + 1)
