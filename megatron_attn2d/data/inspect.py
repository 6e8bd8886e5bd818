"""Reports on a data set: its numbers, and the beginning of a document, decoded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_attn2d.config.prefixes import is_complete
from megatron_attn2d.data import histogram, tokenizers
from megatron_attn2d.data.build import counted
from megatron_attn2d.data.tokenizers import TokenizerChoice
from megatron_attn2d.errors import UsageError
from megatron_attn2d.megatron.upstream.quiet_imports import hushed, indexed_dataset


def description(prefix: Path) -> dict[str, Any]:
    """The content of PREFIX.json; {} where there is none, as beside data sets built by other programs.

    Raises:
        UsageError: the file is not as `build` writes it.
    """
    path = prefix.with_name(prefix.name + ".json")
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        TokenizerChoice(**content["tokenizer"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a description of a data set ({error})") from error
    return dict(content)


def open_indexed(prefix: Path) -> Any:
    """Open `prefix` as Megatron's IndexedDataset.

    Raises:
        UsageError: one of its files is missing, or the index can't be read.
    """
    if not is_complete(prefix):
        raise UsageError(f"{prefix}: no data set: {prefix}.bin and {prefix}.idx make one")
    upstream = indexed_dataset()
    try:
        with hushed():
            return upstream.IndexedDataset(str(prefix))
    except (AssertionError, ValueError, OSError) as error:
        raise UsageError(f"{prefix}.idx: not an index of Megatron's ({error})") from error


def report(
    prefix: Path,
    choice: TokenizerChoice | None = None,
    document: int = 0,
    tokens: int = 64,
    plot: Path | None = None,
) -> Iterator[str]:
    """Yields lines on the data set `prefix`; the last are the begin of a document, as ids and decoded.

    Args:
        prefix: of the data set.
        choice: the tokenizer; None: the one that PREFIX.json names.
        document: number of the document that is shown, from 0.
        tokens: how many of its tokens are shown.
        plot: the PNG that gets the histogram of lengths; None: no picture.

    Raises:
        UsageError: it is no data set, or has no such document; `tokens` is less than 1.
    """
    if tokens < 1:
        raise UsageError(f"{tokens} tokens to show: choose 1 or more")
    indexed, known = open_indexed(prefix), description(prefix)
    documents = len(indexed.document_indices) - 1
    lengths = np.add.reduceat(indexed.sequence_lengths, indexed.document_indices[:-1]) if documents else np.zeros(1)
    yield f"{prefix}: {documents:,} documents, {int(lengths.sum()):,} tokens of {indexed.index.dtype.__name__}"
    shortest, median, longest = (int(f(lengths)) for f in (np.min, np.median, np.max))
    yield f"tokens per document: {shortest:,} to {longest:,}, median {median:,}"
    if (held := lengths[lengths > 0]).size:
        yield from histogram.lines(held)
        if plot is not None:
            histogram.draw(held, f"Documents of {prefix.name} by length", plot)
            yield f"drawn into {plot}"
    if known.get("predicted"):
        yield f"examples: {known['predicted']:,} of the tokens are to be predicted"
    if known.get("skipped"):
        yield f"left out when it was built: {counted(known['skipped'])}"
    if choice is None and "tokenizer" in known:
        choice = TokenizerChoice(**known["tokenizer"])
    if choice is None:
        yield "tokenizer: not known (no .json beside it); name one to decode"
    else:
        yield f"tokenizer: {choice.kind} {choice.model or ''}".rstrip()
    if not 0 <= document < documents:
        raise UsageError(f"document {document}: there are {documents}, from 0")
    first, last = indexed.document_indices[document : document + 2]
    ids = np.concatenate([indexed[i] for i in range(first, last)])[:tokens]
    yield f"document {document}, tokens 0 to {ids.size - 1} of {int(lengths[document]):,}:"
    yield " ".join(map(str, ids.tolist()))
    if choice is not None:
        yield tokenizers.load(choice).decode(ids)
