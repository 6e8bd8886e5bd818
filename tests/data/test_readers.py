"""Raw documents: every kind of file, and every kind of bad document with its place."""

import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_attn2d.data.readers import BadDocument, find_files, read
from megatron_attn2d.errors import UsageError

LINES = b'{"text": "one"}\n{"id": 7, "text": "zw\\u00f6lf"}\n{"text": "dr\xc3\xbc"}\n'


def zstd(content: bytes) -> bytes:
    import zstandard

    half = len(content) // 2  # two frames, as `zstd a b` and parallel compressors write them
    return b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))


def texts(path: Path, key: str = "text") -> list[str]:
    """Each document's text, or the place and the reason that there is none."""
    found = []
    for raw in read(path, key):
        try:
            found.append(raw.text(key))
        except BadDocument as error:
            found.append(f"{raw.where.removeprefix(str(path)).removeprefix(', ')}: {error}")
    return found


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_and_lines_compressed_or_not(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + LINES))
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS[suffix](b"\xef\xbb\xbfline\nline\n"))
    assert texts(tmp_path / f"a.jsonl{suffix}") == ["one", "zwölf", "drü"]
    assert texts(tmp_path / f"a.txt{suffix}") == ["line\nline\n"]


def write_parquet(path: Path, **columns: list) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=300)


def test_parquet(tmp_path: Path) -> None:
    rows = [f"row {row}" for row in range(700)]
    write_parquet(tmp_path / "a.parquet", id=list(range(700)), body=[*rows[:-1], None])
    assert texts(tmp_path / "a.parquet", "body") == [*rows[:-1], "row 700: 'body' is no text but null"]
    assert texts(tmp_path / "a.parquet") == [": no column 'text'; it has 'id', 'body'"]
    assert texts(tmp_path / "a.parquet", "id")[0] == "row 1: 'id' is no text but int"


BAD = {
    b'{"text": "x"': "broken JSON (Expecting ',' delimiter, column 13)",
    b"": "blank line",
    b"[1, 2]": "not a JSON object but list",
    b"{}": "no key 'text'; it has none",
    b'{"b": 1, "a": 2}': "no key 'text'; it has 'a', 'b'",
    b'{"text": null}': "'text' is no text but null",
    b'{"text": ["x"]}': "'text' is no text but list",
    b'{"text": " \\n"}': "empty document",
    b'{"text": "\xfcber"}': "not UTF-8 (byte 11: 0xfc)",
    b'{"text": "\\ud800"}': "a surrogate without its other half, which is no text",
    b"[" * 100_000: "broken JSON (maximum recursion depth exceeded",
    b"1" * 5000: "broken JSON (Exceeds the limit (4300 digits)",
}


@pytest.mark.parametrize("line", BAD, ids=[reason.partition(" (")[0] for reason in BAD.values()])
def test_a_bad_line_is_named_and_the_others_read(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}')
    first, bad, last = texts(tmp_path / "a.jsonl")
    assert (first, last) == ("one", "three")
    assert bad.startswith(f"line 2: {BAD[line]}")


@pytest.mark.parametrize(("content", "reason"), [(b"", "empty document"), (b"\xe4", "not UTF-8 (byte 1: 0xe4)")])
def test_a_bad_text_file_is_named(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert texts(tmp_path / "a.txt") == [f": {reason}"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_breaks_off_gives_what_came_before(suffix: str, tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % (number * 7919 % 10007) for number in range(60_000))
    content = COMPRESS[suffix](lines)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(content[: len(content) * 9 // 10])
    *before, after = texts(tmp_path / f"a.jsonl{suffix}")
    if suffix == ".zst":  # a frame without its end is an end of file to zstandard: a torn last line is what shows
        assert "broken JSON" in after
    else:
        assert "can't be read further" in after
        assert after.startswith("after line ")
    assert len(before) > 1000
    assert before[-1] == str((len(before) - 1) * 7919 % 10007)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_is_not_what_its_name_says(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"something else entirely")
    (only,) = texts(tmp_path / name)
    assert only.startswith(": can't be read further (")


def test_files_in_order_and_folders_sorted(tmp_path: Path) -> None:
    for name in ("z.txt", "b/2.jsonl", "b/1.jsonl.zst", "b/c/0.parquet", "b/readme.pdf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_files([tmp_path / "z.txt", tmp_path / "b"])
    assert [str(file.relative_to(tmp_path)) for file in found] == [
        "z.txt",
        "b/1.jsonl.zst",
        "b/2.jsonl",
        "b/c/0.parquet",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "missing.txt: no such file"),
        ("a.pdf", "a.pdf: what is in it is not known from its name; known: .txt, .md, .jsonl"),
        ("a.parquet.gz", "a.parquet.gz: what is in it is not known"),
        ("empty", "empty: no file of a known kind in it"),
    ],
)
def test_what_cannot_be_read_is_refused_at_once(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    (tmp_path / "a.parquet.gz").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=message):
        find_files([tmp_path / name])


@pytest.mark.parametrize(("suffix", "module"), [(".jsonl.zst", "zstandard"), (".parquet", "pyarrow")])
def test_a_missing_library_is_named_before_work_begins(suffix, module, tmp_path, monkeypatch) -> None:
    (tmp_path / f"a{suffix}").touch()
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(UsageError, match=rf"a{suffix}: needs the library {module}, .*megatron-attn2d\[data\]"):
        find_files([tmp_path / f"a{suffix}"])
