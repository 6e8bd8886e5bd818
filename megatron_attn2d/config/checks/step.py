"""Checks that batch, recomputation, loss and precision of a step fit together."""

import re
from collections.abc import Iterator

from megatron_attn2d.config.checks.refusal import Refusal
from megatron_attn2d.config.layer_pattern import is_hybrid
from megatron_attn2d.config.schema import RunConfig

_OTHER_LOSSES = (
    *("mtp_num_layers", "cross_entropy_loss_fusion", "fp16_lm_cross_entropy", "use_mup"),
    *("defer_embedding_wgrad_compute",),
)
"""Arguments of Megatron that need all logits at once, or that replace the plain cross entropy."""


def check_step(run: RunConfig) -> Iterator[Refusal]:
    """Refuse batches that replicas or stages do not share, and keys about recomputation or the loss that conflict."""
    yield from _check_batch(run)
    yield from _check_recomputation(run)
    yield from _check_kept(run)
    yield from _check_chunked_loss(run)
    precision = run.training.precision
    if run.optimizer.grad_reduce_in_bf16 and precision != "bf16":
        yield "optimizer.grad_reduce_in_bf16", f"training.precision is {precision}", "choose false"


def check_fp8(run: RunConfig) -> Iterator[Refusal]:
    """Refuse FP8 on CPU ranks, beside another precision than bf16, or with widths that its kernels do not take."""
    model, training, tensor = run.model, run.training, run.parallelism.tensor
    if training.fp8 == "none":
        if run.megatron_args.get("fp8_format"):
            yield "training.fp8", "megatron_args.fp8_format is given", "choose delayed, tensorwise or blockwise"
        return
    if run.environment.device == "cpu":
        yield "training.fp8", "needs Transformer Engine and a GPU, environment.device is cpu", "choose none"
    if training.precision != "bf16":
        yield (
            "training.fp8",
            f"what is not in FP8 is in bf16, and training.precision is {training.precision}",
            "choose none",
        )
    ffn = model.ffn_hidden_size or 4 * model.hidden_size
    for key, width in (("model.hidden_size", model.hidden_size), ("model.ffn_hidden_size", ffn)):
        if width % (16 * tensor):
            reason = f"training.fp8 needs a multiple of 16 * parallelism.tensor = {16 * tensor}"
            yield key, reason, "choose such a multiple, or training.fp8=none"


def _check_batch(run: RunConfig) -> Iterator[Refusal]:
    training, replicas = run.training, run.data_parallel_size
    step = training.micro_batch_size * replicas
    if training.global_batch_size % step:
        yield (
            "training.global_batch_size",
            f"not a multiple of training.micro_batch_size * replicas = {training.micro_batch_size} * {replicas}",
            f"choose {-(-training.global_batch_size // step) * step}",
        )
    stages, batches = run.parallelism.pipeline, training.global_batch_size // step
    if _interleaves(run) and batches < stages:
        yield (
            "training.global_batch_size",
            f"{batches} micro-batches per replica, the interleaved schedule needs parallelism.pipeline = {stages}",
            f"choose {stages * step}",
        )


def _check_recomputation(run: RunConfig) -> Iterator[Refusal]:
    training = run.training
    method, granularity = training.recompute_method, training.recompute_granularity
    if (method is not None) != (granularity == "full"):
        yield (
            "training.recompute_method",
            f"training.recompute_granularity is {granularity or 'null'}",
            "choose uniform or block with full, null otherwise",
        )
    if (training.recompute_num_layers is not None) != (method is not None):
        choice = "choose null" if method is None else "choose 1, or more for fewer, larger pieces"
        yield "training.recompute_num_layers", f"training.recompute_method is {method or 'null'}", choice


def _check_kept(run: RunConfig) -> Iterator[Refusal]:
    """Refuse to keep attention's outputs, or to offload, where full recomputation by this package does not run."""
    training, given = run.training, run.megatron_args
    for name in ("keep_attention_outputs", "offload_activations"):
        if not getattr(training, name):
            continue
        key = f"training.{name}"
        if training.recompute_granularity != "full":
            reason = "it concerns what full recomputation keeps"
            yield key, reason, "choose false, or training.recompute_granularity=full"
        if run.graph_implementation != "none":
            reason = "copies to and from what is kept are no part of a CUDA graph"
            yield key, reason, "choose false, or training.cuda_graphs=none"
        if training.fp8 != "none" or given.get("fp4_format"):
            reason = "layers in FP8 are recomputed by Transformer Engine, where nothing of ours is kept"
            yield key, reason, "choose false, or training.fp8=none"
        if given.get("distribute_saved_activations"):
            reason = "megatron_args.distribute_saved_activations spreads what is kept over tensor ranks"
            yield key, reason, "keep one of the two; parallelism.sequence_parallel=true spreads it too"


def _check_chunked_loss(run: RunConfig) -> Iterator[Refusal]:
    if run.training.loss_chunk_tokens is None:
        return
    if is_hybrid(run):
        reason = "Megatron's hybrid models (model.kind) compute all logits at once"
        yield "training.loss_chunk_tokens", reason, "choose null, or model.kind=gpt"
    for name in _OTHER_LOSSES:
        if run.megatron_args.get(name):
            yield (
                "training.loss_chunk_tokens",
                f"megatron_args.{name} asks for another output layer or loss",
                f"leave out one of the two: null, or megatron_args.{name}=null",
            )


def _interleaves(run: RunConfig) -> bool:
    """Whether a pipeline rank has several stages, by our key or by an argument of Megatron."""
    given, stages = run.megatron_args, run.parallelism.pipeline
    if per_stage := given.get("num_layers_per_virtual_pipeline_stage"):
        return stages > 1 and isinstance(per_stage, int) and run.model.num_layers > stages * per_stage
    layout = str(given.get("pipeline_model_parallel_layout") or "")
    # Megatron repeats a group that a factor follows, "(tt|)*3"; a repeated layer, "t*2", adds no stage.
    while (repeated := re.sub(r"\(([^()]+)\)\*(\d+)", lambda m: m[1] * min(int(m[2]), 4096), layout)) != layout:
        layout = repeated
    return bool(run.parallelism.virtual_pipeline) or (stages > 1 and layout.count("|") >= stages)
