"""What can be known of check_cuda_graphs.py and of the benchmark's table without a GPU: runs are valid, rows tell."""

from __future__ import annotations

import argparse
import math
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_attn2d.config.arguments import megatron_arguments
from megatron_attn2d.config.read import load_run
from megatron_attn2d.data import matching
from megatron_attn2d.megatron.upstream.quiet_imports import indexed_dataset
from megatron_attn2d.training.derive import derived_arguments
from tests.benchmarks.test_benchmark_multi_gpu import script
from tests.megatron.documents import build
from tests.training.test_derive import FULL


class AtOnce:
    """An executor that runs what it is given, and then returns."""

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Prefixes of texts and of examples."""
    folder = tmp_path_factory.mktemp("data")
    texts, examples = (build(folder / name, [np.arange(8)]) for name in ("texts", "examples"))
    examples.with_suffix(".loss").write_bytes(bytes(8))
    return str(texts), str(examples)


@pytest.mark.parametrize(("ranks", "quick", "most"), [(1, False, 24), (2, True, 7), (2, False, 54), (4, False, 80)])
def test_all_runs_are_valid(
    monkeypatch: pytest.MonkeyPatch, data: tuple[str, str], ranks: int, quick: bool, most: int
) -> None:
    check, asked = script("check_cuda_graphs"), []

    def run(yaml: Any, world: int, overrides: list[str], *_: Any, **__: Any) -> list[dict[str, float]]:
        asked.append(overrides)
        run = load_run(yaml, [*overrides, "run.dir=/tmp/none"], world_size=world)
        matching.check_data(run)
        arguments = megatron_arguments(run)
        derived_arguments(arguments, FULL)
        if "data.document_masking=true" in overrides:  # also a single rank cuts documents into two chunks
            assert arguments[arguments.index("--document-multiple") + 1] == str(2 * run.context_parallel.size)
        return [{"step": i, "loss": 1.0, "grad_norm": 1.0} for i in range(200)]

    monkeypatch.setattr(check, "run", run)
    args = argparse.Namespace(ranks=ranks, quick=quick, nodes=quick, only=[""], timeout=1.0, end=math.inf)
    args.texts, args.examples = data
    found = check.checks(args, AtOnce())
    assert len(found) <= most
    for label, one in found.items():
        if not label.startswith("SIGTERM"):
            one()
    assert any("training.cuda_graphs=layer" in overrides for overrides in asked)


def test_texts_are_documents_that_fit_the_bins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check = script("check_cuda_graphs")
    sizes = [1, 31, 32, 300, 511, 512, 9000]  # bytes; the end of a document is one token more
    given = [{"prompt": "p", "completion": "c" * (size - 1)} for size in sizes]
    monkeypatch.setattr(check.docstrings, "examples", lambda: iter(given))
    prefix = check.short_texts(tmp_path)
    assert not prefix.with_suffix(".loss").exists()
    assert indexed_dataset().IndexedDataset(str(prefix)).sequence_lengths.tolist() == [33, 301, 512]
    seq, bins = (int(key.split("=")[1]) for key in (*(x for x in check.TINY if "seq_length" in x), check.BINS))
    assert bins >= seq // check.SHORTEST + 2  # a sample may begin and end with a piece of a document


def test_steps_that_differ_are_told() -> None:
    check = script("check_cuda_graphs")
    steps = [{"step": i, "loss": 2.0, "grad_norm": 1.0} for i in range(3)]
    assert check.same(steps, steps) == "3 steps, bit by bit"
    with pytest.raises(AssertionError, match="grad_norm of step 2 is"):
        check.same([*steps[:2], {**steps[2], "grad_norm": 1.5}], steps)


PRINTED = """exit code 1
INFO:megatron.core:building GPT model
ValueError: of a library that was tried and left alone
rank 1 of 2 failed; the other ranks were stopped
Traceback (most recent call last):
  File "x.py", line 3, in forward
torch.AcceleratorError: CUDA error: operation not permitted when stream is capturing

During handling of the above exception, another exception occurred:
RuntimeError: capture is broken
"""


@pytest.mark.parametrize(
    ("printed", "first", "last"),
    [
        (PRINTED, "torch.AcceleratorError: CUDA error: operation", '  File "x.py", line 3, in forward'),
        ("ended after 90 s\n" + "INFO x\n" * 9 + "step\n" * 99 + "the end", "ended after 90 s", "the end"),
        ("", "", ""),
    ],
)
def test_a_failure_begins_with_its_error(printed: str, first: str, last: str) -> None:
    lines = script("watched").brief(printed).splitlines() or [""]
    assert lines[0].startswith(first)
    assert lines[-1] == last
    assert len(lines) <= 15
    assert not any("INFO" in line for line in lines)


def test_rows_of_training_are_told_against_their_own_and_the_ring() -> None:
    training = script("benchmark_training")
    cases = [training.Case(mode, graphs, "none") for mode in ("ring", "attention2d") for graphs in ("none", "layer")]
    found = {}
    for case, rate in zip(cases, (100.0, 150.0, 80.0, 160.0), strict=True):
        found[case] = [{"loss": 2.0 + 0.02 * (rate == 160), "tokens_per_s": rate}] * 8
    rows = [training.row(8192, case, found, cases) for case in cases]
    assert "1.000x own   1.000x ring" in rows[0]
    assert "attention2d, graphs layer" in rows[3]
    assert "2.000x own   1.067x ring" in rows[3]
    assert rows[3].endswith("apart 1.0e-02")
