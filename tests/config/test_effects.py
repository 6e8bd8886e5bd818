"""Arguments that Megatron reads in some models alone."""

import pytest

from tests.config.base import arguments, split_overrides


@pytest.mark.parametrize(
    "overrides",
    [
        "megatron_args={window_size: [8, 0], window_attn_skip_freq: [1, 0, 1, 1]}",
        "megatron_args.rope_scaling_factor=8.0",  # Megatron's own
        "megatron_args={num_experts: 4, moe_z_loss_coeff: 0.001}",
        "megatron_args.use_rope_scaling=true megatron_args.rope_scaling_factor=16 model.position_embedding_type=rope",
        "megatron_args={multi_latent_attention: true, rope_type: rope} model.rotary_percent=0.5",
        "megatron_args={hybrid_layer_pattern: '*-*-/*-', mtp_loss_scaling_factor: 0.3}",
        "megatron_args={multi_latent_attention: true, reset_position_ids: true}",  # with learned positions on top
    ],
)
def test_what_changes_something_is_passed_on(base, overrides):
    assert arguments(base, *split_overrides(overrides))
