"""Checks and prepares the data that `eval` reads, and checks the output of `eval` and `generate`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_attn2d.config import RunConfig
from megatron_attn2d.config.prefixes import prefix_fault
from megatron_attn2d.errors import ConfigErrors, UsageError


def check_output(output: Path) -> None:
    """Raise UsageError, before the work, if `output` can't be written after it."""
    if output.is_dir():
        raise UsageError(f"--output {output}: a directory; name a file")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no directory {output.parent}; make it, or choose another")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--output {output}: {output.parent} can't be written to; choose another")


@contextmanager
def data_set(given: str, key: str | None, run: RunConfig, *, launched: bool) -> Iterator[str]:
    """Yields the prefix of the data set `given`; from a file of texts a temporary one is built, by the run's tokenizer.

    Args:
        given: a prefix, or a text, JSONL or Parquet file.
        key: of the text in a JSONL or Parquet file; None: text.
        run: has the tokenizer.
        launched: whether a launcher has started the ranks, which then can't share a temporary data set.

    Raises:
        UsageError: `given` is a file under a launcher, no data set, or a data set of another tokenizer.
    """
    if not Path(given).is_file():
        _check_data(given, key, run)
        yield given
        return
    if launched:
        raise UsageError(f"{given}: under a launcher give a data set, made by megatron-attn2d data build")
    with tempfile.TemporaryDirectory(dir=run.run.dir, prefix=".eval-") as folder:
        yield _built(Path(given), key or "text", Path(folder) / "data", run)


def _built(file: Path, key: str, prefix: Path, run: RunConfig) -> str:
    """Build the data set `prefix` of `file`, by the run's tokenizer."""
    from megatron_attn2d.data.build import build
    from megatron_attn2d.data.tokenizers import from_yaml_section

    build([file], prefix, from_yaml_section(run.data), key=key)
    return str(prefix)


def _check_data(prefix: str, key: str | None, run: RunConfig) -> None:
    """Raise UsageError if `prefix` is a folder, has another tokenizer than the run, or comes with a `key`."""
    from megatron_attn2d.data.matching import mismatches

    if fault := prefix_fault(prefix):
        raise UsageError(f"--data {prefix}: {'; '.join(fault)}")
    if key is not None:
        raise UsageError(f"--key {key}: {prefix} is no file of texts but a data set, of tokens; leave it out")
    if errors := list(mismatches(Path(prefix), run.data)):
        raise ConfigErrors(errors)


def samples(prefix: Path, context: int, most: int) -> int:
    """The number of windows of `context` tokens in the data set `prefix`, at most `most`.

    Raises:
        UsageError: `most` is less than 1, or the data set is shorter than a window.
    """
    from megatron_attn2d.data.inspect import open_indexed

    if most < 1:
        raise UsageError(f"--samples {most}: choose 1 or more")
    indexed = open_indexed(prefix)  # kept alive here: its arrays are views of its mapping
    tokens = int(indexed.sequence_lengths.sum())
    if tokens <= context:
        raise UsageError(f"{prefix}: {tokens:,} tokens, a window of --context {context:,} needs one more than that")
    return min(most, (tokens - 1) // context)
