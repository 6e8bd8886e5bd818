"""Encodes fine-tuning examples, JSON objects with a prompt and its completion, or with chat messages.

    {"prompt": "...", "completion": "..."}
    {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": "..."}, ...]}

PREFIX.loss holds a byte per token of PREFIX.bin: 1 where the model is to predict the token, else 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_attn2d.data.readers import BadDocument, checked_text, member
from megatron_attn2d.data.tokenizers import ANSWERS, END, Message, Part, Tokenizer
from megatron_attn2d.errors import ConfigError

SUFFIX = ".loss"
"""Suffix of the file that holds a byte per token."""
ROLES = ("system", "user", ANSWERS, "tool")


def encode(record: dict[str, Any], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The token ids [n] of an example, and for each of them 1 where it is to be predicted, else 0, uint8 [n].

    Raises:
        BadDocument: `record` is no example.
    """
    parts = _parts(record, tokenizer)
    ids = [np.array([tokenizer.eod]) if text is END else tokenizer.plain(text) for text, _ in parts]
    if "messages" not in record:  # a chat template begins its text itself
        ids[0] = tokenizer.begun(record["prompt"])
    counts = [np.full(len(some), counts, dtype=np.uint8) for some, (_, counts) in zip(ids, parts, strict=True)]
    return np.concatenate(ids), np.concatenate(counts)


def _parts(record: dict[str, Any], tokenizer: Tokenizer) -> list[Part]:
    if "messages" in record:
        return tokenizer.chat(_messages(record["messages"]))
    if not {"prompt", "completion"} <= record.keys():
        keys = ", ".join(map(repr, sorted(record)[:8])) or "none"
        raise BadDocument(f"neither messages nor a prompt and a completion (it has {keys})")
    prompt, completion = (
        checked_text(member(record, key), key, empty=f"empty {key}") for key in ("prompt", "completion")
    )
    return [(prompt, False), (completion, True), (END, True)]


def _messages(found: Any) -> list[Message]:
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise BadDocument("'messages' is no list of objects")
    messages = []
    for i, message in enumerate(found, 1):
        if (role := member(message, "role")) not in ROLES:
            raise BadDocument(f"message {i} has the role {role!r} (choose {', '.join(ROLES)})")
        # What is asked may be empty, as the words of a system often are; an empty answer teaches nothing.
        empty = f"empty answer (message {i})" if role == ANSWERS else None
        content = checked_text(member(message, "content"), "content", empty=empty)
        messages.append({"role": role, "content": content})
    if all(message["role"] != ANSWERS for message in messages):
        raise BadDocument(f"no message of the role {ANSWERS!r}, which alone counts in the loss")
    return messages


def path(prefix: Path) -> Path:
    """The file that says which tokens of the data set `prefix` count in the loss."""
    return prefix.with_name(prefix.name + SUFFIX)


def fault(prefix: Path, seq_length: int, known: dict[str, Any]) -> ConfigError | None:
    """Why a run can't train on the examples of `prefix`; None where it can.

    Args:
        prefix: of the data set.
        seq_length: tokens of a sample.
        known: the content of PREFIX.json.
    """
    if not path(prefix).is_file():
        reason = f"{path(prefix)} is not there, which says which tokens of {prefix} count"
        return ConfigError("data.format", "sft", reason, "build it: megatron-attn2d data build --format sft")
    if (longest := known.get("longest", 0)) > seq_length:
        reason = f"an example is not cut, and the longest of {prefix} has {longest:,} tokens"
        choice = f"choose {longest} or more, or leave it out: megatron-attn2d data build --longest {seq_length}"
        return ConfigError("training.seq_length", seq_length, reason, choice)
    return None
