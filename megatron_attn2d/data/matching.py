"""Whether data sets were written with the tokenizer of the run that reads them: a model trains on any ids.

`PREFIX.json`, which `build` writes, names a set's tokenizer; that is compared before ranks start. Of sets that others
built nothing is known but their ids: rank 0 looks for one outside the vocabulary before the first step, and each batch
is looked through (`micro_batch.next_batch`).
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
"""Tokens that are read at a time, and how many times: a set of 268 million tokens whole, of a larger one that many."""
_READ_EOD = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")
"""Arguments of Megatron under which the token that ends a document counts."""


def check_data(run: RunConfig, *, trains: bool = True) -> None:
    """Raise ConfigError if a data set of `run` was written with another tokenizer than the run's, or in another format.

    Where it does not train on them (`trains`), sets of examples may be read as text.
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
    """What of PREFIX.json contradicts a run's `data:` section; nothing where there is none.

    With `reads_eod` the token that ends a document matters although the run doesn't name it.
    """
    if not is_sealed(prefix):  # built by others, whose PREFIX.json may be anything, of any size
        return
    known = description(prefix)
    if not known:
        return
    theirs, described = TokenizerChoice(**known["tokenizer"]), f"{prefix}.json says that {prefix} holds"
    # Older descriptions lack both: of bytes they are known, of other ids the ranks look at the set itself.
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
    """Whether the files of two tokenizers of a kind differ, as far as they can be told apart."""
    assert ours.model is not None
    assert theirs.model is not None
    if not Path(ours.model).exists():  # which is told elsewhere
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
    """The largest token id of the data set `prefix`; of a large one, that of parts spread evenly over it.

    Raises:
        UsageError: it is no data set.
    """
    indexed = open_indexed(prefix)
    stream = np.memmap(f"{prefix}.bin", dtype=indexed.index.dtype, mode="r")
    blocks = -(-stream.size // _BLOCK)
    read = range(blocks) if blocks <= _BLOCKS else (blocks * i // _BLOCKS for i in range(_BLOCKS))
    return max((int(stream[block * _BLOCK : (block + 1) * _BLOCK].max()) for block in read), default=-1)
