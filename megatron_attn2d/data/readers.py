"""Reads raw documents from text, JSONL and Parquet files, each with its file and line, so that errors can name them.

Reading is cheap and stays in one process. The costly parts, JSON, UTF-8 and tokenizing, run where `Raw.text` is called.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Literal, cast

from megatron_attn2d.errors import UsageError

Kind = Literal["text", "jsonl", "parquet"]
KINDS: dict[str, Kind] = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
"""The kind of a file by its suffix; `.gz` and `.zst` may follow the suffixes of text and JSONL."""
COMPRESSIONS = (".gz", ".zst")
_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 256


class BadDocument(ValueError):
    """A document, or the rest of a file, can't be used; the message says why."""


@dataclass(frozen=True)
class Raw:
    """A document as it stands in its file, or the error that stopped reading its file."""

    path: Path
    place: str
    """'' for a whole file, else 'line 7' or 'row 7'."""
    kind: Kind
    content: Any
    """Bytes of a text file or of a line; a Parquet cell; a BadDocument."""
    position: int
    """Bytes of the file on disk, compressed or not, that have been read so far."""

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.path}, {self.place}" if self.place else str(self.path)

    def text(self, key: str) -> str:
        """The document's text; of a JSON object the value of `key`.

        Raises:
            BadDocument: the document has no such text.
        """
        value = self._decoded()
        if self.kind == "jsonl":
            value = member(_object(value), key)
        return checked_text(value, key)

    def record(self) -> dict[str, Any]:
        """The JSON object of a line.

        Raises:
            BadDocument: the line holds no JSON object.
        """
        if self.kind != "jsonl":
            raise BadDocument("no line of JSON (examples are .jsonl)")
        return _object(self._decoded())

    def _decoded(self) -> Any:
        if isinstance(self.content, BadDocument):
            raise self.content
        if not isinstance(self.content, bytes):
            return self.content
        try:
            return self.content.decode("utf-8")
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 (byte {error.start + 1}: 0x{self.content[error.start]:02x})"
            raise BadDocument(reason) from None


def checked_text(value: Any, key: str, *, empty: str | None = "empty document") -> str:
    """`value`, the value of `key`, as text.

    Args:
        empty: why a text of no characters or of spaces alone is refused; None: it is not.

    Raises:
        BadDocument: it is no text, it is empty, or it holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        what = "null" if value is None else type(value).__name__
        raise BadDocument(f"{key!r} is no text but {what}")
    if empty and (not value or value.isspace()):
        raise BadDocument(empty)
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadDocument("a surrogate without its other half, which is no text")
    return value


def _object(line: str) -> dict[str, Any]:
    if not line.strip():
        raise BadDocument("blank line")
    try:
        document = json.loads(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise BadDocument(f"broken JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"broken JSON ({error})") from None
    if not isinstance(document, dict):
        raise BadDocument(f"not a JSON object but {type(document).__name__}")
    return document


def member(document: dict[str, Any], key: str) -> Any:
    """The value of `key` in a JSON object.

    Raises:
        BadDocument: the object has no such key.
    """
    if key not in document:
        raise BadDocument(f"no key {key!r}; it has {', '.join(map(repr, sorted(document)[:8])) or 'none'}")
    return document[key]


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The files of `paths`, in that order; a folder stands for the files of a known kind below it, sorted.

    Raises:
        UsageError: a path does not exist, its kind is unknown, a folder holds no file, or a library is missing.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) is not None)
            if not below:
                raise UsageError(f"{path}: no file of a known kind in it; known: {_known()}")
            files += below
        elif not path.is_file():
            raise UsageError(f"{path}: no such file")
        elif _kind(path) is None:
            raise UsageError(f"{path}: what is in it is not known from its name; known: {_known()}")
        else:
            files.append(path)
    if not files:
        raise UsageError("no file to build a data set from")
    for file in files:  # a missing library is reported before hours of work
        if file.suffix == ".zst":
            library("zstandard", str(file))
        if file.suffix == ".parquet":
            library("pyarrow.parquet", str(file))
    return files


def _known() -> str:
    return ", ".join(KINDS) + " (text and JSONL also with " + ", ".join(COMPRESSIONS) + ")"


def _kind(path: Path) -> Kind | None:
    compressed = path.suffix in COMPRESSIONS
    kind = KINDS.get(Path(path.stem).suffix if compressed else path.suffix)
    return None if compressed and kind == "parquet" else kind


def library(name: str, needed_for: str) -> Any:
    """Import the module `name`, which only some data needs.

    Args:
        name: of the module.
        needed_for: the file or tokenizer that needs it, for the message.

    Raises:
        UsageError: it isn't installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise UsageError(
            f"{needed_for}: needs the library {package}, which is not installed; pip install 'megatron-attn2d[data]'"
        ) from error


def read(path: Path, key: str) -> Iterator[Raw]:
    """Yields the documents of one file; after a read error, a last one whose content is the BadDocument."""
    kind = _kind(path)
    assert kind is not None
    place, position = "", 0
    breaks: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, *_library_errors(path))
    try:
        with path.open("rb") as file:
            documents = _parquet(file, path, key) if kind == "parquet" else _text(_decompressed(file, path), kind)
            for place, content in documents:
                position = position if kind == "parquet" else file.tell()  # a Parquet file is not read in order
                yield Raw(path, place, kind, content, position)
    except breaks as error:
        after = f"after {place}" if place else ""
        bad = BadDocument(f"can't be read further ({' '.join(str(error).split())})")
        yield Raw(path, after, kind, bad, position)


def _library_errors(path: Path) -> tuple[type[Exception], ...]:
    if path.suffix == ".zst":
        return (import_module("zstandard").ZstdError,)
    return (import_module("pyarrow").ArrowException,) if path.suffix == ".parquet" else ()


def _decompressed(file: IO[bytes], path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if path.suffix == ".zst":
        reader = import_module("zstandard").ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return io.BufferedReader(reader)
    return file


def _text(file: IO[bytes], kind: Kind) -> Iterator[tuple[str, bytes]]:
    """Yields the whole text file, or each line of a JSONL file, after its name in messages."""
    if kind == "text":
        yield "", file.read().removeprefix(_BOM)
    else:
        for number, line in enumerate(file, 1):
            yield f"line {number}", line.removeprefix(_BOM) if number == 1 else line


def _parquet(file: IO[bytes], path: Path, key: str) -> Iterator[tuple[str, Any]]:
    table = import_module("pyarrow.parquet").ParquetFile(file)
    names = table.schema_arrow.names
    if key not in names:
        yield "", BadDocument(f"no column {key!r}; it has {', '.join(map(repr, names[:8]))}")
        return
    rows = itertools.count(1)
    for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[key]):
        for value in batch.column(0).to_pylist():
            yield f"row {next(rows)}", value
