"""The benchmark of all kinds of attention: on CPU ranks, the documents that it packs, and what it asks of others."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> Any:
    """A module of benchmarks/."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def test_every_kind_is_timed_in_every_mode(tmp_path: Path) -> None:
    kinds = ["packed", "sink"]
    sizes = ["--device", "cpu", "--ranks", "2", "--repeats", "1", "--warmup", "1", "--kinds", *kinds]
    modes = ["--grids", "2x1", "--modes", "te:p2p", "ring", "attention2d"]
    command = [sys.executable, "benchmarks/benchmark_attention.py", "--out", str(tmp_path), *sizes, *modes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    refused, rows = rows[::3], [row for row in rows if row["mode"] != "te:p2p"]
    assert {row["failed"] for row in refused} == {"No module named 'transformer_engine' (rank 0)"}
    assert [row["mode"] for row in rows] == ["ring", "attention2d 2x1"] * len(refused)
    families = list(dict.fromkeys(row["kind"]["family"] for row in rows))
    assert families == kinds
    for row in rows:
        assert row["ms"] > 0, row
        assert row["alone_ms"] >= row["host_forward_ms"] > 0, row
        assert row["host_backward_ms"] > 0
        assert row["apart"] < 1e-6
        assert ("host_new_ms" in row) == (row["kind"]["documents"] > 1)
    table = (tmp_path / "attention.md").read_text()
    for said in (
        "| ring | R x C |",
        "| 16 documents with padding |",
        "| window 2, sink, 128, 4/2 x 8 |",
        "x ring (2x1) |",
    ):
        assert said in table
    assert (tmp_path / "attention.png").stat().st_size > 10_000
    assert done.stdout.count("(new documents") == sum(row["kind"]["documents"] > 1 for row in rows)


@pytest.mark.parametrize("ranks", [1, 3, 4, 8])
@pytest.mark.parametrize("documents", [1, 16, 64, 1024])
@pytest.mark.parametrize("padded", [False, True])
def test_documents_fill_a_pack_many_short_and_a_few_long(ranks: int, documents: int, padded: bool) -> None:
    kinds = script("attention_kinds")
    kind = kinds.Kind("packed", 2**16, 12, 12, documents=documents, padded=padded).for_ranks(ranks)
    pack, again, other = (kind.pack(ranks, seed) for seed in (0, 0, 1))
    assert pack == again
    assert documents == 1 or pack != other
    assert pack.cu_seqlens_padded[-1] == sum(pack.places) == kind.seq
    assert len(pack.places) == documents
    assert all(place % (2 * ranks) == 0 for place in pack.places)
    assert all(0 < length <= place for length, place in zip(pack.lengths, pack.places, strict=True))
    if not padded or documents > 1:
        assert (pack.lengths == pack.places) != padded
    if documents >= 64:
        longest = sorted(pack.places, reverse=True)[: documents // 10]
        assert 0.35 < sum(longest) / kind.seq < 0.75


def test_sizes_are_replaced_and_fit_the_ranks() -> None:
    kinds = script("attention_kinds")
    assert kinds.choose(None) == list(kinds.KINDS)
    dense = kinds.choose(["dense"], seq=[1000, 2000], heads=["8/2"])
    assert [(k.seq, k.heads, k.kv_heads, k.head_dim) for k in dense] == [(1000, 8, 2, 128), (2000, 8, 2, 128)]
    assert [k.documents for k in kinds.choose(["packed"], documents=[2, 3])] == [2, 3]
    assert dense[0].for_ranks(3).seq == 996
    assert kinds.choose(["packed"], seq=[64], documents=[16])[0].for_ranks(8) is None  # 16 tokens each at least
    with pytest.raises(ValueError, match="only packs have documents, choose --kinds packed"):
        kinds.choose(["window"], documents=[4])


@pytest.mark.parametrize(
    ("ranks", "heads", "names"),
    [
        (1, (12, 12), ["1x1"]),
        (2, (12, 12), ["2x1", "1x2", "2x1x1"]),
        (4, (12, 12), ["4x1", "2x2", "4x1x1", "2x2x1"]),
        (4, (16, 2), ["4x1", "2x2", "4x1x1", "2x2x1"]),
        (8, (12, 12), ["8x1", "4x2", "2x4x1"]),  # 12 heads don't go over eight ranks
        (3, (16, 4), ["3x1", "1x3"]),
    ],
)
def test_grids_by_default(ranks: int, heads: tuple[int, int], names: list[str]) -> None:
    assert [str(shape) for shape in script("attention_modes").default_shapes(ranks, *heads)] == names
    assert script("attention_section").gpus(ranks).ranks_per_node == ranks


class Stub(torch.nn.Module):
    """Stands for Transformer Engine's module: remembers what it was asked."""

    asked: dict[str, Any]

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__()
        Stub.asked = {"sizes": sizes, **options}

    def set_context_parallel_group(self, group: Any, ranks: list[int], stream: Any, kind: str) -> None:
        Stub.asked |= {"ranks": ranks, "comm": kind}

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **packed: Any) -> torch.Tensor:
        Stub.asked |= {**packed, "sink": getattr(self, "softmax_offset", None)}
        return v.repeat_interleave(q.size(-2) // v.size(-2), -2).flatten(-2)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("dense", {"sizes": (12, (128, 128)), "num_gqa_groups": 12, "attn_mask_type": "causal", "window_size": None}),
        ("packed", {"qkv_format": "thd", "attn_mask_type": "padding_causal", "pad_between_seqs": False}),
        ("window", {"window_size": (4095, 0), "attn_mask_type": "causal"}),
        ("sink", {"softmax_type": "learnable", "num_gqa_groups": 8, "window_size": (127, 0)}),
        ("dropout", {"attention_dropout": 0.1, "softmax_type": "vanilla"}),
        ("mla", {"sizes": (16, (192, 128))}),
        ("bidirectional", {"attn_mask_type": "no_mask"}),
    ],
)
def test_what_transformer_engine_is_asked(monkeypatch: pytest.MonkeyPatch, family: str, expected: Any) -> None:
    engine = ModuleType("transformer_engine.pytorch")
    engine.DotProductAttention = Stub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    kinds, modes = script("attention_kinds"), script("attention_modes")
    kind = kinds.choose([family])[0]
    packs = [pack] if (pack := kind.pack(4)) else []
    (attention,) = modes.build("te:all_gather", kind, 4, "cpu", {}, packs)
    q, k, v = (
        torch.zeros(8, n, d) for n, d in zip((kind.heads, kind.kv_heads, kind.kv_heads), (192, 192, 128), strict=True)
    )
    sink = [torch.nn.Parameter(torch.zeros(64))] if kind.sink else []
    assert attention(q, k, v, *sink).shape == (8, kind.heads, 128)
    found = Stub.asked
    assert found["comm"] == "all_gather"
    assert {key: found[key] for key in expected} == expected
    assert found["sink"] is (sink[0] if sink else None)
    if packs:
        assert found["cu_seqlens_q"].tolist() == packs[0].cu_seqlens
        assert found["cu_seqlens_q"] is found["cu_seqlens_kv_padded"]  # so that it knows of no padding
        assert found["max_seqlen_kv"] == max(packs[0].places)
