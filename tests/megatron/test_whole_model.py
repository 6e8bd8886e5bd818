"""Context parallelism is real: through the whole model each position sees all before it, on any rank, and no other."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.megatron.runs import arguments, context_parallel
from tests.pool import RankPool

MODES = {
    "ring": context_parallel("p2p", 1, 4),
    "all_gather": context_parallel("all_gather", 4, 1),
    "attention2d 1x4": context_parallel("attention2d", 1, 4),
    "attention2d 2x2": context_parallel("attention2d", 2, 2),
    "attention2d 4x1": context_parallel("attention2d", 4, 1),
    "attention2d 2x1x2": {**context_parallel("attention2d", 2, 2), "hierarchical_context_parallel_sizes": [2, 1, 2]},
    "attention2d tile 1x2": {
        **context_parallel("attention2d", 2, 2),
        "hierarchical_context_parallel_sizes": [1, 2, 2, 1],
    },
    "ulysses": {**context_parallel("a2a", 1, 4), "num_query_groups": 4},
}


@pytest.mark.parametrize("mode", MODES)
def test_changing_a_token_changes_the_logits_of_all_later_positions_and_of_no_other(
    mode: str, pool: RankPool, tmp_path: Path
) -> None:
    args = arguments(run_dir=tmp_path, mock_data=True, num_layers=2, **MODES[mode])
    positions = pool.run(_probe, 4, args)
    assert sorted(position for rank in positions for position in rank) == list(range(64))


def _probe(rank: int, args: list[str]) -> list[int]:
    """Asserts it for this rank's positions and a changed token in each rank's chunks; returns this rank's positions."""
    from megatron.training import training

    from megatron_attn2d.training import pretrain_gpt

    held: list[int] = []

    def instead_of_training(step: Any, model: Any, *rest: Any, **kwargs: Any) -> tuple[int, int]:
        held.extend(_changes(model[0].eval()))
        return 0, 0

    with mock.patch.object(training, "train", instead_of_training):
        pretrain_gpt.main(args)
    return held


def _changes(model: Any) -> list[int]:
    import torch
    from megatron.core.parallel_state import get_context_parallel_group
    from megatron.core.utils import get_batch_on_this_cp_rank

    group = get_context_parallel_group()
    seq_length, chunk = 64, 64 // (2 * group.size())
    tokens = torch.randint(0, 256, (1, seq_length), generator=torch.Generator().manual_seed(1))

    def run(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch = {"tokens": tokens, "position_ids": torch.arange(seq_length)[None]}
        mine = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
        with torch.no_grad():
            return model(mine["tokens"], mine["position_ids"], None)[0], mine["position_ids"][0]

    logits, positions = run(tokens)
    for changed in range(chunk // 2, seq_length, chunk):
        other = tokens.clone()
        other[0, changed] = (tokens[0, changed] + 1) % 256
        differs = (run(other)[0] != logits).any(dim=-1)
        assert torch.equal(differs, positions >= changed), f"token {changed}: {positions[differs].tolist()} changed"
    return positions.tolist()
