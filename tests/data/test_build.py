"""Data sets: what is in them, what is left out, and that they are whole or not there."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_attn2d.config.prefixes import is_complete
from megatron_attn2d.data.build import build
from megatron_attn2d.data.inspect import open_indexed, report
from megatron_attn2d.data.tokenizers import TokenizerChoice, load
from megatron_attn2d.errors import UsageError

BYTES = TokenizerChoice()


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents(prefix: Path) -> list[np.ndarray]:
    indexed = open_indexed(prefix)
    bounds = indexed.document_indices
    return [np.concatenate(indexed[int(a) : int(b)]) for a, b in itertools.pairwise(bounds)]


def test_documents_keep_their_order(choice: TokenizerChoice, tmp_path: Path) -> None:
    texts = [f"document {number} " * (1 + number % 40) for number in range(1500)]  # more than one batch
    files = [write_lines(tmp_path / "a.jsonl", texts[:1400]), write_lines(tmp_path / "b.jsonl", texts[1400:])]
    built = build(files, tmp_path / "out" / "set", choice, processes=2)
    tokenizer = load(choice)
    found = documents(tmp_path / "out" / "set")
    assert [tokenizer.decode(ids[:-1]) for ids in found] == texts
    assert all(ids[-1] == tokenizer.eod for ids in found)
    assert (built.documents, built.tokens, built.skipped) == (1500, sum(map(len, found)), {})
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["set.bin", "set.idx", "set.idx.sha256", "set.json"]


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    files = [write_lines(tmp_path / f"{n}.jsonl", [f"{n} {m}" * (m % 90 + 1) for m in range(2500)]) for n in range(3)]
    for processes in (1, 3):
        build(files, tmp_path / f"set{processes}", BYTES, processes=processes)
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"set1{suffix}").read_bytes() == (tmp_path / f"set3{suffix}").read_bytes()


BAD_LINES = '{"text": "one"}\n{"text": \n\n{"text": ""}\n{"text": "five"}\n{"body": 6}\n{"body": 7}\n'


def test_bad_documents_are_left_out_and_counted_as_asked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(BAD_LINES)
    console = io.StringIO()
    built = build([tmp_path / "a.jsonl"], tmp_path / "set", BYTES, on_bad="skip", console=console)
    assert [bytes(ids[:-1].tolist()) for ids in documents(tmp_path / "set")] == [b"one", b"five"]
    reasons = {"broken JSON": 1, "blank line": 1, "empty document": 1, "no key 'text'": 2}
    assert built.skipped == json.loads((tmp_path / "set.json").read_text())["skipped"] == reasons
    assert f"left out {tmp_path / 'a.jsonl'}, line 2: broken JSON (" in console.getvalue()


def test_after_twenty_bad_documents_the_rest_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + "\n" * 23)
    console = io.StringIO()
    built = build([tmp_path / "a.jsonl"], tmp_path / "set", BYTES, on_bad="skip", console=console)
    assert built.skipped == {"blank line": 23}
    assert console.getvalue().count("blank line") == 20
    assert console.getvalue().endswith("left out more than 20: the others are only counted\n")


def test_a_bad_document_is_fatal_otherwise_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(BAD_LINES)
    with pytest.raises(UsageError, match=r"a\.jsonl, line 2: broken JSON"):
        build([tmp_path / "a.jsonl"], tmp_path / "out" / "set", BYTES)
    assert not list((tmp_path / "out").iterdir())


def test_a_set_of_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match="2 were left out, and none remained"):
        build([tmp_path / "a.jsonl"], tmp_path / "set", BYTES, on_bad="skip")


def test_a_set_is_only_replaced_when_asked(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write_lines(tmp_path / f"{text}.jsonl", [text])
    build([tmp_path / "old.jsonl"], tmp_path / "set", BYTES)
    with pytest.raises(UsageError, match="a data set of that name is there; --overwrite replaces it"):
        build([tmp_path / "new.jsonl"], tmp_path / "set", BYTES)
    assert bytes(documents(tmp_path / "set")[0][:-1].tolist()) == b"old"
    build([tmp_path / "new.jsonl"], tmp_path / "set", BYTES, overwrite=True)
    assert bytes(documents(tmp_path / "set")[0][:-1].tolist()) == b"new"


SLOW_BUILD = """
import sys, time
from pathlib import Path
from megatron_attn2d.data import build, tokenizing
tokenize = tokenizing._tokenize
def slowly(*args):
    Path(sys.argv[1], "begun").touch()
    time.sleep(0.3)
    return tokenize(*args)
tokenizing._tokenize = slowly
tokenizing._BATCH_DOCUMENTS = 5
build.build([Path(sys.argv[1], "a.jsonl")], Path(sys.argv[1], "out", "set"), build.TokenizerChoice(), processes=2)
"""


def test_a_killed_build_leaves_no_set_and_the_next_removes_its_rest(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [f"document {number}" for number in range(1000)])
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW_BUILD, tmp_path], stderr=subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "begun").exists)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert len(children) == 2
    wait_until(lambda: not any(alive(int(child)) for child in children))
    assert not is_complete(out / "set")
    assert [path.suffix for path in out.iterdir()] == [".partial"]
    build([tmp_path / "a.jsonl"], out / "set", BYTES)
    assert sorted(path.name for path in out.iterdir()) == ["set.bin", "set.idx", "set.idx.sha256", "set.json"]
    assert len(documents(out / "set")) == 1000


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_the_folder_of_a_build_at_work_is_left_alone(tmp_path: Path) -> None:
    import fcntl

    from megatron_attn2d.data.build import _scratch

    with _scratch(tmp_path / "set") as first, _scratch(tmp_path / "set") as second:
        assert first != second
        assert first.exists()
        with (first / "lock").open("r+") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not list(tmp_path.iterdir())


# --- inspect ---


def test_a_report_says_how_much_and_decodes(choice: TokenizerChoice, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["first document", "second document", "third " * 50])
    build([tmp_path / "a.jsonl"], tmp_path / "set", choice)
    lines = list(report(tmp_path / "set", document=1))
    ids = documents(tmp_path / "set")[1]
    total = sum(map(len, documents(tmp_path / "set")))
    assert lines[0] == f"{tmp_path / 'set'}: 3 documents, {total:,} tokens of uint16"
    assert lines[2].startswith("documents by tokens")
    assert lines[-4:-1] == [
        f"tokenizer: {choice.kind} {choice.model or ''}".rstrip(),
        f"document 1, tokens 0 to {len(ids) - 1} of {len(ids)}:",
        " ".join(map(str, ids.tolist())),
    ]
    assert lines[-1].startswith("second document")
    assert len(list(report(tmp_path / "set", document=2, tokens=4))[-2].split()) == 4


def test_a_set_of_others_has_no_tokenizer_until_one_is_named(tmp_path: Path) -> None:
    build([write_lines(tmp_path / "a.jsonl", ["text"])], tmp_path / "set", BYTES)
    (tmp_path / "set.json").unlink()
    assert "tokenizer: not known (no .json beside it); name one to decode" in list(report(tmp_path / "set"))
    assert list(report(tmp_path / "set", BYTES))[-1] == "text<end of document>"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda prefix: prefix.with_name("set.idx").unlink(), "no data set: .*set.bin and .*set.idx make one"),
        (lambda prefix: prefix.with_name("set.idx").write_bytes(b"x" * 99), "set.idx: not an index of Megatron's"),
        (lambda prefix: prefix.with_name("set.json").write_text("{"), "set.json: not a description of a data set"),
    ],
)
def test_what_is_no_data_set_is_refused(spoil, message: str, tmp_path: Path) -> None:
    build([write_lines(tmp_path / "a.jsonl", ["text"])], tmp_path / "set", BYTES)
    spoil(tmp_path / "set")
    with pytest.raises(UsageError, match=message):
        list(report(tmp_path / "set"))


def test_a_document_that_is_not_there_is_refused(tmp_path: Path) -> None:
    build([write_lines(tmp_path / "a.jsonl", ["text"])], tmp_path / "set", BYTES)
    with pytest.raises(UsageError, match="document 1: there are 1, from 0"):
        list(report(tmp_path / "set", document=1))
