"""The benchmark of several GPUs on CPU ranks: what it measures, says of what it could not, and leaves behind."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from megatron_attn2d import ring_attention
from tests.pool import RankPool

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> Any:
    """A module of benchmarks/, in this process or a rank's."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def benchmark(out: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    command = [sys.executable, "benchmarks/benchmark_multi_gpu.py", "--out", str(out), "--device", "cpu", "--quick"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / "multi_gpu.json").read_text())


def test_measures_attention_on_nodes_beside_the_plan(tmp_path: Path) -> None:
    sizes = ["--ranks", "2", "--node-seq", "32", "--heads", "2/2", "--head-dim", "8"]
    printed, found = benchmark(tmp_path, *sizes, "--sections", "nodes")
    (section,) = found["sections"]
    assert section["name"] == "nodes-2x1"
    modes = [row["mode"] for row in section["rows"]]
    assert modes[0] == "ring"
    assert len(modes) == 3
    assert {mode.split()[1] for mode in modes[1:]} < {"2x1", "1x2", "2x1x1"}  # the best two
    for row in section["rows"]:
        assert row["ms"] > 0, row
        assert row["predicted_ms"] > 0
        assert row["apart"] < 1e-6
    assert section["links"]["between_bytes_per_s"] > 0
    assert (tmp_path / "multi_gpu.png").stat().st_size > 10_000
    assert printed.count("predicted") == 3


def test_training_is_told_against_the_ring_of_its_layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    training, asked = script("multi_gpu_training"), []

    def run(yaml: Path, ranks: int, overrides: list[str], timeout: float, **_: Any) -> list[dict[str, float]]:
        asked.append(given := dict(x.split("=") for x in overrides))
        ours, tensor = given["context_parallel.mode"] == "attention2d", given["parallelism.tensor"] == "2"
        if tensor and not ours:
            raise training.TrainingError("exit code 1\nTraceback\nOutOfMemoryError: CUDA\nmore")
        rate = 300.0 if ours else 200.0
        return [{"loss": 2.0 + 0.02 * ours, "tokens_per_s": rate, "mfu": 0.4, "memory_gib": i} for i in range(6)]

    monkeypatch.setattr(training, "run", run)
    args = argparse.Namespace(
        ranks=4,
        train_yaml=Path("x.yaml"),
        train_seq=64,
        train_steps=6,
        device="cuda",
        quick=False,
        overrides=[],
        out=tmp_path,
    )
    found: dict[str, Any] = {"training": []}
    training.train(args, time.time() + 100, found)
    ring, ours, out_of_memory, alone = found["training"]
    assert [(r["tensor"], r["context"], r["data"]) for r in found["training"][::2]] == [(1, 4, 1), (2, 2, 1)]
    assert (ring["tokens_per_s"], ours["tokens_per_s"], ours["mfu"], ours["memory_gib"]) == (200, 300, 0.4, 5)
    assert ours["apart"] == pytest.approx(0.01)
    assert ours["losses"] == [2.02] * 6
    assert out_of_memory["failed"] == "exit code 1: OutOfMemoryError: CUDA"
    assert (alone["tokens_per_s"], alone["against_ring"]) == (300, False)
    sizes = {(given["training.global_batch_size"], given["parallelism.sequence_parallel"]) for given in asked}
    assert sizes == {("1", "false"), ("1", "true")}
    assert {given["optimizer.lr_warmup_iters"] for given in asked} == {"3"}  # its first steps would amplify rounding
    args.ranks, found = 8, {"training": []}
    training.train(args, time.time() + 100, found)
    layouts = [(r["tensor"], r["context"], r["data"]) for r in found["training"][::2]]
    assert layouts == [(1, 8, 1), (2, 4, 1), (1, 4, 2)]
    assert asked[-1]["training.global_batch_size"] == "2"
    args.quick, found = True, {"training": []}
    training.train(args, time.time() + 100, found)
    assert [(r["context"], r["mode"]) for r in found["training"]] == [(8, "ring"), (8, "attention2d")]


@pytest.mark.parametrize(
    ("nodes", "timeout", "said"),
    [
        (False, 60.0, "exit code 2\n.*model.nonsense: unknown key"),
        (True, 60.0, "exit code 2\n.*model.nonsense: unknown key"),
        (True, 0.2, "ended after 0 s, 0 steps"),
    ],
)
def test_a_run_of_training_that_fails_says_how(nodes: bool, timeout: float, said: str) -> None:
    training = script("training_run")
    with pytest.raises(training.TrainingError, match=said):
        training.run(
            ROOT / "configs/runs/quickstart.yaml", 2, ["model.nonsense=1"], timeout, torchrun=False, nodes=nodes
        )


def test_says_what_time_did_not_suffice_for(tmp_path: Path) -> None:
    sizes = ["--ranks", "2", "--node-seq", "32", "--heads", "2/2", "--budget", "0.5"]
    printed, found = benchmark(tmp_path, *sizes)
    rows = [*found["sections"][0]["rows"], *found["training"]]
    assert [row["failed"] for row in rows] == ["not run: out of time"] * 5
    assert printed.count("not run: out of time") == 5
    assert (tmp_path / "multi_gpu.png").exists()


# Ends case 0, hangs in case 1 with a child in a session of its own, exits in case 2, ends case 3 and does not exit.
STUB = """
import json, subprocess, sys, time
rows, first = open(sys.argv[1], "a", buffering=1), int(sys.argv[2])
say = lambda **what: rows.write(json.dumps(what) + "\\n")
for i in range(first, 4):
    say(begin=i)
    if i == 1:
        child = subprocess.Popen(["sleep", "60"], start_new_session=True)
        say(child=child.pid)
        time.sleep(60)
    if i == 2:
        raise RuntimeError("ncclSystemError")
    say(end=i, ms=1.0)
time.sleep(60)
"""


def test_a_case_that_hangs_or_ends_its_ranks_costs_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "stub.py").write_text(STUB)
    rows, told = tmp_path / "rows.jsonl", []
    command = [sys.executable, str(tmp_path / "stub.py"), str(rows)]
    begin = time.time()
    script("watched").Watched(command, rows, tmp_path / "log", 20.0, 1.0, begin + 60).run(4, told.append)
    ended = {line["end"]: line for line in told if "end" in line}
    assert (ended[0].get("ms"), ended[3].get("ms")) == (1.0, 1.0)
    assert ended[1]["failed"] == "hung: nothing for 1 s"
    assert ended[2]["failed"] == "ranks ended with 1: RuntimeError: ncclSystemError"
    assert time.time() - begin < 20
    (child,) = (line["child"] for line in told if "child" in line)
    assert gone(child)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_command_ends_in_time_with_its_children() -> None:
    def watched(seconds: int, words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "benchmarks/watched.py", str(seconds), "bash", "-c", words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)

    assert watched(50, "exit 3").returncode == 3
    ended = watched(2, "setsid sleep 60 & echo $!; wait")
    assert (ended.returncode, ended.stderr[:15]) == (124, "ended after 2 s")
    assert gone(int(ended.stdout))


def test_ranks_that_never_start_fail_all_cases_once(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    command = [sys.executable, "-c", "raise ImportError('no such library')"]
    watched = script("watched").Watched(command, tmp_path / "rows", tmp_path / "log", 20.0, 1.0, time.time() + 30)
    watched.run(2, told.append)
    assert [line["failed"] for line in told] == ["ranks ended with 1: ImportError: no such library"] * 2


def test_a_deadline_ends_what_has_begun(tmp_path: Path) -> None:
    (tmp_path / "stub.py").write_text(STUB)
    rows, told = tmp_path / "rows.jsonl", []
    command = [sys.executable, str(tmp_path / "stub.py"), str(rows)]
    script("watched").Watched(command, rows, tmp_path / "log", 20.0, 20.0, time.time() + 2).run(4, told.append)
    failed = [(line["end"], line["failed"]) for line in told if "failed" in line]
    assert failed == [(1, "stopped: out of time"), (2, "not run: out of time"), (3, "not run: out of time")]


@pytest.mark.parametrize(
    ("comm", "ranks", "heads", "reason"),
    [
        ("p2p", 8, (12, 12), None),
        ("all_gather", 8, (16, 2), None),
        ("a2a", 8, (12, 12), "12/12 heads don't divide by 8 ranks"),
        ("a2a", 8, (40, 40), None),
        ("a2a", 4, (16, 2), "16/2 heads don't divide by 4 ranks"),
        ("a2a+p2p:4", 8, (12, 12), None),
        ("a2a+p2p:4", 8, (16, 2), "16/2 heads don't divide by 4 ranks"),
        ("a2a+p2p:2", 2, (12, 12), "2 ranks have no a2a+p2p with a2a among 2"),
        ("a2a+p2p", 8, (16, 2), None),
    ],
)
def test_what_transformer_engine_can_run(comm: str, ranks: int, heads: tuple[int, int], reason: str | None) -> None:
    assert script("attention_modes").refusal(comm, ranks, *heads) == reason


@pytest.mark.parametrize("text", ["4x2", "2x2x2", "4x2:2x1", "2x4x2:2x2"])
def test_shapes_are_written_as_they_are_read(text: str) -> None:
    assert str(script("attention_modes").Shape.parse(text)) == text


def distances(rank: int) -> list[float]:
    """From a ring's results: its own, and those of an attention that forgets the mask."""
    ranks, kinds = script("attention_ranks"), script("attention_kinds")
    args = argparse.Namespace(ranks=2, device="cpu")
    *leaves, dout = ranks.inputs(kinds.Kind("dense", 32, 2, 2, head_dim=8, value_dim=8), args)
    leaves, known = [x.requires_grad_() for x in leaves], {}
    modes = [functools.partial(ring_attention, group=dist.group.WORLD, causal=causal) for causal in (True, True, False)]
    return [ranks.apart(mode, leaves, dout, "case", known) for mode in modes]


def test_another_attention_is_far_from_the_first_mode(pool: RankPool) -> None:
    for first, again, unmasked in pool.run(distances, 2):
        assert first == again == 0
        assert unmasked > 0.1


def hierarchical(rank: int, over_heads: int) -> list[list[int]]:
    groups = script("attention_modes").hierarchical_groups(over_heads)
    return [dist.get_process_group_ranks(group) for group in groups]


def test_the_groups_of_a2a_and_p2p(pool: RankPool) -> None:
    """Neighbours exchange heads, so a rank's place in the zigzag is its place in the ring times their number and on."""
    found = pool.run(hierarchical, 8, 4)
    for rank, (over_heads, ring) in enumerate(found):
        assert over_heads == [rank // 4 * 4 + i for i in range(4)]
        assert ring == [rank % 4, rank % 4 + 4]
