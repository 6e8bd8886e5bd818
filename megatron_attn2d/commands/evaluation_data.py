"""What `eval` reads, text or a data set of the run's tokenizer, and where it and `generate` may write."""

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
    """Refuses before the work what could not be written after it."""
    if output.is_dir():
        raise UsageError(f"--output {output}: a directory; name a file")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no directory {output.parent}; make it, or choose another")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--output {output}: {output.parent} can't be written to; choose another")


@contextmanager
def data_set(given: str, key: str | None, run: RunConfig, *, launched: bool) -> Iterator[str]:
    """The prefix of the data set `given`, of the run's tokenizer; a file of texts is made into one meanwhile.

    Raises:
        UsageError: it is a file under a launcher, no data set, or one of another tokenizer.
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
    """`file` as a data set of the run's tokenizer."""
    from megatron_attn2d.data.build import build
    from megatron_attn2d.data.tokenizers import from_yaml_section

    build([file], prefix, from_yaml_section(run.data), key=key)
    return str(prefix)


def _check_data(prefix: str, key: str | None, run: RunConfig) -> None:
    """Refuses a data set of another tokenizer than the run's."""
    from megatron_attn2d.data.matching import mismatches

    if fault := prefix_fault(prefix):
        raise UsageError(f"--data {prefix}: {'; '.join(fault)}")
    if key is not None:
        raise UsageError(f"--key {key}: {prefix} is no file of texts but a data set, of tokens; leave it out")
    if errors := list(mismatches(Path(prefix), run.data)):
        raise ConfigErrors(errors)


def samples(prefix: Path, context: int, most: int) -> int:
    """How many windows there are, up to `most`."""
    from megatron_attn2d.data.inspect import open_indexed

    if most < 1:
        raise UsageError(f"--samples {most}: choose 1 or more")
    indexed = open_indexed(prefix)  # named: its arrays are views of a mapping that ends with it
    tokens = int(indexed.sequence_lengths.sum())
    if tokens <= context:
        raise UsageError(f"{prefix}: {tokens:,} tokens, a window of --context {context:,} needs one more than that")
    return min(most, (tokens - 1) // context)
