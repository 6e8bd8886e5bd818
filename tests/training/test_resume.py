"""Checkpoints where nothing changes: a resumed run is exact. Where something does: `test_interchange.py`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron.runs import context_parallel, metrics, train_states
from tests.pool import RankPool

EXACT: dict[str, tuple[int, dict[str, Any]]] = {
    "attention2d 2x1, dropout, documents": (
        2,
        {**context_parallel("attention2d", 2, 1), "hidden_dropout": 0.1, "document_multiple": 4},
    ),
    "DP2, distributed optimizer, dropout": (2, {"use_distributed_optimizer": True, "hidden_dropout": 0.1}),
    "TP2, bf16": (2, {"tensor_model_parallel_size": 2, "bf16": True, "use_distributed_optimizer": True}),
}


def losses(steps: list[dict[str, Any]]) -> list[float]:
    return [step["loss"] for step in steps]


@pytest.mark.parametrize("case", EXACT)
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(
    case: str, pool: RankPool, text: Path, tmp_path: Path
) -> None:
    nranks, options = EXACT[case]
    assert_resumes(pool, nranks, tmp_path, data_path=text, train_iters=6, **options)


def test_sigterm_saves_and_the_resumed_run_equals_the_undisturbed_one_bit_for_bit(
    pool: RankPool, text: Path, tmp_path: Path
) -> None:
    options = {
        **context_parallel("attention2d", 1, 2),
        "hidden_dropout": 0.1,
        "data_path": text,
        "train_iters": 6,
        "exit_signal_handler": True,
    }
    expected = train_states(pool, 2, tmp_path / "undisturbed", **options)
    checkpoint = tmp_path / "checkpoint"
    train_states(pool, 2, tmp_path / "run", sigterm_at=4, save=checkpoint, **options)
    recorded = metrics(tmp_path / "run")
    assert len(recorded) == 4
    assert (checkpoint / "latest_checkpointed_iteration.txt").read_text() == "4"
    actual = train_states(pool, 2, tmp_path / "run", load=checkpoint, **options)
    assert metrics(tmp_path / "run")[:4] == recorded, "the run began anew"
    assert_equal_states(actual, expected)


def assert_resumes(pool: RankPool, nranks: int, directory: Path, *, train_iters: int, **options: Any) -> None:
    """Asserts that a run stopped and resumed half-way equals an undisturbed one: losses, weights and all states."""
    options = {**options, "train_iters": train_iters}
    expected = train_states(pool, nranks, directory / "undisturbed", **options)
    checkpoint = directory / "checkpoint"
    train_states(pool, nranks, directory / "run", save=checkpoint, exit_interval=train_iters // 2, **options)
    recorded = metrics(directory / "run")
    assert len(recorded) == train_iters // 2
    actual = train_states(pool, nranks, directory / "run", load=checkpoint, **options)
    assert metrics(directory / "run")[: len(recorded)] == recorded, "the run began anew"
    assert_equal_states(actual, expected)
    assert losses(metrics(directory / "run")) == losses(metrics(directory / "undisturbed"))


def assert_equal_states(actual: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    for rank, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.keys() == other.keys()
        assert any(name.endswith("exp_avg_sq") for name in one)
        differing = [name for name in one if not torch.equal(one[name], other[name])]
        assert not differing, f"rank {rank}"
