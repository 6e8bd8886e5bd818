"""The emulated cluster: bytes by the kernel's counters against the plan, and nothing left behind, whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
THRESHOLD = Path("/proc/sys/net/ipv4/neigh/default/gc_thresh1")

can_emulate = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None,
    reason="network namespaces need root, iproute2 and tc",
)


def python(code_or_script: list[str], timeout: float = 200.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *code_or_script], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def namespaces() -> set[str]:
    return (
        {name for name in os.listdir("/run/netns") if name.startswith("attn2d-")}
        if Path("/run/netns").exists()
        else set()
    )


@can_emulate
def test_cards_receive_what_the_plan_lists(tmp_path: Path) -> None:
    before, threshold = namespaces(), THRESHOLD.read_text()
    size = ["--hosts", "4", "--ranks-per-host", "2", "--seq", "256", "--shapes", "16/16x64", "--nic", "100mbit"]
    modes = ["--modes", "ring", "2x4", "4x2:2x1", "2x2x2", "--documents", "0", "5", "--timeout", "150"]
    done = python(["benchmarks/benchmark_emulated_cluster.py", *size, *modes, "--json", str(tmp_path / "rows.json")])
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["mode"] for row in rows] == ["ring", "2x4", "4x2:2x1", "2x2x2"] * 2
    assert [row["documents"] for row in rows] == [0] * 4 + [5] * 4
    assert "S=256, 5 documents, heads 16/16x64" in done.stdout
    for row in rows:
        for side in ("forward", "backward"):
            plan = row[f"{side}_plan_u"]
            # Gloo announces each message in a packet of its own, which counts for more where messages are small.
            assert plan <= row[f"{side}_payload_u"] <= 1.02 * plan, row
            assert row[f"{side}_payload_u"] < row[f"{side}_u"] <= 1.05 * plan, row
    assert namespaces() == before
    assert THRESHOLD.read_text() == threshold


@can_emulate
def test_a_failing_rank_is_named_and_nothing_is_left() -> None:
    before = namespaces()
    code = """
import sys
sys.path.insert(0, "benchmarks")
from emulated_cluster import EmulatedCluster

def fail(rank):
    if rank == 1:
        raise ArithmeticError("planted")
    import time
    time.sleep(60)

with EmulatedCluster(2, "100mbit") as cluster:
    cluster.run(fail, 1, timeout=50)
"""
    done = python(["-c", code])
    assert done.returncode != 0
    assert "rank 1:" in done.stderr
    assert "ArithmeticError: planted" in done.stderr
    assert namespaces() == before


@can_emulate
def test_a_terminated_run_leaves_nothing() -> None:
    before = namespaces()
    script = ["benchmarks/benchmark_emulated_cluster.py", "--hosts", "2", "--seq", "65536", "--timeout", "100"]
    process = subprocess.Popen([sys.executable, "-W", "ignore", *script], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(namespaces() - before) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(namespaces() - before) == 3, "two hosts and the switch"
    process.terminate()
    assert process.wait(30) != 0
    assert namespaces() == before


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from emulated_cluster import EmulatedCluster

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionError, match="run as root"):
        EmulatedCluster(2, "50mbit")
