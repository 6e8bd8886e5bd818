"""Checkpoints of runs that are killed, and how many are kept."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_attn2d.run import checkpoints
from tests.megatron.runs import arguments, context_parallel, metrics, train
from tests.pool import RankFailed, RankPool

GRID = context_parallel("attention2d", 2, 1)


def train_until_killed(rank: int, args: list[str], step: int) -> None:
    """Trains; in the save of `step` the first rank is killed, its data written but the checkpoint not whole."""
    from megatron.core.dist_checkpointing import serialization

    from megatron_attn2d.training import pretrain_gpt

    save_config = serialization.save_config

    def save(config: Any, directory: str, *rest: Any, **kwargs: Any) -> Any:
        if directory.endswith(f"iter_{step:07d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return save_config(config, directory, *rest, **kwargs)

    serialization.save_config = save
    pretrain_gpt.main(args)


def test_a_run_killed_in_a_save_continues_from_the_last_complete_one_with_the_same_data(
    pool: RankPool, text: Path, tmp_path: Path
) -> None:
    options = {**GRID, "data_path": text, "train_iters": 7, "num_layers": 1, "hidden_dropout": 0.1}
    expected = train(pool, 2, tmp_path / "undisturbed", **options)
    directory, run_dir = tmp_path / "checkpoints", tmp_path / "run"
    saving = arguments(run_dir=run_dir, save=directory, save_interval=2, keep_last=1, **options)
    with pytest.raises(RankFailed, match="the process died"):
        pool.run(train_until_killed, 2, saving, 6, timeout=120)
    assert [path.name for path in sorted(directory.glob("iter_*"))] == ["iter_0000004", "iter_0000006"]
    recorded = metrics(run_dir)[:4]
    (directory / checkpoints.TRACKER).write_text("")  # as a kill in the middle of writing it leaves it

    checkpoints.repair_tracker(directory)
    steps = train(pool, 2, run_dir, save=directory, save_interval=2, keep_last=1, load=directory, **options)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert steps[:4] == recorded, "the run began anew"
    assert [step["loss"] for step in steps] == [step["loss"] for step in expected]
    assert checkpoints.complete(directory) == [7]
    assert [path.name for path in directory.glob("iter_*")] == ["iter_0000007"]
    assert len(metrics(run_dir)) == 7
