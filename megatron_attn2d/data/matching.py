"""Checks that data sets were written with the tokenizer of the run that reads them: a model would train on any ids.

`PREFIX.json`, which `build` writes, names a set's tokenizer, and is compared with the run before ranks start. Of a set
that another program built only the ids are known: rank 0 looks for one outside the vocabulary before the first step,
and each batch is checked (`micro_batch.next_batch`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_attn2d.config.schema import Data, RunConfig
from megatron_attn2d.data import examples, tokenizers
from megatron_attn2d.data.indexed import END_OF_DOCUMENT, is_sealed
from megatron_attn2d.data.inspect import description, open_indexed
from megatron_attn2d.data.tokenizers import TIKTOKEN_SIZE, TokenizerChoice
from megatron_attn2d.errors import ConfigError, ConfigErrors

_BLOCK, _BLOCKS = 1 << 16, 1 << 12
"""Tokens per block, and the most blocks that are read: a set of up to 268 million tokens is read whole."""
_READ_EOD = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")
"""Arguments of Megatron that make a run depend on the token that ends a document."""


def check_data(run: RunConfig, *, trains: bool = True) -> None:
    """Check that the data sets of `run` were written with its tokenizer and in its format.

    Args:
        run: names the data sets.
        trains: whether the run trains on them; where it does not, it may read sets of examples as text.

    Raises:
        ConfigError: with a line per data set and key that do not match.
    """
    reads_eod = any(map(run.megatron_args.get, _READ_EOD))
    errors = [error for prefix in run.data.paths for error in mismatches(Path(prefix), run.data, reads_eod)]
    if run.data.format == "sft":
        for prefix in map(Path, run.data.paths):
            known = description(prefix) if is_sealed(prefix) else {}
            errors += filter(None, [examples.fault(prefix, run.training.seq_length, known)])
    elif trains:
        for prefix in map(Path, run.data.paths):
            if examples.path(prefix).is_file():
                reason = f"{prefix} holds examples for fine-tuning, whose prompts would count in the loss"
                choice = "choose sft, or a set that was built without --format sft"
                errors.append(ConfigError("data.format", run.data.format, reason, choice))
    if errors:
        raise ConfigErrors(errors)


def mismatches(prefix: Path, data: Data, reads_eod: bool = False) -> Iterator[ConfigError]:
    """Yields an error per key of a run's `data:` section that contradicts PREFIX.json; none where that is missing.

    Args:
        prefix: of the data set.
        data: the section.
        reads_eod: whether the run depends on the token that ends a document, even where it doesn't name it.
    """
    if not is_sealed(prefix):  # another program built it, and PREFIX.json may be any file
        return
    known = description(prefix)
    if not known:
        return
    theirs, described = TokenizerChoice(**known["tokenizer"]), f"{prefix}.json says that {prefix} holds"
    # Older descriptions lack both numbers. For bytes they are known; for other tokenizers ranks check the ids.
    of_bytes = theirs.kind == "bytes"
    largest = known.get("largest_id", END_OF_DOCUMENT if of_bytes else None)
    end = known.get("end_of_document", END_OF_DOCUMENT if of_bytes else None)
    if data.tokenizer_type == "NullTokenizer":
        if largest is not None and data.vocab_size is not None and largest >= data.vocab_size:
            reason = f"{described} token ids up to {largest} of {_named(theirs)}"
            yield ConfigError("data.vocab_size", data.vocab_size, reason, _choose(theirs))
        ours = data.null_tokenizer_eod_id
        if end is not None and end != ours and (ours is not None or reads_eod):
            reason = f"{described} documents that end with {end}"
            yield ConfigError("data.null_tokenizer_eod_id", ours, reason, f"choose {end}")
        return
    choice = tokenizers.from_yaml_section(data)
    if choice.kind != theirs.kind:
        reason = f"{described} ids of {_named(theirs)}"
        yield ConfigError("data.tokenizer_type", data.tokenizer_type, reason, _choose(theirs))
    elif _differ(choice, theirs, known):
        reason = f"{described} ids of {_named(theirs)}, with another vocabulary"
        yield ConfigError("data.tokenizer_model", data.tokenizer_model, reason, _choose(theirs))
    elif (choice.vocab_size or TIKTOKEN_SIZE) != (size := theirs.vocab_size or TIKTOKEN_SIZE):
        reason = f"{described} ids of a vocabulary of {size}"
        yield ConfigError("data.vocab_size", data.vocab_size, reason, _choose(theirs))


def _differ(ours: TokenizerChoice, theirs: TokenizerChoice, known: dict[str, Any]) -> bool:
    """Whether the files of two tokenizers of one kind are known to differ."""
    assert ours.model is not None
    assert theirs.model is not None
    if not Path(ours.model).exists():  # check_files refuses it
        return False
    kept = known.get("tokenizer_sha256")
    if kept is None and Path(theirs.model).exists():
        kept = tokenizers.digest(theirs)
    return kept is not None and kept != tokenizers.digest(ours)


def _named(choice: TokenizerChoice) -> str:
    return f"tokenizer {choice.kind}" + (f" from {choice.model}" if choice.model else "")


def _choose(choice: TokenizerChoice) -> str:
    section = tokenizers.yaml_section(choice)
    return "choose " + " ".join(f"data.{key}={value}" for key, value in section.items()) + ", or build the set again"


def largest_id(prefix: Path) -> int:
    """The largest token id of the data set `prefix`; of a large set only blocks spread evenly over it are read.

    Raises:
        UsageError: it is no data set.
    """
    indexed = open_indexed(prefix)
    stream = np.memmap(f"{prefix}.bin", dtype=indexed.index.dtype, mode="r")
    blocks = -(-stream.size // _BLOCK)
    read = range(blocks) if blocks <= _BLOCKS else (blocks * i // _BLOCKS for i in range(_BLOCKS))
    return max((int(stream[block * _BLOCK : (block + 1) * _BLOCK].max()) for block in read), default=-1)
