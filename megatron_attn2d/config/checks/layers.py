"""Checks that Megatron's own arguments about layers fit the model."""

from collections.abc import Iterator

from megatron_attn2d.config.checks.refusal import Refusal
from megatron_attn2d.config.layer_pattern import (
    ATTENTION,
    PER_LAYER,
    PIPE,
    SKIPPED,
    UNEVEN_STAGES,
    is_hybrid,
    main_layers,
)
from megatron_attn2d.config.schema import RunConfig


def check_layers(run: RunConfig) -> Iterator[Refusal]:
    """Refuse arguments about layers that Megatron itself refuses only in the first step, or without a reason."""
    given, layers = run.megatron_args, run.model.num_layers
    pattern = str(given.get("hybrid_layer_pattern") or "")
    if "*" in pattern and "+" in pattern:
        yield "megatron_args.hybrid_layer_pattern", "Megatron has attention (*) or latent attention (+)", "choose one"
    if "E" in pattern and not given.get("num_experts"):
        yield "megatron_args.hybrid_layer_pattern", "E is a layer of experts", "set megatron_args.num_experts too"
    experts, chosen = given.get("num_experts"), given.get("moe_router_topk", 2)
    if isinstance(experts, int) and isinstance(chosen, int) and 0 < experts < chosen:
        yield (
            "megatron_args.num_experts",
            f"a token goes to megatron_args.moe_router_topk = {chosen} of them",
            f"choose {chosen} or more, or megatron_args.moe_router_topk={experts}",
        )
    for name in PER_LAYER:
        value = given.get(name)
        if isinstance(value, list) and len(value) != layers and (not pattern or is_hybrid(run)):
            yield (
                f"megatron_args.{name}",
                f"has {len(value)} entries, but model.num_layers is {layers}",
                "write one per layer",
            )
        elif isinstance(value, int) and value < 1:
            yield f"megatron_args.{name}", "selects one in so many layers", "choose 1 or more, or leave it out"


def check_hybrid(run: RunConfig) -> Iterator[Refusal]:
    """Refuse arguments that contradict the layer pattern of a hybrid model, or that such a model does not read."""
    if not is_hybrid(run):
        return
    given, parallel, model = run.megatron_args, run.parallelism, run.model
    for name in (*UNEVEN_STAGES, "num_layers_per_virtual_pipeline_stage"):
        if given.get(name):
            choice = "write stages as | in megatron_args.hybrid_layer_pattern"
            yield f"megatron_args.{name}", "the stages of model.kind = hybrid stand in its pattern", choice
    for name in ("moe_layer_freq", *SKIPPED):  # The layer pattern is made of these numbers, so text cannot stand here.
        if isinstance(given.get(name), str):
            yield f"megatron_args.{name}", "is text, which is not read here", "write a number, or [1, 0, ...]"
    depths = given.get("mtp_num_layers")
    if depths is not None and not (isinstance(depths, int) and depths >= 0):
        yield "megatron_args.mtp_num_layers", "not a number of layers", "choose 1 or more, or leave it out"
    if given.get("linear_attention_freq"):
        choice = "write those layers as G in megatron_args.hybrid_layer_pattern"
        yield "megatron_args.linear_attention_freq", "is not read of a hybrid model", choice
    if not (pattern := str(given.get("hybrid_layer_pattern") or "")):
        return
    if (found := len(ATTENTION.findall(main_layers(pattern)))) != model.num_layers:
        reason = f"has {found} layers of attention (* or +), but model.num_layers is {model.num_layers}"
        choice = f"choose model.num_layers={found}, or another pattern" if found else "write them into it"
        yield "megatron_args.hybrid_layer_pattern", reason, choice
    stages, found = parallel.pipeline * (parallel.virtual_pipeline or 1), pattern.count(PIPE) + 1
    if found != stages and (parallel.virtual_pipeline or found > 1):
        reason = f"has {found} stages, parallelism.pipeline x virtual_pipeline are {stages}"
        yield "megatron_args.hybrid_layer_pattern", reason, f"write {stages - 1} | into it"
