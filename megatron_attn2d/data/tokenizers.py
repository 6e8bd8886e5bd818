"""Tokenizes text, by bytes or by Megatron's own tokenizers, so that a data set fits the run that reads it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np

from megatron_attn2d.config.schema import Data
from megatron_attn2d.data.indexed import END_OF_DOCUMENT
from megatron_attn2d.data.readers import BadDocument, library
from megatron_attn2d.errors import UsageError
from megatron_attn2d.megatron.upstream.quiet_imports import hushed, quiet_import

Kind = Literal["bytes", "huggingface", "sentencepiece", "tiktoken"]
_LIBRARY = {"huggingface": "transformers", "sentencepiece": "sentencepiece", "tiktoken": "tiktoken"}
_TYPE = {
    "huggingface": "HuggingFaceTokenizer",
    "sentencepiece": "SentencePieceTokenizer",
    "tiktoken": "TikTokenizer",
}
ANSWERS = "assistant"
"""The role whose messages a model is to learn."""
END = None
"""Stands for the token that ends a document, in a part of an example."""
type Message = dict[str, str]
type Part = tuple[str | None, bool]
"""A text or END, and whether it counts in the loss."""
TIKTOKEN_SIZE = 1 << 17
"""Ids that Megatron uses of a tiktoken vocabulary by default."""


@dataclass(frozen=True)
class TokenizerChoice:
    """Names a tokenizer; it is kept beside a data set, so that the set can be decoded."""

    kind: Kind = "bytes"
    model: str | None = None
    """File or folder of the tokenizer, on local disk; None for bytes."""
    vocab_size: int | None = None
    """For tiktoken, the number of ids to use, its 1000 special ones included. None: TIKTOKEN_SIZE."""


class Tokenizer(Protocol):
    """Turns text into token ids and back; ids are one-dimensional integer arrays."""

    eod: int
    """The token that ends a document."""
    vocab_size: int
    """Number of ids; each is smaller."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, and the id that ends a document."""

    def begun(self, text: str) -> np.ndarray:
        """The ids of `text`, after the token with which the tokenizer begins a text, if it has one."""

    def plain(self, text: str) -> np.ndarray:
        """The ids of `text` alone, as in the middle of a document."""

    def chat(self, messages: Sequence[Message]) -> list[Part]:
        """A conversation up to its last answer, in parts that count in the loss and parts that don't.

        Raises:
            BadDocument: the tokenizer can't write this conversation.
        """

    def decode(self, ids: np.ndarray) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""


class _Bytes:
    eod = END_OF_DOCUMENT
    vocab_size = END_OF_DOCUMENT + 1

    def encode(self, text: str) -> np.ndarray:
        return np.append(self.begun(text), np.uint16(self.eod))

    def begun(self, text: str) -> np.ndarray:
        return self.plain(text)

    def plain(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def chat(self, messages: Sequence[Message]) -> list[Part]:
        """For each message `ROLE: CONTENT` and the token that ends a document."""
        last = max(i for i, message in enumerate(messages) if message["role"] == ANSWERS)
        found: list[Part] = []
        for message in messages[: last + 1]:
            counts = message["role"] == ANSWERS
            found += [(f"{message['role']}: ", False), (message["content"], counts), (END, counts)]
        return found

    def decode(self, ids: np.ndarray) -> str:
        parts = np.split(ids, np.flatnonzero(ids >= self.eod))
        return "<end of document>".join(bytes(p[p < self.eod].astype(np.uint8)).decode(errors="replace") for p in parts)


class _Megatron:
    """One of Megatron's tokenizers. It ends a document by one token, also where the tokenizer itself adds that."""

    def __init__(self, tokenizer: Any, where: str) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = int(tokenizer.vocab_size)
        eod = tokenizer.eod
        if eod is None or not 0 <= eod < self.vocab_size:
            raise UsageError(f"{where}: the tokenizer has no token that ends a text (eos), which parts documents")
        self.eod = int(eod)

    def encode(self, text: str) -> np.ndarray:
        return np.append(self.begun(text), np.int32(self.eod))

    def begun(self, text: str) -> np.ndarray:
        ids = list(self._tokenizer.tokenize(text))
        while ids and ids[-1] == self.eod:
            ids.pop()
        return np.array(ids, dtype=np.int32)

    def plain(self, text: str) -> np.ndarray:
        wrapper: Any = self._tokenizer._tokenizer
        if getattr(wrapper, "include_special_tokens", False):  # of Hugging Face; it would begin each part anew
            ids = wrapper.tokenizer(text, add_special_tokens=False).input_ids
        else:
            ids = self._tokenizer.tokenize(text)
        return np.array(ids, dtype=np.int32)

    def chat(self, messages: Sequence[Message]) -> list[Part]:
        """By the tokenizer's chat template: an answer counts, with all that the template writes until it ends."""
        found: list[Part] = []
        written = ""
        for i in (i for i, message in enumerate(messages) if message["role"] == ANSWERS):
            asked, answered = self._written(messages[:i], asks=True), self._written(messages[: i + 1], asks=False)
            if not (asked.startswith(written) and answered.startswith(asked)):
                raise BadDocument("the chat template writes it otherwise once it goes on (give an example per answer)")
            found += [(asked[len(written) :], False), (answered[len(asked) :], True)]
            written = answered
        return found

    def _written(self, messages: Sequence[Message], asks: bool) -> str:
        library: Any = getattr(self._tokenizer._tokenizer, "tokenizer", None)
        if getattr(library, "chat_template", None) is None:
            raise BadDocument("the tokenizer has no chat template (give a prompt and a completion)")
        try:
            return str(library.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks))
        except Exception as error:  # a template may raise anything about roles and their order
            raise BadDocument(f"the chat template refuses it ({' '.join(str(error).split())})") from error

    def decode(self, ids: np.ndarray) -> str:
        return str(self._tokenizer.detokenize(ids.tolist()))


def load(choice: TokenizerChoice) -> Tokenizer:
    """The tokenizer that `choice` names, from local files alone.

    Raises:
        UsageError: its file or its library isn't there, or it can't end a document.
    """
    if choice.vocab_size is not None and choice.kind != "tiktoken":
        raise UsageError(
            f"vocabulary of {choice.vocab_size} ids: {choice.kind} has its own size; leave it out, or choose tiktoken"
        )
    if choice.vocab_size is not None and choice.vocab_size <= 1000:
        raise UsageError(f"vocabulary of {choice.vocab_size} ids: 1000 of tiktoken's are special ones; choose more")
    if choice.kind == "bytes":
        if choice.model:
            raise UsageError(
                f"tokenizer model {choice.model}: bytes need none; leave it out, or choose another tokenizer"
            )
        return _Bytes()
    if not choice.model:
        raise UsageError(f"tokenizer {choice.kind}: is read from local files; name its file or folder")
    if not Path(choice.model).exists():
        raise UsageError(f"tokenizer model {choice.model}: no such file or folder")
    if choice.kind == "tiktoken" and Path(choice.model).suffix != ".json":
        raise UsageError(
            f"tokenizer model {choice.model}: Megatron reads tiktoken's vocabulary from a .json file, "
            "a list of {rank, token_bytes, token_str}"
        )
    return _Megatron(_of_megatron(choice), choice.model)


def vocabulary(data: Data) -> int | None:
    """The number of ids of a run's tokenizer, by its `data:` section; None where its files are not on this host.

    Raises:
        UsageError: its files can't be read, or its library isn't installed.
    """
    if data.tokenizer_type == "NullTokenizer":
        return data.vocab_size
    if data.tokenizer_model is None or not Path(data.tokenizer_model).exists():
        return None
    return int(_of_megatron(from_yaml_section(data)).vocab_size)


def digest(choice: TokenizerChoice) -> str | None:
    """A checksum of the tokenizer files that decide about ids, wherever they lie; None without such files."""
    if choice.model is None:
        return None
    path = Path(choice.model)
    names = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
    files = [path] if path.is_file() else sorted(file for name in (*names, "*.model") for file in path.glob(name))
    contents = hashlib.sha256()
    for file in files:
        contents.update(hashlib.sha256(file.read_bytes()).digest())
    return contents.hexdigest() if files else None


@cache
def _of_megatron(choice: TokenizerChoice) -> Any:
    """Megatron's own tokenizer; its library takes seconds to import."""
    assert choice.model is not None
    library(_LIBRARY[choice.kind], f"tokenizer {choice.kind}")
    # Files are read from local disk only. Several processes tokenize, so that threads in each would compete.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with hushed():
        upstream = quiet_import("megatron.core.tokenizers")
        options: dict[str, Any] = {"vocab_size": choice.vocab_size} if choice.vocab_size else {}
        try:
            return upstream.MegatronTokenizer.from_pretrained(
                tokenizer_path=choice.model, metadata_path={"library": choice.kind}, **options
            )
        except Exception as error:  # each library raises errors of its own
            reason = str(error) or "its contents are not as Megatron wants them"
            raise UsageError(f"tokenizer model {choice.model}: can't be read as {choice.kind} ({reason})") from error


def yaml_section(choice: TokenizerChoice) -> dict[str, Any]:
    """The keys of a run's `data:` section with which it reads a data set of the tokenizer `choice`."""
    if choice.kind == "bytes":
        return {"tokenizer_type": "NullTokenizer", "vocab_size": 512, "null_tokenizer_eod_id": END_OF_DOCUMENT}
    section: dict[str, Any] = {"tokenizer_type": _TYPE[choice.kind], "tokenizer_model": choice.model}
    return section | ({"vocab_size": choice.vocab_size} if choice.vocab_size else {})


def from_yaml_section(data: Data) -> TokenizerChoice:
    """The tokenizer of a run, by its `data:` section.

    Raises:
        UsageError: it can't tokenize text, being a NullTokenizer of other ids than bytes.
    """
    if data.tokenizer_type != "NullTokenizer":
        kind = next(kind for kind, type_ in _TYPE.items() if type_ == data.tokenizer_type)
        # An extended file may give a vocab_size for other data; only tiktoken reads it.
        return TokenizerChoice(cast(Kind, kind), data.tokenizer_model, data.vocab_size if kind == "tiktoken" else None)
    if (data.vocab_size, data.null_tokenizer_eod_id) != (512, END_OF_DOCUMENT):
        raise UsageError(
            f"data.tokenizer_type = NullTokenizer of {data.vocab_size} ids: not bytes, so text can't be tokenized; "
            "give a data set of ids"
        )
    return TokenizerChoice()


def to_json(choice: TokenizerChoice) -> dict[str, Any]:
    """`choice` as it is kept in PREFIX.json."""
    return {name: value for name, value in asdict(choice).items() if value is not None}
