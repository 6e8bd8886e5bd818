"""Positions beyond the length that a model was trained at: each rule's own formula, on one rank and on several."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_attn2d.config.arguments import ntk_base
from megatron_attn2d.config.schema import Model
from tests.attention.dense import zigzag
from tests.pool import RankPool

WIDTH, BASE, FACTOR, RANKS = 64, 10000, 4, 4
TRAINED_AT = {"linear": 64, "ntk": 64, "yarn": 64, "llama3": 8192}
MODEL = Model(num_layers=1, hidden_size=WIDTH, num_attention_heads=1, rope_scaling_factor=float(FACTOR))


def frequencies(kind: str) -> torch.Tensor:
    """What a position is multiplied by, [WIDTH / 2], as the rules' authors write it, in float64."""
    exponents = torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH
    plain = BASE**-exponents
    if kind == "linear":
        return plain / FACTOR
    if kind == "ntk":
        return (BASE * FACTOR ** (WIDTH / (WIDTH - 2))) ** -exponents
    if kind == "llama3":  # four turns within the length trained at and more stay, one and less are divided
        turns = TRAINED_AT[kind] * plain / (2 * math.pi)
        stays = ((turns - 1) / 3).clamp(0, 1)
    else:  # 32 turns and more stay, one and less are divided; between them by the place among the frequencies
        low, high = (
            WIDTH * math.log(TRAINED_AT[kind] / (turns * 2 * math.pi)) / (2 * math.log(BASE)) for turns in (32, 1)
        )
        low, high = max(math.floor(low), 0), math.ceil(high)
        stays = 1 - ((torch.arange(WIDTH // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return plain * stays + plain / FACTOR * (1 - stays)


def angles(rank: int, kind: str, cp: int) -> torch.Tensor:
    """Upstream's angles of this rank's positions, [s/cp, WIDTH / 2], at FACTOR times the length trained at."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    from megatron_attn2d.megatron.upstream import compat, cpu

    given: dict[str, Any] = {
        "linear": {"seq_len_interpolation_factor": FACTOR},
        "ntk": {"rotary_base": ntk_base(MODEL)},
        "llama3": {"rope_scaling": True, "rope_scaling_factor": FACTOR},
        "yarn": {"scaling_factor": FACTOR, "original_max_position_embeddings": TRAINED_AT["yarn"]},
    }[kind]
    embedding = YarnRotaryEmbedding if kind == "yarn" else RotaryEmbedding
    with compat.applied_fixes(), cpu.seam():
        parallel_state.initialize_model_parallel(context_parallel_size=cp)
        try:
            found = embedding(WIDTH, 1.0, **{"rotary_base": BASE, **given})(FACTOR * TRAINED_AT[kind])
        finally:
            parallel_state.destroy_model_parallel()
    return (found[0] if kind == "yarn" else found)[:, 0, 0, : WIDTH // 2]


@pytest.mark.parametrize("kind", TRAINED_AT)
def test_context_ranks_have_the_angles_of_one_rank(pool: RankPool, kind: str) -> None:
    length = FACTOR * TRAINED_AT[kind]
    (whole,) = pool.run(angles, 1, kind, 1)
    expected = torch.outer(torch.arange(length, dtype=torch.float64), frequencies(kind))
    assert (whole - expected).abs().max() <= 1e-6 * length
    for rank, part in enumerate(pool.run(angles, RANKS, kind, RANKS)):
        assert torch.equal(part, whole[zigzag(length, RANKS, rank)])
