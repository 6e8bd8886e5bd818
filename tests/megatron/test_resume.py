"""Checkpoints: exact where nothing changes, and interchangeable between modes and sizes where something does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron.runs import context_parallel, metrics, train, train_states
from tests.pool import RankPool

RING = context_parallel("p2p", 1, 4)
GRID = context_parallel("attention2d", 2, 2)
SPREAD = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 2,
    **context_parallel("attention2d", 1, 2),
}

EXACT: dict[str, tuple[int, dict[str, Any]]] = {
    "attention2d 2x1, dropout": (2, {**context_parallel("attention2d", 2, 1), "hidden_dropout": 0.1}),
    "DP2, distributed optimizer, dropout": (2, {"use_distributed_optimizer": True, "hidden_dropout": 0.1}),
    "TP2, bf16": (2, {"tensor_model_parallel_size": 2, "bf16": True, "use_distributed_optimizer": True}),
}


def losses(steps: list[dict[str, Any]]) -> list[float]:
    return [step["loss"] for step in steps]


@pytest.mark.parametrize(("before", "after"), [(RING, GRID), (GRID, RING)], ids=["ring first", "attention2d first"])
def test_a_run_continues_in_another_mode(
    before: dict[str, Any], after: dict[str, Any], pool: RankPool, text: Path, start: Path, tmp_path: Path
) -> None:
    expected = train(pool, 1, tmp_path / "undisturbed", data_path=text, load=start, exit_interval=7)
    checkpoint = tmp_path / "checkpoint"
    train(pool, 4, tmp_path / "run", data_path=text, load=start, save=checkpoint, exit_interval=4, **before)
    steps = train(pool, 4, tmp_path / "run", data_path=text, load=checkpoint, exit_interval=7, **after)
    assert [step["step"] for step in steps] == [2, 3, 4, 5, 6, 7]
    assert losses(steps) == pytest.approx(losses(expected), abs=1e-5)


def test_a_run_with_the_distributed_optimizer_continues_on_other_sizes(
    pool: RankPool, text: Path, tmp_path: Path
) -> None:
    common = {"data_path": text, "use_distributed_optimizer": True, "train_iters": 9}
    saved, moved = tmp_path / "saved", tmp_path / "moved"
    expected = train(pool, 1, tmp_path / "one", save=saved, save_interval=3, **common)
    train(pool, 8, tmp_path / "run", load=saved, ckpt_step=3, save=moved, exit_interval=6, **common, **SPREAD)
    train(pool, 1, tmp_path / "run", load=moved, **common)
    assert losses(metrics(tmp_path / "run")) == pytest.approx(losses(expected)[3:], abs=1e-5)


@pytest.mark.parametrize("case", EXACT)
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(
    case: str, pool: RankPool, text: Path, tmp_path: Path
) -> None:
    nranks, options = EXACT[case]
    options = {**options, "data_path": text, "train_iters": 6}
    expected = train_states(pool, nranks, tmp_path / "undisturbed", **options)
    checkpoint = tmp_path / "checkpoint"
    train_states(pool, nranks, tmp_path / "run", save=checkpoint, exit_interval=3, **options)
    actual = train_states(pool, nranks, tmp_path / "run", load=checkpoint, **options)
    assert_equal_states(actual, expected)
    assert losses(metrics(tmp_path / "run")) == losses(metrics(tmp_path / "undisturbed"))


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
    assert len(metrics(tmp_path / "run")) == 4
    assert (checkpoint / "latest_checkpointed_iteration.txt").read_text() == "4"
    actual = train_states(pool, 2, tmp_path / "run", load=checkpoint, **options)
    assert_equal_states(actual, expected)


def assert_equal_states(actual: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    for rank, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.keys() == other.keys()
        assert any(name.endswith("exp_avg_sq") for name in one)
        differing = [name for name in one if not torch.equal(one[name], other[name])]
        assert not differing, f"rank {rank}"
