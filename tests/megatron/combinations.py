"""The table of models and of ways to spread them over ranks; `test_parity.py` trains it on CPU ranks, and
`tests/gpu/test_combinations.py`, in bf16 and with Transformer Engine's layers, what needs no more than two GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.megatron.runs import context_parallel

Options = dict[str, Any]

YARN = {"rotary_scaling_factor": 4, "yarn_original_max_position_embeddings": 16}  # a fourth of the length
MODELS: dict[str, Options] = {
    "llama": {
        "num_layers": 2,
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": True,
    },
    "gpt3": {
        "num_layers": 2,
        "group_query_attention": None,
        "num_query_groups": None,
        "position_embedding_type": "learned_absolute",
    },
    "four layers": {},
    "moe": {
        "num_layers": 2,
        "num_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 64,
        "disable_bias_linear": True,
    },
    "balanced moe": {
        "num_layers": 2,
        "num_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 64,
        "disable_bias_linear": True,
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.5, 0.5],
        "moe_z_loss_coeff": 0.1,
        "micro_batch_size": 1,
    },
    "mla": {
        "num_layers": 2,
        "multi_latent_attention": True,
        "group_query_attention": None,
        "num_query_groups": None,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_head_dim": 16,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 16,
    },
    "hybrid": {"num_layers": None, "hybrid_layer_pattern": "*-*-"},
    "mtp": {"num_layers": 2, "mtp_num_layers": 1, "untie_embeddings_and_output_weights": True},
    "masked": {"num_layers": 1, "eod_mask_loss": True, "null_tokenizer_eod_id": 32},
    "hidden dropout": {"num_layers": 2, "hidden_dropout": 0.1},
    "attention dropout": {"num_layers": 2, "attention_dropout": 0.1},
    "yarn": {"num_layers": 2, "position_embedding_type": "yarn", **YARN},
    "windows": {"num_layers": 2, "window_size": "24,0", "window_attn_skip_freq": 2, "softmax_type": "learnable"},
}
"""What a model differs in from `runs.OPTIONS`. `masked`: no loss after a blank, so that ranks count other numbers of
tokens. `windows`: on one layer of the two, and sinks on both."""


@dataclass(frozen=True)
class Combination:
    """A model and how it is spread."""

    model: str
    ranks: int
    options: Options
    tolerance: float = 1e-5
    """Of the loss; of the gradient's norm ten times as much, relative."""


def grid(*sizes: int, **options: Any) -> Options:
    """Options of attention2d with the sizes [R, C], [U, R, C] or those of tiles."""
    size = 1
    for one in sizes:
        size *= one
    return {**context_parallel("attention2d", 1, size), "hierarchical_context_parallel_sizes": list(sizes), **options}


def layers(*modes: str, sizes: tuple[int, int]) -> Options:
    """Options of one mode per layer."""
    return {**grid(*sizes), "cp_comm_type": list(modes)}


REFERENCES: dict[str, tuple[int, Options]] = {
    "hidden dropout": (2, context_parallel("p2p", 1, 2)),
    "attention dropout": (2, grid(1, 2)),
}
"""What a model is compared with instead of one rank. Hidden dropout draws by the shapes that a rank holds, so that only
the same ranks in another mode drop the same; Transformer Engine's attention drops others than ours."""

TP = {"tensor_model_parallel_size": 2}
SP = {**TP, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
VPP = {**PP, "num_layers_per_virtual_pipeline_stage": 1}
EP = {"expert_model_parallel_size": 2}
ZERO = {"use_distributed_optimizer": True}
OVERLAP = {**ZERO, "overlap_grad_reduce": True, "overlap_param_gather": True}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LONG = {**RECOMPUTE, "offload_activations": True, "keep_attention_outputs": True, "loss_chunk_tokens": 24}
"""What a million tokens need."""
MTP_TOLERANCE = 1e-4
"""Upstream weighs a rank's part of the loss of multi-token prediction by that rank's tokens, of which those that hold
the sequence's end have fewer: not the same on one rank. See `test_multi_token_prediction_differs_...`."""

COMBINATIONS: dict[str, Combination] = {
    # the context alone
    "ring 2": Combination("llama", 2, context_parallel("p2p", 1, 2)),
    "all_gather 2": Combination("llama", 2, context_parallel("all_gather", 2, 1)),
    "ulysses 2": Combination("llama", 2, context_parallel("a2a", 1, 2)),
    "1x2": Combination("llama", 2, grid(1, 2)),
    "2x1": Combination("llama", 2, grid(2, 1)),
    "1x4": Combination("llama", 4, grid(1, 4)),
    "2x2": Combination("llama", 4, grid(2, 2)),
    "4x1": Combination("llama", 4, grid(4, 1)),
    "2x1x2, heads over 2": Combination("llama", 4, grid(2, 1, 2)),
    "2x1 in head groups": Combination("llama", 2, grid(2, 1, attention2d_head_groups=2)),
    "attention2d, then ring": Combination("llama", 2, layers("attention2d", "p2p", sizes=(1, 2))),
    "all_gather, then 2x2": Combination("llama", 4, layers("all_gather", "attention2d", sizes=(2, 2))),
    # one other axis, alone and with the context
    "TP2": Combination("llama", 2, TP),
    "TP2 SP": Combination("llama", 2, SP),
    "TP2 SP, 2x1": Combination("llama", 4, {**SP, **grid(2, 1)}),
    "PP2": Combination("llama", 2, PP),
    "PP2, 2x1": Combination("llama", 4, {**PP, **grid(2, 1)}),
    "PP2 interleaved": Combination("four layers", 2, VPP),
    "PP2 interleaved, 1x2": Combination("four layers", 4, {**VPP, **grid(1, 2)}),
    "DP2": Combination("llama", 2, {}),
    "DP2, distributed optimizer": Combination("llama", 2, ZERO),
    "2x1, distributed optimizer": Combination("llama", 2, {**grid(2, 1), **ZERO}),
    "2x1x2, as at a million tokens": Combination("llama", 4, {**grid(2, 1, 2), **ZERO, **LONG}),
    "TP2, as at a million tokens": Combination("llama", 2, {**TP, **LONG}),
    "DP2, 1x2, overlapped": Combination("llama", 4, {**grid(1, 2), **OVERLAP}),
    "1x2, 4 micro-batches": Combination("llama", 2, {**grid(1, 2), "micro_batch_size": 1}),
    "2x1, attention recomputed": Combination("llama", 2, {**grid(2, 1), "recompute_granularity": "selective"}),
    "1x2, all recomputed": Combination("llama", 2, {**grid(1, 2), **RECOMPUTE}),
    # several at once
    "TP2 SP, PP2, 1x2": Combination("llama", 8, {**SP, **PP, **grid(1, 2)}),
    "PP2, 2x2": Combination("llama", 8, {**PP, **grid(2, 2)}),
    "TP2 SP, DP2, 2x1, overlapped": Combination("llama", 8, {**SP, **grid(2, 1), **OVERLAP, **LONG}),
    # other models
    "GPT-3, 2x1": Combination("gpt3", 2, grid(2, 1)),
    "GPT-3, TP2 SP, 1x2": Combination("gpt3", 4, {**SP, **grid(1, 2)}),
    "GPT-3, PP2, 2x1": Combination("gpt3", 4, {**PP, **grid(2, 1), **LONG}),
    "loss masked, 2x1": Combination("masked", 2, grid(2, 1)),
    "hidden dropout, 2x1 against the ring": Combination("hidden dropout", 2, grid(2, 1)),
    "attention dropout, 2x1 against 1x2": Combination("attention dropout", 2, grid(2, 1)),
    "YaRN, 2x1": Combination("yarn", 2, grid(2, 1)),
    "windows, 2x2": Combination("windows", 4, grid(2, 2)),
    "windows, TP2 SP, 2x1": Combination("windows", 4, {**SP, **grid(2, 1)}),
    "MoE, EP2": Combination("moe", 2, EP),
    "MoE, EP2 over 2x1": Combination("moe", 2, {**EP, **grid(2, 1)}),
    "MoE, TP2 SP, EP2 over 1x2": Combination("moe", 4, {**SP, **EP, **grid(1, 2)}),
    "MoE, PP2, EP2 over 2x1": Combination("moe", 4, {**PP, **EP, **grid(2, 1)}),
    "MLA, 1x2": Combination("mla", 2, grid(1, 2)),
    "MLA, TP2 SP, 2x1": Combination("mla", 4, {**SP, **grid(2, 1)}),
    "hybrid, 2x1": Combination("hybrid", 2, grid(2, 1)),
    "hybrid, TP2 SP, 1x2": Combination("hybrid", 4, {**SP, **grid(1, 2)}),
    "hybrid, PP2, 2x1": Combination("hybrid", 4, {**PP, **grid(2, 1), "hybrid_layer_pattern": "*-|*-"}),
    "MTP, 2x1": Combination("mtp", 2, grid(2, 1), MTP_TOLERANCE),
    "MTP, PP2, 1x2": Combination("mtp", 4, {**PP, **grid(1, 2)}, MTP_TOLERANCE),
}
