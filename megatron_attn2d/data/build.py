"""Builds the data set PREFIX.bin and PREFIX.idx of text files, in the order of the files.

PREFIX.json beside them names the files and the tokenizer, and counts what was left out. All three are written in a
folder of their own and renamed, the index last, so that a data set is whole or has no index. The next build removes the
folder of one that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from megatron_attn2d.data import examples, tokenizers
from megatron_attn2d.data.indexed import seal_index
from megatron_attn2d.data.readers import find_files
from megatron_attn2d.data.tokenizers import Tokenizer, TokenizerChoice
from megatron_attn2d.data.tokenizing import Tokens, Work, tokenized
from megatron_attn2d.errors import UsageError
from megatron_attn2d.megatron.upstream.quiet_imports import indexed_dataset

SUFFIXES = (examples.SUFFIX, ".bin", ".json", ".idx.sha256", ".idx")
"""Suffixes of a data set's files, in the order in which they appear; the last one completes it. A set of texts has no
file of the first suffix."""
_NAMED = 20  # bad documents that are named; further ones are only counted
_STALE_S = 60.0  # age of an unlocked folder whose build must have died


@dataclass(frozen=True)
class Built:
    """The numbers of a data set that was built."""

    documents: int
    tokens: int
    skipped: dict[str, int]
    """Numbers of documents that were left out, by the reason."""
    largest: int
    """The largest token id."""
    longest: int
    """Tokens of the longest document."""
    predicted: int | None
    """Tokens of examples that count in the loss; None for texts."""


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
    """Write the documents of `paths` as the data set `prefix`.

    Args:
        paths: files, or folders of files, of text (a document per file), JSONL or Parquet (a document per line or row).
        prefix: of the data set, as Megatron's `--data-path` takes it.
        choice: the tokenizer.
        key: of the text in a JSON object, or its column in a Parquet file.
        format: sft: JSONL of examples, see `examples`.
        longest: most tokens of a document; longer ones are left out and counted. None: no limit.
        processes: number of processes that tokenize; the data set doesn't depend on it.
        on_bad: fatal: a document that can't be used ends the build; skip: it is left out and counted.
        overwrite: whether to replace a data set of that name.
        console: shows a progress bar, and names the first documents that are left out; None: nothing is shown.

    Raises:
        UsageError: a document can't be used (named with file and line), a library is missing, a data set of that name
            exists, or a number is out of range.
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
    work = Work(tokenizer, None if format == "sft" else key, longest)
    with _scratch(prefix) as scratch:
        with tokenized(files, key, work, processes) as batches:
            built = _write(batches, scratch / "data", tokenizer.vocab_size, on_bad, files, console)
        description = _description(choice, tokenizer, built)
        description |= {"format": format, "key": key, "files": [str(file) for file in files]}
        (scratch / "data.json").write_text(json.dumps(description, indent=1) + "\n")
        _appear(scratch, prefix)
    return built


def _description(choice: TokenizerChoice, tokenizer: Tokenizer, built: Built) -> dict[str, Any]:
    """The content of PREFIX.json, without the input files."""
    return {
        "tokenizer": tokenizers.to_json(choice),
        "documents": built.documents,
        "tokens": built.tokens,
        "skipped": built.skipped,
        "largest_id": built.largest,
        "longest": built.longest,
        "predicted": built.predicted,
        "end_of_document": tokenizer.eod,
        "tokenizer_sha256": tokenizers.digest(choice),
    }


def _appear(scratch: Path, prefix: Path) -> None:
    """Move the files of a data set from `scratch` to `prefix`, so that it is never there in part."""
    seal_index(scratch / "data.idx", prefix)
    _part(prefix, ".idx").unlink(missing_ok=True)
    for suffix in SUFFIXES:
        if (scratch / f"data{suffix}").exists():
            os.replace(scratch / f"data{suffix}", _part(prefix, suffix))
        else:  # a set of texts replaces one of examples
            _part(prefix, suffix).unlink(missing_ok=True)


def _part(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


@contextlib.contextmanager
def _scratch(prefix: Path) -> Iterator[Path]:
    """Yields a folder to write in, which is locked meanwhile; before that, folders of killed builds are removed."""
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
    except FileNotFoundError:  # its build has removed it, or has just made it and will lock it
        with contextlib.suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
        return
    shutil.rmtree(folder, ignore_errors=True)


def _write(
    batches: Iterable[Tokens],
    target: Path,
    vocab_size: int,
    on_bad: str,
    files: Sequence[Path],
    console: IO[str] | None,
) -> Built:
    """Write target.bin and target.idx, and for examples target.loss; see `build` for the arguments."""
    from tqdm import tqdm

    upstream = indexed_dataset()
    builder = upstream.IndexedDatasetBuilder(f"{target}.bin", dtype=upstream.DType.optimal_dtype(vocab_size))
    tokens = largest = longest = predicted = 0
    reasons: Counter[str] = Counter()
    total = sum(file.stat().st_size for file in files)
    hidden = None if console else True  # None: tqdm hides the bar unless the console is a terminal
    bar: Any = tqdm(total=total, unit="B", unit_scale=True, file=console or sys.stderr, disable=hidden)
    with bar:
        for batch in batches:
            for where, reason, ends in batch.bad:
                if ends and on_bad == "fatal":
                    raise UsageError(f"{where}: {reason}; correct it, or leave such documents out by --skip-bad")
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
    """`Built.skipped` as text."""
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())


def _add(builder: Any, batch: Tokens) -> None:
    """Add the documents of a batch to `builder`, in one write."""
    first = len(builder.sequence_lengths)
    builder.add_document(batch.ids, batch.lengths)
    builder.document_indices[-1:] = range(first + 1, first + len(batch.lengths) + 1)
