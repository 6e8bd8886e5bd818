"""Data sets of short documents."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_attn2d.data import docstrings, indexed
from megatron_attn2d.data.tokenizers import TokenizerChoice


def build(prefix: Path, documents: Iterable[np.ndarray]) -> Path:
    """A data set of the given token ids."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for ids in documents:
        builder.add_document(ids.astype(np.uint16), [ids.size])
    builder.finalize(f"{prefix}.idx")
    return prefix


def short_examples(prefix: Path) -> Path:
    """Docstrings and functions of 40 to 64 bytes together."""
    from megatron_attn2d.data.build import build as build_examples

    lines = prefix.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps(example) + "\n" for example in docstrings.examples()))
    build_examples([lines], prefix, TokenizerChoice(), format="sft", longest=64)
    return prefix


def short_texts(prefix: Path, seed: int = 0) -> Path:
    """The beginnings of 300 source files, 5 to 90 bytes each, at byte level."""
    random = np.random.default_rng(seed)
    texts = (file.read_bytes() for file in indexed.standard_library_sources() if file.stat().st_size > 100)
    cut = (text[: random.integers(5, 90)] for text, _ in zip(texts, range(300), strict=False))
    return build(prefix, (np.append(np.frombuffer(text, dtype=np.uint8), indexed.END_OF_DOCUMENT) for text in cut))
