"""Scores by task, context and depth, of a model that knows some answers; what is told, drawn and written."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_attn2d.errors import UsageError
from megatron_attn2d.inference import long_context
from megatron_attn2d.inference.long_context import Progress, Request, duration, evaluate, table, write
from megatron_attn2d.inference.sampling import Sampling


class Bytes:
    """Tokens are bytes, after one that begins a text."""

    def encode(self, text: str, *, begins: bool) -> list[int]:
        return [256, *text.encode()] if begins else list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode()


class Oracle:
    """Finds the needle in the last `sees` bytes of a text, and counts what it was asked."""

    tokenizer = Bytes()

    def __init__(self, sees: int, replica: int = 0, meet: Callable[[dict[int, Any]], list[Any]] | None = None) -> None:
        self.sees, self.prefilled, self.asked = sees, 0, 0
        self.replica, self.replicas = replica, 2 if meet else 1
        self._meet = meet or (lambda found: [found])

    def gathered(self, found: dict[int, Any]) -> dict[int, Any]:
        return {place: one for part in self._meet(found) for place, one in part.items()}

    def check_length(self, tokens: int) -> None:
        if tokens > 5000:
            raise UsageError(f"{tokens:,} tokens do not fit")

    def prefill(self, prompts: list[list[int]], *, room: int) -> Any:
        assert prompts[0].count(256) == 1
        self.prefilled += 1
        return SimpleNamespace(text=self.tokenizer.decode(prompts[0]), room=room)

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, after: Any, shared: bool) -> list[Any]:
        (prompt,) = prompts
        assert not shared
        self.asked += 1
        assert 256 not in prompt
        assert len(prompt) + sampling.max_tokens <= after.room
        subject = self.tokenizer.decode(prompt).rpartition("Answer: ")[2].replace("are", "is")
        found = re.search(f"{subject} ([0-9]+)", after.text[-self.sees :])
        return [SimpleNamespace(text=f" {found[1]}." if found else " unknown")]


def request(tmp_path: Path, **changed: Any) -> Request:
    settings: dict[str, Any] = {
        **{"tasks": ("needle", "niah_multikey_2"), "contexts": (1000, 4000), "samples": 2, "depths": 3, "digits": 4},
        **{"seed": 0, "haystack": None, "questions": None, "data": None, "run_dir": Path("runs/mine"), "step": 7},
        **{"output": tmp_path / "scores.json", "picture": tmp_path / "scores.png"},
    }
    return Request(**settings | changed)


def test_scores_by_depth_and_context(tmp_path: Path) -> None:
    oracle, console = Oracle(sees=2500), io.StringIO()
    result = evaluate(oracle, request(tmp_path), console)  # type: ignore[arg-type]
    assert result["needle"] == {"depths": [0, 0.5, 1], "scores": [[1, 0], [1, 1], [1, 1]]}
    assert result["scores"]["needle"] == {"1000": 1, "4000": pytest.approx(2 / 3)}
    assert (oracle.prefilled, oracle.asked) == (16, 16)
    told = console.getvalue().splitlines()
    assert re.fullmatch(r"needle, 1,000 tokens at depth 0%: 100%  \(\d+%; about \d+ s left\)", told[0])
    assert told[-1].endswith("(100%)")
    write(result, request(tmp_path))
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    head, _, *rows = table(result).splitlines()
    assert head.split() == ["1,000", "4,000"]
    assert rows[0].split() == ["needle", "100.0", "66.7"]


def test_replicas_share_the_haystacks(tmp_path: Path) -> None:
    asked = request(tmp_path, samples=1, tasks=("needle",), contexts=(1000,))  # three: an odd number
    barrier = Barrier(2, timeout=60)
    parts: dict[int, Any] = {}
    results: dict[int, Any] = {}

    def run(replica: int) -> Oracle:
        def meet(found: dict[int, Any]) -> list[Any]:
            barrier.wait()
            parts[replica] = found
            barrier.wait()
            return list(parts.values())

        oracle = Oracle(2500, replica, meet)
        results[replica] = evaluate(oracle, asked, None)  # type: ignore[arg-type]
        return oracle

    with ThreadPoolExecutor() as threads:
        oracles = list(threads.map(run, range(2)))
    assert [oracle.prefilled for oracle in oracles] == [2, 1]
    alone = evaluate(Oracle(2500), asked, None)  # type: ignore[arg-type]
    assert results == {0: alone, 1: alone}


def test_questions_share_a_haystack(tmp_path: Path) -> None:
    oracle = Oracle(sees=10_000)
    book = long_context.Text(["Nothing happens here."])
    asked = request(tmp_path, tasks=("niah_multikey_1", "niah_multivalue"), haystack=book)
    result = evaluate(oracle, asked, None)  # type: ignore[arg-type]
    assert (oracle.prefilled, oracle.asked) == (8, 20)
    assert result["scores"]["niah_multikey_1"] == {"1000": 1, "4000": 1}
    assert result["needle"] is None
    assert "mean of RULER's 2" in table(result)


def test_what_is_too_long_is_told_before_anything_is_filled_in(tmp_path: Path) -> None:
    oracle = Oracle(sees=0)
    with pytest.raises(UsageError, match="6,000 tokens do not fit"):
        evaluate(oracle, request(tmp_path, contexts=(1000, 6000)), None)  # type: ignore[arg-type]
    assert oracle.prefilled == 0


def test_progress_is_told_now_and_then() -> None:
    console = io.StringIO()
    progress = Progress(console, 100)
    progress.add(10, "first", complete=False)
    progress.add(10, "second", complete=False)
    progress.add(80, "last", complete=True)
    assert [line.split()[0] for line in console.getvalue().splitlines()] == ["first", "last"]
    assert [duration(seconds) for seconds in (3.2, 600, 9000)] == ["3 s", "10 min", "2.5 h"]
