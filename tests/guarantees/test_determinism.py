"""Two runs of one configuration are one run, bit for bit; the sizes of 8 ranks are in the drill."""

from pathlib import Path
from typing import Any

import pytest

from tests.megatron.runs import context_parallel, metrics, train_states
from tests.pool import RankPool
from tests.training.test_resume import assert_equal_states


def assert_deterministic(pool: RankPool, nranks: int, directory: Path, **options: Any) -> None:
    """Asserts that losses, gradients' norms, weights, optimizer and random states of two runs are equal."""
    first, second = (train_states(pool, nranks, directory / name, **options) for name in ("first", "second"))
    assert_equal_states(second, first)
    for one, other in zip(metrics(directory / "first"), metrics(directory / "second"), strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])


@pytest.mark.parametrize("mode", [context_parallel("attention2d", 2, 2), context_parallel("p2p", 1, 4)], ids=str)
def test_two_runs_are_equal_bit_for_bit(mode: dict[str, Any], pool: RankPool, tmp_path: Path) -> None:
    options = {"num_layers": 2, "train_iters": 3, "mock_data": True, "hidden_dropout": 0.1, **mode}
    assert_deterministic(pool, 4, tmp_path, **options)
