"""Checks that the sizes of the model fit each other, and that its kind of positions can be scaled."""

from collections.abc import Iterator

from megatron_attn2d.config.checks.refusal import Refusal, divisors
from megatron_attn2d.config.layer_pattern import is_hybrid
from megatron_attn2d.config.schema import RunConfig

_ROPE_SCALING = (
    *("use_rope_scaling", "rope_scaling_factor", "rotary_scaling_factor", "rotary_seq_len_interpolation_factor"),
    "yarn_original_max_position_embeddings",
)
"""Arguments of Megatron that `model.rope_scaling` sets."""


def check_model(run: RunConfig) -> Iterator[Refusal]:
    """Refuse heads that do not divide, an odd width under RoPE, and too few positions."""
    model, heads = run.model, run.model.num_attention_heads
    if model.kv_channels is None and model.hidden_size % heads:
        yield (
            "model.hidden_size",
            f"not a multiple of model.num_attention_heads = {heads}",
            f"choose {-(-model.hidden_size // heads) * heads}, or set model.kv_channels",
        )
    width = int((model.kv_channels or model.hidden_size // heads) * (model.rotary_percent or 1.0))
    if model.position_embedding_type == "rope" and width % 2:
        yield (
            "model.position_embedding_type",
            f"RoPE rotates pairs, and a head has {width} numbers to rotate",
            "choose an even model.kv_channels, or hidden_size / num_attention_heads",
        )
    yield from _check_rope_scaling(run)
    groups = model.num_query_groups or heads
    if heads % groups:
        yield (
            "model.num_query_groups",
            f"does not divide model.num_attention_heads = {heads}",
            f"choose one of {divisors(heads)}",
        )
    positions = model.max_position_embeddings or run.training.seq_length
    if positions < run.training.seq_length:
        yield (
            "model.max_position_embeddings",
            f"less than training.seq_length = {run.training.seq_length}",
            f"choose {run.training.seq_length} or more",
        )


def _check_rope_scaling(run: RunConfig) -> Iterator[Refusal]:
    model, scaling = run.model, run.model.rope_scaling
    factor, trained_at = model.rope_scaling_factor, model.rope_original_length
    if scaling == "none":
        for name in ("rope_scaling_factor", "rope_original_length"):
            if getattr(model, name) is not None:
                yield f"model.{name}", "model.rope_scaling is none", "choose null, or model.rope_scaling=yarn"
        return
    for name in filter(run.megatron_args.get, _ROPE_SCALING):
        yield f"megatron_args.{name}", f"model.rope_scaling = {scaling} decides about it", "leave it out"
    if model.position_embedding_type != "rope":
        reason = f"model.position_embedding_type is {model.position_embedding_type}"
        yield "model.rope_scaling", reason, "choose none, or model.position_embedding_type=rope"
    if is_hybrid(run) and scaling in ("llama3", "yarn"):
        reason = "Megatron's hybrid models (model.kind) scale positions evenly or not at all"
        yield "model.rope_scaling", reason, "choose linear or ntk, or model.kind=gpt"
    if run.megatron_args.get("multi_latent_attention"):
        reason = "latent attention (megatron_args.multi_latent_attention) has positions of its own"
        yield "model.rope_scaling", reason, "choose none, and set megatron_args.rotary_scaling_factor"
    if factor is None:
        reason = f"model.rope_scaling = {scaling} divides by it"
        yield "model.rope_scaling_factor", reason, "choose training.seq_length over the length trained at"
    elif scaling == "linear" and factor != int(factor):
        yield "model.rope_scaling_factor", "Megatron divides positions by whole numbers", f"choose {round(factor)}"
    if scaling == "yarn":
        if trained_at is None:
            reason = "model.rope_scaling = yarn tells high frequencies from low ones by it"
            yield "model.rope_original_length", reason, "choose the length that the model was trained at"
        if (model.rotary_percent or 1.0) < 1:
            reason = "model.rope_scaling = yarn rotates whole heads in Megatron"
            yield "model.rotary_percent", reason, "choose 1.0, or model.rope_scaling=ntk"
    elif scaling == "llama3" and trained_at not in (None, 8192):
        yield "model.rope_original_length", "Megatron's rule of Llama 3.1 takes 8192", "choose 8192, or yarn"
    elif scaling in ("linear", "ntk") and trained_at is not None:
        yield "model.rope_original_length", f"model.rope_scaling = {scaling} does not depend on it", "choose null"
