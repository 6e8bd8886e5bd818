"""The byte-level data sets."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from megatron_attn2d.config.prefixes import is_complete
from megatron_attn2d.data import indexed


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three texts, one of them empty, one not ASCII."""
    texts = {"a.txt": b"first\n", "b.txt": b"", "c.txt": "größer".encode()}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    return [tmp_path / name for name in texts]


def documents(prefix: Path) -> list[bytes]:
    """The documents of a data set, without the token that ends each."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    found = IndexedDataset(str(prefix))
    assert found.index.dtype == np.uint16
    assert len(found.document_indices) == len(found) + 1
    assert all(tokens[-1] == indexed.END_OF_DOCUMENT for tokens in found)
    return [bytes(tokens[:-1].tolist()) for tokens in found]


def test_documents_are_the_files_bytes(files: list[Path], tmp_path: Path) -> None:
    prefix = indexed.build(files, tmp_path / "deep" / "set.v1")
    assert prefix == tmp_path / "deep" / "set.v1"
    assert documents(prefix) == [b"first\n", "größer".encode()]
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["set.v1.bin", "set.v1.idx", "set.v1.idx.sha256"]


@pytest.mark.parametrize("which", [slice(0, 0), slice(1, 2)], ids=["no file", "an empty file"])
def test_a_set_without_text_is_refused_and_leaves_nothing(files: list[Path], which: slice, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no text to build the data set .*give at least one file"):
        indexed.build(files[which], tmp_path / "out" / "set")
    assert not list((tmp_path / "out").iterdir())


def test_an_interrupted_build_leaves_nothing(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        indexed.build([*files, tmp_path / "missing"], tmp_path / "out" / "set")
    assert not list((tmp_path / "out").iterdir())
    assert not is_complete(tmp_path / "out" / "set")


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_half_a_set_is_not_complete(missing: str, files: list[Path], tmp_path: Path) -> None:
    prefix = indexed.build(files, tmp_path / "set")
    assert is_complete(prefix)
    (tmp_path / f"set{missing}").unlink()
    assert not is_complete(prefix)


def test_processes_that_build_at_once_leave_one_whole_set(files: list[Path], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    builders = [context.Process(target=indexed.build, args=(files, tmp_path / "set")) for _ in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
        assert builder.exitcode == 0
    assert documents(tmp_path / "set") == [b"first\n", "größer".encode()]
    assert not list(tmp_path.glob(".set-*"))


def test_the_default_is_the_standard_library_and_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = indexed.standard_library_sources()
    assert {"ast.py", "typing.py", "argparse.py"} <= {path.name for path in sources}
    assert not [path for path in sources if {"test", "site-packages"} & set(path.parts)]
    few = [path for path in sources if path.name in ("ast.py", "typing.py")]
    monkeypatch.setattr(indexed, "standard_library_sources", lambda: few)
    prefix = indexed.build_default(tmp_path)
    assert documents(prefix) == [path.read_bytes() for path in few]
    built = prefix.with_name(prefix.name + ".idx").stat().st_mtime_ns
    assert indexed.build_default(str(tmp_path)) == prefix
    assert prefix.with_name(prefix.name + ".idx").stat().st_mtime_ns == built


def test_the_tokenizer_arguments_cover_every_byte_and_the_end_of_a_document() -> None:
    given = dict(zip(indexed.TOKENIZER_ARGUMENTS[::2], indexed.TOKENIZER_ARGUMENTS[1::2], strict=True))
    assert given["--null-tokenizer-eod-id"] == str(indexed.END_OF_DOCUMENT)
    assert indexed.END_OF_DOCUMENT > 255
    assert int(given["--vocab-size"]) % (128 * 4) == 0, "padded by the same number for 1, 2 and 4 tensor ranks"
