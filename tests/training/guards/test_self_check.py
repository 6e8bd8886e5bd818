"""What is checked before the first step: that ranks agree, and that attention is over the whole sequence."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import pytest
import torch

from tests.megatron.test_core_attention import built
from tests.pool import RankPool

RUNS: list[tuple[int, str | None, list[int] | None]] = [
    (4, "attention2d", [2, 2]),
    (4, "attention2d", [4, 1]),
    (4, "attention2d", [1, 4]),
    (4, "attention2d", [2, 2, 1]),
    (4, "attention2d", [1, 2, 2, 1]),
    (4, "p2p", None),
    (4, "all_gather", None),
    (4, "a2a", None),
    (1, None, None),
]


def check(rank: int, cp: int, cp_comm_type: str | None, sizes: list[int] | None, dtype: torch.dtype) -> float:
    """The CPU seconds of a check that succeeds."""
    from megatron_attn2d.training.guards.self_check import check_attention

    with built(cp, cp_comm_type, sizes, params_dtype=dtype) as attention:
        state = torch.get_rng_state()
        began = time.process_time()
        check_attention(attention)
        assert torch.equal(torch.get_rng_state(), state), "the dropout of the run is another than without the check"
        return time.process_time() - began


@pytest.mark.parametrize(("cp", "cp_comm_type", "sizes"), RUNS)
def test_sound_attention_passes_within_a_second(
    pool: RankPool, cp: int, cp_comm_type: str | None, sizes: list[int] | None
) -> None:
    assert max(pool.run(check, cp, cp, cp_comm_type, sizes, torch.bfloat16)) < 1


def broken(rank: int, cp_comm_type: str, sizes: list[int] | None, how: str) -> str:
    """What the check says about an attention that is broken in a way that trains without an error."""
    from megatron_attn2d import Grid
    from megatron_attn2d.attention import layout, partials, ring
    from megatron_attn2d.training.guards.self_check import SelfCheckError, check_attention

    def one_chunk_too_few(query: layout.Chunk, key_ranks: tuple[int, ...], causal: bool) -> int:
        seen = visible_prefix(query, key_ranks, causal)
        return seen - 1 if query.half == layout.UPPER and seen > 1 else seen

    def shifted_ranks(rows: int, cols: int, block_rows: int, block_cols: int) -> Any:
        return tuple(reversed(place_ranks(rows, cols, block_rows, block_cols)))

    visible_prefix, place_ranks = layout.visible_prefix, layout.place_ranks
    with built(4, cp_comm_type, sizes, params_dtype=torch.float32) as attention:
        patches = {
            "local": [mock.patch.object(attention, "grid", Grid.single()), mock.patch.object(attention, "ring", None)],
            "scale": [mock.patch.object(attention, "softmax_scale", 0.4)],
            "layout": [mock.patch.object(layout, "visible_prefix", one_chunk_too_few)],
            "gradients": [
                mock.patch.object(
                    partials,
                    "sum_partials",
                    lambda partials, totals: [t.copy_(p[0]) for p, t in zip(partials, totals, strict=True)],
                ),
                mock.patch.object(ring, "row_statistics", lambda dout, out, lse: torch.stack((lse, lse * 0), 1)),
            ],
        }[how]
        layout.tile_plan.cache_clear()
        for patch in patches:
            patch.start()
        try:
            check_attention(attention)
        except SelfCheckError as error:
            return str(error)
        finally:
            for patch in patches:
                patch.stop()
            layout.tile_plan.cache_clear()
    return ""


@pytest.mark.parametrize(
    ("cp_comm_type", "sizes", "how"),
    [
        ("attention2d", [2, 2], "local"),
        ("attention2d", [2, 2], "layout"),
        ("attention2d", [2, 2], "gradients"),
        ("attention2d", [2, 2], "scale"),
        ("p2p", None, "scale"),
        ("p2p", None, "local"),
        ("p2p", None, "gradients"),
    ],
)
def test_broken_attention_is_refused_with_mode_grid_and_rank(
    pool: RankPool, cp_comm_type: str, sizes: list[int] | None, how: str
) -> None:
    messages = pool.run(broken, 4, cp_comm_type, sizes, how)
    assert any(messages)
    shape = "on a ring of 4" if (cp_comm_type, how == "local") == ("p2p", False) else "on a grid of"
    for rank, message in enumerate(messages):
        if message:
            assert f"failed on rank {rank} (context rank {rank} of 4)" in message
            assert f"mode {cp_comm_type} {shape}" in message


@pytest.mark.parametrize("given", [{}, {"softmax_scale": 0.3}, {"kv_channels": 9}], ids=str)
def test_the_scale_is_the_models(given: dict[str, Any]) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_attn2d.training.guards.self_check import softmax_scale

    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, **given)
    assert softmax_scale(config) == {"{}": 1 / 4, "{'kv_channels': 9}": 1 / 3}.get(str(given), 0.3)


@pytest.mark.parametrize("factor", [1, 40])
def test_the_scale_of_latent_attention_is_the_models(factor: float) -> None:
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_mscale
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_attn2d.training.guards.self_check import softmax_scale

    sizes: dict[str, Any] = {"qk_head_dim": 48, "qk_pos_emb_head_dim": 16, "mscale_all_dim": 0.7, "mscale": 0.7}
    config = MLATransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, rotary_scaling_factor=factor, **sizes
    )
    assert softmax_scale(config) == pytest.approx(_yarn_get_mscale(factor, 0.7) ** 2 / 8)


def test_training_checks_itself_unless_told_not_to(pool: RankPool, tmp_path: Any) -> None:
    from tests.megatron.runs import arguments, context_parallel

    args = arguments(mock_data=True, num_layers=1, **context_parallel("attention2d", 1, 2))
    assert all(pool.run(start_broken, 2, [*args, "--run-dir", str(tmp_path / "checked")]))
    assert not any(pool.run(start_broken, 2, [*args, "--run-dir", str(tmp_path / "not"), "--no-attention-self-check"]))


def start_broken(rank: int, args: list[str]) -> bool:
    """Whether training with an attention that sees one rank's tokens alone is refused."""
    from megatron.training import training

    from megatron_attn2d import Grid
    from megatron_attn2d.megatron import core_attention
    from megatron_attn2d.training import pretrain_gpt
    from megatron_attn2d.training.guards.self_check import SelfCheckError

    def train(*args: Any, **kwargs: Any) -> tuple[int, int]:
        return 0, 0

    with (
        mock.patch.object(core_attention, "layer_grid", return_value=Grid.single()),
        mock.patch.object(training, "train", train),
    ):
        try:
            pretrain_gpt.main(args)
        except SelfCheckError:
            return True
    return False


def start_in_disagreement(rank: int, args: list[list[str]], versions: list[str]) -> tuple[str, float, int]:
    """What a rank is told, after how many seconds, and how many groups were made until then."""
    from megatron_attn2d.training import pretrain_gpt
    from megatron_attn2d.training.guards import same_start

    began, groups = time.monotonic(), torch.distributed.get_pg_count()
    try:
        with mock.patch.object(same_start, "_version", return_value=versions[rank]):
            pretrain_gpt.main(args[rank])
    except same_start.DisagreementError as error:
        return str(error), time.monotonic() - began, torch.distributed.get_pg_count() - groups
    return "", 0.0, 0


def test_ranks_that_disagree_are_told_so_instead_of_waiting(pool: RankPool, tmp_path: Any) -> None:
    from tests.megatron.runs import arguments, context_parallel

    cases = {
        "--seq-length is 64 on ranks 0, 1, 2, 128 on rank 3": {"seq_length": 128, "max_position_embeddings": 128},
        "--hierarchical-context-parallel-sizes is 2 2 on ranks 0, 1, 2, 4 1 on rank 3": context_parallel(
            "attention2d", 4, 1
        ),
        "--cp-comm-type is attention2d on ranks 0, 1, 2, p2p on rank 3": {"cp_comm_type": "p2p"},
        "--bf16 is not given on ranks 0, 1, 2, given on rank 3": {"bf16": True},
    }
    common = {"run_dir": tmp_path, "mock_data": True, **context_parallel("attention2d", 2, 2)}
    cases["torch is 1.0 on ranks 0, 1, 2, 1.1 on rank 3"] = {}
    for message, changes in cases.items():
        args = [arguments(**common)] * 3 + [arguments(**{**common, **changes})]
        versions = ["1.0"] * 3 + ["1.0" if changes else "1.1"]
        for told, seconds, groups in pool.run(start_in_disagreement, 4, args, versions, timeout=60):
            assert message in told
            assert seconds < 20, "the groups' timeout is 10 minutes"
            assert groups == 0
