"""The entry point: what it refuses, and that it can be called again and again."""

from pathlib import Path

import pytest
import torch

from tests.megatron.runs import arguments
from tests.pool import RankFailed, RankPool


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_such_flag": True}, "ValueError: Megatron's arguments: unrecognized arguments: --no-such-flag"),
        ({"seq_length": "long"}, "ValueError: Megatron's arguments: argument --seq-length: invalid int value: 'long'"),
        ({"hybrid_context_parallel": True}, "ValueError: --hybrid-context-parallel is not supported: it changes the"),
        ({"hybrid_layer_pattern": "*M"}, "ValueError: hybrid_layer_pattern: M and G, Mamba and Gated DeltaNet, need"),
    ],
)
def test_what_it_refuses_it_names(options: dict[str, object], message: str, pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=message):
        pool.run(_run, 1, [arguments(run_dir=tmp_path, mock_data=True, **options)])


def test_it_can_be_called_again_after_success_and_failure(pool: RankPool, tmp_path: Path) -> None:
    good = arguments(run_dir=tmp_path, mock_data=True, num_layers=1, train_iters=1)
    assert pool.run(_run, 2, [good, [*good, "--no-such-flag"], good]) == [["", "ValueError", ""]] * 2


@pytest.mark.parametrize("init_group", [True, False])
def test_it_ends_the_process_group_that_it_made_and_no_other(init_group: bool, pool: RankPool, tmp_path: Path) -> None:
    args = arguments(run_dir=tmp_path, mock_data=True, num_layers=1, train_iters=1)
    assert pool.run(_has_group_after, 2, args, init_group=init_group) == [init_group] * 2


def _run(rank: int, runs: list[list[str]]) -> list[str]:
    """The names of what the runs raised, one after the other; what a single one raises is raised."""
    from megatron_attn2d import pretrain_gpt

    raised = []
    for args in runs:
        try:
            pretrain_gpt.main(args)
            raised.append("")
        except ValueError as error:
            if len(runs) == 1:
                raise
            raised.append(type(error).__name__)
    return raised


def _has_group_after(rank: int, args: list[str]) -> bool:
    from megatron_attn2d import pretrain_gpt

    pretrain_gpt.main(args)
    return torch.distributed.is_initialized()
