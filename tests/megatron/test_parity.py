"""Training is the same however it is spread: every mode and size gives the losses of one rank."""

from pathlib import Path
from typing import Any

import pytest

from tests.megatron.runs import context_parallel, train
from tests.pool import RankPool

TOLERANCE = 1e-5

TENSOR = {"tensor_model_parallel_size": 2}
SEQUENCE = {"sequence_parallel": True}
PIPELINE = {"pipeline_model_parallel_size": 2}

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "ring 2": (2, context_parallel("p2p", 1, 2)),
    "ring 4": (4, context_parallel("p2p", 1, 4)),
    "all_gather 2": (2, context_parallel("all_gather", 2, 1)),
    "all_gather 4": (4, context_parallel("all_gather", 4, 1)),
    "attention2d 1x2": (2, context_parallel("attention2d", 1, 2)),
    "attention2d 2x1": (2, context_parallel("attention2d", 2, 1)),
    "attention2d 1x4": (4, context_parallel("attention2d", 1, 4)),
    "attention2d 2x2": (4, context_parallel("attention2d", 2, 2)),
    "attention2d 4x1": (4, context_parallel("attention2d", 4, 1)),
    "TP2": (2, TENSOR),
    "TP2 with sequence parallelism": (2, {**TENSOR, **SEQUENCE}),
    "PP2": (2, PIPELINE),
    "PP2 with 2 virtual stages": (2, {**PIPELINE, "num_layers_per_virtual_pipeline_stage": 1}),
    "DP2": (2, {}),
    "TP2 x PP2 x attention2d 1x2": (8, {**TENSOR, **SEQUENCE, **PIPELINE, **context_parallel("attention2d", 1, 2)}),
    "PP2 x attention2d 2x2": (8, {**PIPELINE, **context_parallel("attention2d", 2, 2)}),
    "DP2 x attention2d 2x1": (4, context_parallel("attention2d", 2, 1)),
}


@pytest.fixture(scope="module")
def expected(pool: RankPool, text: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The steps of one rank."""
    steps = train(pool, 1, tmp_path_factory.mktemp("one-rank"), data_path=text, load=start)
    assert steps[0]["loss"] - steps[-1]["loss"] > 0.5, "it should learn within ten steps, or parity says little"
    return steps


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradient_norms_equal_those_of_one_rank(
    case: str, pool: RankPool, text: Path, start: Path, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    nranks, options = CASES[case]
    steps = train(pool, nranks, tmp_path, data_path=text, load=start, **options)
    assert [step["step"] for step in steps] == list(range(2, 12))
    for step, reference in zip(steps, expected, strict=True):
        assert step["loss"] == pytest.approx(reference["loss"], abs=TOLERANCE)
        assert step["grad_norm"] == pytest.approx(reference["grad_norm"], rel=10 * TOLERANCE)
