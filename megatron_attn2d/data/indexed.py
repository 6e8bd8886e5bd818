"""Writes byte-level data sets as Megatron's .bin/.idx pair, and checksums of data sets and their sample indices.

A document is a text file's bytes (token ids 0 to 255) followed by the end-of-document token 256. Megatron reads such
a set with `--tokenizer-type NullTokenizer --vocab-size 512 --null-tokenizer-eod-id 256` (`TOKENIZER_ARGUMENTS`).
512 ids pad to the same number of rows for every tensor-parallel size up to 4, so that checkpoints reshard.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megatron_attn2d.config.prefixes import is_complete
from megatron_attn2d.megatron.upstream.quiet_imports import indexed_dataset

END_OF_DOCUMENT = 256
TOKENIZER_ARGUMENTS = (
    "--tokenizer-type",
    "NullTokenizer",
    "--vocab-size",
    "512",
    "--null-tokenizer-eod-id",
    str(END_OF_DOCUMENT),
)


def standard_library_sources() -> list[Path]:
    """The source files of the running interpreter's standard library (without its tests), sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))


def is_sealed(prefix: Path) -> bool:
    """Whether the data set `prefix` has the checksum that `seal_index` writes: this package built it."""
    return prefix.with_name(f"{prefix.name}.idx.sha256").is_file()


def seal_index(index: Path, prefix: Path) -> Path:
    """Write the checksum of `index`, which is to become the index of `prefix`, beside it, as `sha256sum -c` reads it.

    Returns:
        The path of the checksum.
    """
    seal = index.with_name(f"{index.name}.sha256")
    seal.write_text(f"{_digest(index)}  {prefix.name}.idx\n")
    return seal


def verify_index(prefix: Path) -> None:
    """Compare the index of the data set `prefix` with its checksum, which data sets built by other programs lack.

    Raises:
        ValueError: they differ; names the index.
    """
    index, seal = (prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".idx.sha256"))
    if seal.is_file() and _digest(index) != seal.read_text().split()[0]:
        raise ValueError(f"{index} is not the index that was built: {seal} holds another checksum; build it again")


@contextmanager
def sealed_caches(directories: Iterable[Path], *, verifies: bool, seals: bool) -> Iterator[None]:
    """While Megatron builds data sets, verify the sample indices that it has cached, and give new ones a checksum.

    Indices without a checksum, which other programs built, are used unverified.

    Args:
        directories: the folders of cached indices.
        verifies: whether this process verifies them first; one process per host should.
        seals: whether this process writes the checksums of new ones; one process of all should.

    Raises:
        ValueError: an index differs from its checksum; names the file.
    """
    there = {path for directory in directories for path in directory.glob("*.npy")}
    for path in sorted(there) if verifies else ():
        seal = path.with_name(f"{path.name}.sha256")
        if seal.is_file() and _digest(path) != seal.read_text().split()[0]:
            raise ValueError(
                f"{path} is not the index that was built: remove it and {seal.name}, to have it built again"
            )
    yield
    if seals:
        for path in {path for directory in directories for path in directory.glob("*.npy")} - there:
            scratch = path.with_name(f".{path.name}.sha256-new")
            scratch.write_text(f"{_digest(path)}  {path.name}\n")
            os.replace(scratch, path.with_name(f"{path.name}.sha256"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build(files: Iterable[Path], prefix: Path) -> Path:
    """Write the bytes of `files` as the data set `prefix`.bin and `prefix`.idx, a document per file.

    The pair appears whole or not at all, also where several processes build it at once: it is written under
    temporary names and renamed, the index last.

    Returns:
        `prefix`, as Megatron's `--data-path` takes it.

    Raises:
        ValueError: there is no file, or all files are empty.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=prefix.parent, prefix=f".{prefix.name}-") as scratch:
        bin_path, idx_path = Path(scratch, "data.bin"), Path(scratch, "data.idx")
        builder = indexed_dataset().IndexedDatasetBuilder(str(bin_path), dtype=np.uint16)
        documents = 0
        for file in files:
            if text := file.read_bytes():
                document = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
                document = np.append(document, np.uint16(END_OF_DOCUMENT))
                builder.add_document(document, [document.size])
                documents += 1
        if not documents:
            raise ValueError(f"no text to build the data set {prefix} from: give at least one file that is not empty")
        builder.finalize(str(idx_path))
        seal = seal_index(idx_path, prefix)
        os.replace(bin_path, prefix.with_name(prefix.name + ".bin"))
        os.replace(seal, prefix.with_name(prefix.name + ".idx.sha256"))
        os.replace(idx_path, prefix.with_name(prefix.name + ".idx"))
    return prefix


def build_default(directory: Path | str) -> Path:
    """Build the embedded data set, the sources of the standard library, in `directory`, unless it is there.

    Returns:
        Its prefix, as Megatron's `--data-path` takes it.
    """
    prefix = Path(directory) / "python-standard-library"
    return prefix if is_complete(prefix) else build(standard_library_sources(), prefix)
