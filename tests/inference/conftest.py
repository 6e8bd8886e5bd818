"""Fixtures of the tests that generate."""

from pathlib import Path

import pytest

from megatron_attn2d.config import load_run, megatron_arguments, resolved_yaml
from tests.megatron.conftest import text
from tests.pool import RankPool, call

__all__ = ["text"]

QUICKSTART = Path(__file__).parents[2] / "configs" / "runs" / "quickstart.yaml"
_TINY = (
    *("model.kind=gpt", "model.num_layers=2", "model.hidden_size=64"),
    *("model.num_query_groups=2", "model.ffn_hidden_size=128"),
    *("parallelism.pipeline=1", "context_parallel.size=1", "training.seq_length=64", "training.train_iters=1"),
    *("optimizer.lr=1e-9", "optimizer.min_lr=0", "optimizer.lr_warmup_iters=0", "optimizer.lr_decay_iters=1"),
    "model.init_method_std=0.1",  # a model that says something else each time
)


def described(directory: Path, *overrides: str) -> Path:
    """A run's directory that holds the configuration of a tiny model alone."""
    directory.mkdir(exist_ok=True)
    run = load_run(QUICKSTART, [*_TINY, f"run.dir={directory}", *overrides])
    (directory / "config.yaml").write_text(resolved_yaml(run))
    return directory


@pytest.fixture(scope="session")
def trained(pool: RankPool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on two tensor ranks, as `train` leaves it behind."""
    from megatron_attn2d.training import pretrain_gpt

    overrides = ("checkpoint.save=true", "parallelism.tensor=2", "optimizer.use_distributed_optimizer=true")
    directory = described(tmp_path_factory.mktemp("runs") / "run", f"data.paths=[{text}]", *overrides)
    arguments = megatron_arguments(load_run(directory / "config.yaml"))
    pool.run(call, 2, pretrain_gpt.main, arguments, init_group=False)
    return directory
