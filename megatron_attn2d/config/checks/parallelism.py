"""Checks that ranks share heads, layers, experts and tokens evenly."""

from collections.abc import Iterator

from megatron_attn2d.config.checks.refusal import Refusal, divisors
from megatron_attn2d.config.layer_pattern import UNEVEN_STAGES
from megatron_attn2d.config.schema import RunConfig


def check_parallelism(run: RunConfig) -> Iterator[Refusal]:
    """Refuse numbers of tensor ranks, pipeline stages and expert ranks that do not share what they split."""
    yield from _check_tensor(run)
    yield from _check_sequence(run)
    yield from _check_stages(run)
    yield from _check_experts(run)


def _check_tensor(run: RunConfig) -> Iterator[Refusal]:
    model, tensor = run.model, run.parallelism.tensor
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    if heads % tensor:
        yield (
            "parallelism.tensor",
            f"does not divide model.num_attention_heads = {heads}",
            f"choose one of {divisors(heads)}",
        )
    elif groups % tensor and tensor % groups:
        yield (
            "parallelism.tensor",
            f"neither divides model.num_query_groups = {groups} nor is a multiple of it",
            f"choose one of {divisors(groups)}",
        )


def _check_sequence(run: RunConfig) -> Iterator[Refusal]:
    parallel = run.parallelism
    if not parallel.sequence_parallel:
        return
    if parallel.tensor == 1:
        yield "parallelism.sequence_parallel", "needs parallelism.tensor > 1, which is 1", "choose false"
    shard = run.training.seq_length // run.context_parallel.size
    if shard % parallel.tensor:
        yield (
            "parallelism.sequence_parallel",
            f"{shard} tokens per context rank do not split over parallelism.tensor = {parallel.tensor}",
            "choose false, or a training.seq_length that is a multiple of tensor * 2 * context",
        )


def _check_stages(run: RunConfig) -> Iterator[Refusal]:
    parallel, model = run.parallelism, run.model
    stages, virtual = parallel.pipeline, parallel.virtual_pipeline
    if virtual is not None and stages == 1:
        yield "parallelism.virtual_pipeline", "needs parallelism.pipeline > 1, which is 1", "choose null"
    key, chunks = (
        ("parallelism.pipeline", stages) if virtual is None else ("parallelism.virtual_pipeline", stages * virtual)
    )
    if model.num_layers % chunks and not any(map(run.megatron_args.get, (*UNEVEN_STAGES, "hybrid_layer_pattern"))):
        yield (
            key,
            f"{chunks} stages do not share model.num_layers = {model.num_layers} evenly",
            f"stages in all: one of {divisors(model.num_layers)}",
        )


def _check_experts(run: RunConfig) -> Iterator[Refusal]:
    parallel = run.parallelism
    expert_ranks = parallel.tensor * run.context_parallel.size * run.data_parallel_size
    if expert_ranks % parallel.expert:
        yield (
            "parallelism.expert",
            f"does not divide tensor * context * data = {expert_ranks} ranks",
            f"choose one of {divisors(expert_ranks)}",
        )
    experts = run.megatron_args.get("num_experts")
    if parallel.expert > 1 and not experts:
        yield "parallelism.expert", "the model has no experts", "choose 1, or set megatron_args.num_experts"
