"""Whether the keys of a run fit together: every refusal before any process starts."""

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from math import prod

from megatron_attn2d.config import keys
from megatron_attn2d.config.auto import with_grid
from megatron_attn2d.config.layer_pattern import ATTENTION, PIPE, SKIPPED, is_hybrid, main_layers
from megatron_attn2d.config.prefixes import prefix_fault
from megatron_attn2d.config.schema import GRAPH_IMPLEMENTATIONS, RunConfig
from megatron_attn2d.errors import ConfigError, ConfigErrors
from megatron_attn2d.megatron.upstream.graph_environment import graph_fault
from megatron_attn2d.planner import factorisations
from megatron_attn2d.run import checkpoints

UNEVEN = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)
"""Arguments of Megatron that share layers out over stages otherwise than evenly."""
PER_LAYER = ("window_attn_skip_freq", "moe_layer_freq", "no_rope_freq", "linear_attention_freq")
"""Arguments of Megatron that take a number, or 0 or 1 for each layer."""
_EMBEDDED_EXAMPLE = 512
"""Tokens of the longest example that `data.docstrings` builds."""
_RECURRENT = {"M", "G"}
"""Layers of a hybrid model that go through the tokens one after the other."""
_ROPE_SCALING = (
    *("use_rope_scaling", "rope_scaling_factor", "rotary_scaling_factor", "rotary_seq_len_interpolation_factor"),
    "yarn_original_max_position_embeddings",
)
"""Arguments of Megatron that model.rope_scaling becomes."""
_OTHER_LOSSES = (
    *("mtp_num_layers", "cross_entropy_loss_fusion", "fp16_lm_cross_entropy", "use_mup"),
    *("defer_embedding_wgrad_compute",),
)
"""Arguments of Megatron that need all logits, or another loss than the plain cross entropy."""
_LAUNCHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}

Refusal = tuple[str, str, str]
"""Key, reason, valid choice."""


def check(run: RunConfig) -> None:
    """Raise ConfigError, naming each key with its value, the reason and a valid choice, if `run` cannot work."""
    parts = (
        *(_check_model, _check_layers, _check_hybrid, _check_parallelism, _check_world, _check_batch),
        *(_check_fp8, _check_data, _check_documents, _check_rest),
    )
    errors = _errors(run, *parts)
    if run.graph_implementation != "none":
        errors += _errors(run, _check_graphs)
    if not {error.key for error in errors} & {"model.num_query_groups", "parallelism.tensor"}:
        # The grid that trains is checked, which the planner may have chosen: it needs heads that divide.
        resolved = with_grid(run)
        errors += _told(run, [*_check_context(resolved), *_check_layer_modes(resolved)])
    if errors:
        raise ConfigErrors(errors)


def _errors(run: RunConfig, *parts: Callable[[RunConfig], Iterator[Refusal]]) -> list[ConfigError]:
    return _told(run, (refusal for part in parts for refusal in part(run)))


def _told(run: RunConfig, refusals: Iterable[Refusal]) -> list[ConfigError]:
    return [ConfigError(key, keys.given(run, key), reason, choice) for key, reason, choice in refusals]


def _divisors(number: int, limit: int = 8) -> str:
    """'1, 2, 4': what divides `number`, the largest `limit` of them."""
    divisors = [d for d in range(1, min(number, 4096) + 1) if number % d == 0]
    return ", ".join(map(str, divisors[-limit:]))


def _check_model(run: RunConfig) -> Iterator[Refusal]:
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
            f"choose one of {_divisors(heads)}",
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


def _check_parallelism(run: RunConfig) -> Iterator[Refusal]:
    parallel, model = run.parallelism, run.model
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    if heads % parallel.tensor:
        yield (
            "parallelism.tensor",
            f"does not divide model.num_attention_heads = {heads}",
            f"choose one of {_divisors(heads)}",
        )
    elif groups % parallel.tensor and parallel.tensor % groups:
        yield (
            "parallelism.tensor",
            f"neither divides model.num_query_groups = {groups} nor is a multiple of it",
            f"choose one of {_divisors(groups)}",
        )
    if parallel.sequence_parallel:
        if parallel.tensor == 1:
            yield "parallelism.sequence_parallel", "needs parallelism.tensor > 1, which is 1", "choose false"
        shard = run.training.seq_length // run.context_parallel.size
        if shard % parallel.tensor:
            yield (
                "parallelism.sequence_parallel",
                f"{shard} tokens per context rank do not split over parallelism.tensor = {parallel.tensor}",
                "choose false, or a training.seq_length that is a multiple of tensor * 2 * context",
            )
    stages, virtual = parallel.pipeline, parallel.virtual_pipeline
    if virtual is not None and stages == 1:
        yield "parallelism.virtual_pipeline", "needs parallelism.pipeline > 1, which is 1", "choose null"
    key, chunks = (
        ("parallelism.pipeline", stages) if virtual is None else ("parallelism.virtual_pipeline", stages * virtual)
    )
    if model.num_layers % chunks and not any(map(run.megatron_args.get, (*UNEVEN, "hybrid_layer_pattern"))):
        yield (
            key,
            f"{chunks} stages do not share model.num_layers = {model.num_layers} evenly",
            f"stages in all: one of {_divisors(model.num_layers)}",
        )


def _check_context(run: RunConfig) -> Iterator[Refusal]:
    context, length = run.context_parallel, run.training.seq_length
    chunks = 2 * context.size
    if context.size > 1 and length % chunks:
        yield (
            "training.seq_length",
            f"not a multiple of 2 * context_parallel.size = {chunks}, the chunks of the zigzag",
            f"choose {' or '.join(str(n) for n in (length // chunks * chunks, -(-length // chunks) * chunks) if n)}",
        )
    if context.grid != "auto":
        grids = ", ".join(f"[{rows}, {columns}]" for rows, columns in factorisations(context.size))
        if context.mode != "attention2d":
            yield "context_parallel.grid", f"context_parallel.mode = {context.mode} has no grid", "choose auto"
        if prod(context.grid) != context.size:
            yield (
                "context_parallel.grid",
                f"{prod(context.grid)} ranks, but context_parallel.size is {context.size}",
                f"choose auto or one of {grids}",
            )
    if context.tile is not None:
        (_, rows, columns), (tile_rows, tile_columns) = run.grid, run.tile
        if context.mode != "attention2d":
            yield "context_parallel.tile", f"context_parallel.mode = {context.mode} has no grid", "choose null"
        elif rows % tile_rows or columns % tile_columns:
            yield (
                "context_parallel.tile",
                f"does not fill the grid of {rows} rows x {columns} columns",
                f"rows: one of {_divisors(rows)}; columns: one of {_divisors(columns)}",
            )
    kv_heads = max((run.model.num_query_groups or run.model.num_attention_heads) // run.parallelism.tensor, 1)
    if kv_heads % run.head_groups:
        yield (
            "context_parallel.head_groups",
            f"does not divide the {kv_heads} key/value heads of a tensor rank",
            f"choose auto or one of {_divisors(kv_heads)}",
        )
    transformer_engine = importlib.util.find_spec("transformer_engine") is not None and run.environment.device == "cuda"
    spread = {"ulysses": ("context_parallel.size", context.size), "attention2d": ("context_parallel.grid", run.grid[0])}
    for mode in sorted(spread.keys() & {context.mode, *(context.layer_modes or [])}):
        key, parts = spread[mode]
        heads = max(run.model.num_attention_heads // run.parallelism.tensor, 1)
        repeats = not transformer_engine or mode == "attention2d"  # Transformer Engine does not repeat heads
        if heads % parts or (kv_heads % parts and not (repeats and parts % kv_heads == 0)):
            yield (
                key,
                f"{heads} query and {kv_heads} key/value heads per tensor rank do not spread over {parts} ranks",
                f"spread them over one of {_divisors(kv_heads)}",
            )
    ours = context.mode == "attention2d" or not transformer_engine
    if run.logging.attention_communication and not ours:
        yield (
            "logging.attention_communication",
            f"context_parallel.mode = {context.mode} is Transformer Engine's, whose messages are not followed",
            "choose false, or context_parallel.mode=attention2d",
        )


def _check_layer_modes(run: RunConfig) -> Iterator[Refusal]:
    context, modes = run.context_parallel, run.context_parallel.layer_modes
    if modes is None:
        return
    if len(modes) != run.model.num_layers:
        yield (
            "context_parallel.layer_modes",
            f"names {len(modes)} layers, but model.num_layers is {run.model.num_layers}",
            "name the mode of each layer, or null for context_parallel.mode in all",
        )
    if "attention2d" in modes and context.mode != "attention2d":
        yield "context_parallel.mode", "context_parallel.layer_modes has attention2d", "choose attention2d"
    elif context.mode not in modes:
        yield (
            "context_parallel.mode",
            "is the mode of no layer in context_parallel.layer_modes",
            f"choose one of {', '.join(sorted(set(modes)))}",
        )


def _check_world(run: RunConfig) -> Iterator[Refusal]:
    where, parallel = run.environment, run.parallelism
    expert_ranks = parallel.tensor * run.context_parallel.size * run.data_parallel_size
    if expert_ranks % parallel.expert:
        yield (
            "parallelism.expert",
            f"does not divide tensor * context * data = {expert_ranks} ranks",
            f"choose one of {_divisors(expert_ranks)}",
        )
    experts = run.megatron_args.get("num_experts")
    if parallel.expert > 1 and not experts:
        yield "parallelism.expert", "the model has no experts", "choose 1, or set megatron_args.num_experts"
    for name in sorted(where.variables.keys() & _LAUNCHERS):
        yield "environment.variables", f"{name} is the launcher's, different in each rank", f"leave out {name}"
    if where.device == "cpu" and (where.nodes or 1) > 1:
        yield "environment.nodes", "CPU ranks run on one machine", "choose 1"
    if where.device == "cuda" and where.nodes and not where.gpus_per_node:
        yield "environment.nodes", "environment.gpus_per_node is not given", "set that too, or leave out both"
    if where.device == "cpu" and where.gpus_per_node is not None:
        yield "environment.gpus_per_node", "environment.device = cpu has no GPUs", "choose null"


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
    yield from _check_long(run)


def _check_long(run: RunConfig) -> Iterator[Refusal]:
    """The keys that long sequences need, which step in for parts of Megatron's layers and loss."""
    training, given = run.training, run.megatron_args
    for name in ("keep_attention_outputs", "offload_activations"):
        if not getattr(training, name):
            continue
        key = f"training.{name}"
        if training.recompute_granularity != "full":
            reason = "it is about what full recomputation keeps"
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
    if training.loss_chunk_tokens is not None:
        if is_hybrid(run):
            reason = "Megatron's hybrid models (model.kind) compute all logits at once"
            yield "training.loss_chunk_tokens", reason, "choose null, or model.kind=gpt"
        for name in _OTHER_LOSSES:
            if given.get(name):
                yield (
                    "training.loss_chunk_tokens",
                    f"megatron_args.{name} asks for another output layer or loss",
                    f"leave out one of the two: null, or megatron_args.{name}=null",
                )
    if run.optimizer.grad_reduce_in_bf16 and training.precision != "bf16":
        yield "optimizer.grad_reduce_in_bf16", f"training.precision is {training.precision}", "choose false"


def _interleaves(run: RunConfig) -> bool:
    """Whether a pipeline rank has several stages, said by our key or by one of Megatron's arguments."""
    given, stages = run.megatron_args, run.parallelism.pipeline
    if per_stage := given.get("num_layers_per_virtual_pipeline_stage"):
        return stages > 1 and isinstance(per_stage, int) and run.model.num_layers > stages * per_stage
    layout = str(given.get("pipeline_model_parallel_layout") or "")
    # as Megatron reads it: "(tt|)*3" and "t*2" repeat
    while (repeated := re.sub(r"\(([^()]+)\)\*(\d+)", lambda m: m[1] * min(int(m[2]), 4096), layout)) != layout:
        layout = repeated
    return bool(run.parallelism.virtual_pipeline) or (stages > 1 and layout.count("|") >= stages)


def _check_layers(run: RunConfig) -> Iterator[Refusal]:
    """What Megatron's own arguments say of the layers, and refuse without words or only in the first step."""
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
            yield f"megatron_args.{name}", f"says it of {len(value)} layers, model.num_layers is {layers}", "name each"
        elif isinstance(value, int) and value < 1:
            yield f"megatron_args.{name}", "means every layer of that many", "choose 1 or more, or leave it out"


def _check_hybrid(run: RunConfig) -> Iterator[Refusal]:
    if not is_hybrid(run):
        return
    given, where, model = run.megatron_args, run.parallelism, run.model
    for name in (*UNEVEN, "num_layers_per_virtual_pipeline_stage"):
        if given.get(name):
            choice = "write stages as | in megatron_args.hybrid_layer_pattern"
            yield f"megatron_args.{name}", "the stages of model.kind = hybrid stand in its pattern", choice
    for name in ("moe_layer_freq", *SKIPPED):  # which a hybrid model's layers spell otherwise
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
        reason = f"has {found} layers of attention (* or +), model.num_layers is {model.num_layers}"
        choice = f"choose model.num_layers={found}, or another pattern" if found else "write them into it"
        yield "megatron_args.hybrid_layer_pattern", reason, choice
    stages, found = where.pipeline * (where.virtual_pipeline or 1), pattern.count(PIPE) + 1
    if found != stages and (where.virtual_pipeline or found > 1):
        reason = f"has {found} stages, parallelism.pipeline x virtual_pipeline are {stages}"
        yield "megatron_args.hybrid_layer_pattern", reason, f"write {stages - 1} | into it"


def _check_fp8(run: RunConfig) -> Iterator[Refusal]:
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
            yield key, f"training.fp8 wants multiples of 16 * parallelism.tensor = {16 * tensor}", "training.fp8=none"


def _check_graphs(run: RunConfig) -> Iterator[Refusal]:
    model, training, given = run.model, run.training, run.megatron_args
    graphs, implementation = training.cuda_graphs, run.graph_implementation
    if graphs == "none":
        chosen = {one: name for name, one in GRAPH_IMPLEMENTATIONS.items()}.get(implementation, "layer")
        yield "training.cuda_graphs", f"megatron_args.cuda_graph_impl is {implementation}", f"choose {chosen}"
    if run.environment.device == "cpu":
        yield "training.cuda_graphs", "environment.device = cpu has no CUDA graphs", "choose none"
    if fault := graph_fault({"NCCL_GRAPH_REGISTER": "0", **{k: str(v) for k, v in run.environment.variables.items()}}):
        yield "environment.variables", *fault
    if run.logging.attention_communication:
        reason = f"it measures by the CPU's calls, of which training.cuda_graphs = {graphs} makes none"
        yield "logging.attention_communication", reason, "choose false, or training.cuda_graphs=none"
    if training.check_finite:
        reason = f"it waits for the GPU in each layer, which training.cuda_graphs = {graphs} cannot"
        yield "training.check_finite", reason, "choose false, or training.cuda_graphs=none"
    if implementation == "full_iteration":
        if training.precision == "fp16":
            reason = f"the scale of the loss would stay as training.cuda_graphs = {graphs} has captured it"
            yield "training.precision", reason, "choose bf16, or training.cuda_graphs=layer"
        if run.logging.timing_log_level:
            reason = f"timers wait for the GPU, which training.cuda_graphs = {graphs} cannot"
            yield "logging.timing_log_level", reason, "choose 0, or training.cuda_graphs=layer"
        return
    if implementation == "transformer_engine" and training.precision != "bf16":
        reason = f"Megatron captures training.cuda_graphs = {graphs} in bf16"
        yield "training.precision", reason, "choose bf16, or training.cuda_graphs=layer"
    if training.recompute_granularity == "full":
        reason = f"a layer's graph (training.cuda_graphs = {graphs}) can't be recomputed as a whole"
        yield "training.recompute_granularity", reason, "choose selective, or training.cuda_graphs=iteration"
    if training.recompute_granularity == "selective" and model.attention_dropout:
        yield (
            "training.recompute_granularity",
            f"attention with dropout can't be recomputed in a graph (training.cuda_graphs = {graphs})",
            "choose null, or model.attention_dropout=0.0",
        )
    if graphs == "layer" and given.get("num_experts") and not given.get("moe_pad_expert_input_to_capacity"):
        yield "training.cuda_graphs", "how many tokens an expert gets is known to the CPU alone", "choose attention"
    if implementation == "local" and training.eval_iters and (model.attention_dropout or model.hidden_dropout):
        yield (
            "training.eval_iters",
            f"validation would replay graphs that drop as in training (training.cuda_graphs = {graphs})",
            "choose 0, or megatron_args.cuda_graph_impl=transformer_engine",
        )


def _check_data(run: RunConfig) -> Iterator[Refusal]:
    data = run.data
    weights = data.split.split(",")
    try:
        training, validation, _ = map(float, weights)
    except ValueError:
        yield "data.split", "not three numbers", "write 98,1,1"
        return
    if training == 0:
        yield "data.split", "nothing is left for training", "write 98,1,1"
    if run.training.eval_iters and not validation and not data.mock:
        yield (
            "training.eval_iters",
            f"data.split = {data.split} leaves nothing for validation",
            "choose 0, or data.split=98,2,0",
        )
    if data.mock and data.paths:
        yield "data.mock", "data.paths are given too", "choose one of the two"
    bytes_ = (data.tokenizer_type, data.vocab_size, data.null_tokenizer_eod_id) == ("NullTokenizer", 512, 256)
    if not (data.paths or data.mock or bytes_):
        yield (
            "data.paths",
            "the embedded data set is bytes, the tokenizer is not",
            "name .bin/.idx prefixes, or set data.mock=true, or extend models/gpt_tiny_bytes.yaml",
        )
    for fault in filter(None, map(prefix_fault, data.paths)):
        yield "data.paths", *fault
    if isinstance(data.paths, dict) and any(weight <= 0 for weight in data.paths.values()):
        yield "data.paths", "a weight of a blend is not positive", "leave out what has weight 0"
    if data.tokenizer_type == "NullTokenizer":
        if data.vocab_size is None:
            yield "data.vocab_size", "NullTokenizer does not know the size of the vocabulary", "choose 512 for bytes"
        if data.tokenizer_model is not None:
            yield (
                "data.tokenizer_model",
                "data.tokenizer_type = NullTokenizer takes ids as they are, and reads no file",
                "choose null, or name data.tokenizer_type too",
            )
        eod = data.null_tokenizer_eod_id
        if eod is not None and data.vocab_size is not None and eod >= data.vocab_size:
            yield "data.null_tokenizer_eod_id", f"outside data.vocab_size = {data.vocab_size}", "choose 256 for bytes"
    else:
        if data.tokenizer_model is None:
            yield "data.tokenizer_model", f"{data.tokenizer_type} is read from local files", "name its file or folder"


def _check_documents(run: RunConfig) -> Iterator[Refusal]:
    data, multiple, given = run.data, run.document_multiple, run.megatron_args
    if not multiple:
        if data.document_multiple:
            yield "data.document_multiple", "data.document_masking is false", "choose null, or document_masking=true"
        return
    if data.format == "sft" and data.mock:
        yield "data.format", "made-up data (data.mock) holds no examples", "choose text, or data.mock=false"
    elif data.format == "sft" and not data.paths and run.training.seq_length < _EMBEDDED_EXAMPLE:
        reason = f"an example of the embedded data set has up to {_EMBEDDED_EXAMPLE} tokens, and is not cut"
        yield "training.seq_length", reason, f"choose {_EMBEDDED_EXAMPLE} or more, or name data.paths"
    chunks = 2 * run.context_parallel.size if run.context_parallel.size > 1 else 1
    if multiple % chunks:
        yield (
            "data.document_multiple",
            f"not a multiple of 2 * context_parallel.size = {chunks}, the chunks of a document",
            f"choose {-(-multiple // chunks) * chunks}, or null",
        )
    elif run.training.seq_length % multiple:
        length = -(-run.training.seq_length // multiple) * multiple
        reason = f"not a multiple of data.document_multiple = {multiple}, where documents begin"
        yield "training.seq_length", reason, f"choose {length}"
    if run.training.micro_batch_size > 1 and run.parallelism.pipeline > 1:
        reason = "documents of several samples go through as one sequence, for which pipeline stages are not prepared"
        yield "training.micro_batch_size", reason, "choose 1, and a longer training.seq_length"
    masking = "data.format = sft" if data.format == "sft" else "data.document_masking"
    other = "leave it out" if data.format == "sft" else "leave it out, or data.document_masking=false"
    if run.graph_implementation != "none":
        reason = f"a graph is for one set of lengths, and {masking} brings others with each batch"
        yield "training.cuda_graphs", reason, "choose none"
    if given.get("reset_position_ids"):
        reason = f"{masking} begins positions anew in each document already"
        yield "megatron_args.reset_position_ids", reason, "leave it out"
    for name in ("experimental_attention_variant", "linear_attention_freq"):
        if given.get(name):
            reason = f"its layers would carry what they know from a document into the next, under {masking}"
            yield f"megatron_args.{name}", reason, other
    if layers := sorted(set(str(given.get("hybrid_layer_pattern") or "")) & _RECURRENT):
        reason = f"layers {', '.join(layers)} would carry what they know from a document into the next, under {masking}"
        yield "megatron_args.hybrid_layer_pattern", reason, "choose * or +"


def _check_rest(run: RunConfig) -> Iterator[Refusal]:
    optimizer = run.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield "optimizer.min_lr", f"more than optimizer.lr = {optimizer.lr}", f"choose {optimizer.lr} or less"
    if optimizer.lr_decay_style == "WSD" and not run.megatron_args.keys() & {
        "lr_wsd_decay_iters",
        "lr_wsd_decay_samples",
    }:
        yield "optimizer.lr_decay_style", "WSD decays over its last steps", "set megatron_args.lr_wsd_decay_iters too"
    decay = optimizer.lr_decay_iters or run.training.train_iters
    if optimizer.lr_warmup_iters >= decay:
        yield "optimizer.lr_warmup_iters", f"the learning rate decays over {decay} steps", f"choose less than {decay}"
    if optimizer.overlap_param_gather and not (optimizer.use_distributed_optimizer and optimizer.overlap_grad_reduce):
        yield (
            "optimizer.overlap_param_gather",
            "needs use_distributed_optimizer and overlap_grad_reduce",
            "choose false, or set both to true",
        )
    if optimizer.optimizer == "sgd" and optimizer.use_distributed_optimizer:
        yield "optimizer.use_distributed_optimizer", "Megatron shards the state of Adam alone", "choose false, or adam"
    if optimizer.optimizer == "sgd" and run.checkpoint.save and not run.megatron_args.get("no_save_optim"):
        yield (
            "optimizer.optimizer",
            "Megatron can't load a saved state of SGD, so that the run could not be continued",
            "choose adam, or checkpoint.save=false",
        )
    if run.environment.device == "cpu" and run.training.precision == "fp16":
        yield "training.precision", "environment.device = cpu computes in fp32 or bf16", "choose fp32"
    if run.checkpoint.save_interval is not None and not run.checkpoint.save:
        yield "checkpoint.save_interval", "checkpoint.save is false", "choose null"
    for key, wanted in (
        ("checkpoint.keep_last", run.checkpoint.keep_last),
        ("checkpoint.async_save", run.checkpoint.async_save),
    ):
        if wanted and not run.checkpoint.save:
            yield key, "checkpoint.save is false", "leave it out"
    yield from _check_start(run)
    if run.checkpoint.async_save and importlib.util.find_spec("nvidia_resiliency_ext") is None:
        yield (
            "checkpoint.async_save",
            "Megatron saves in the background by nvidia_resiliency_ext, which is not installed",
            "pip install 'nvidia-resiliency-ext>=0.6', or choose false",
        )
    if run.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        yield "logging.wandb_project", "wandb is not installed", "pip install 'megatron-attn2d[wandb]', or choose null"


def _check_start(run: RunConfig) -> Iterator[Refusal]:
    checkpoint, arguments = run.checkpoint, run.megatron_args
    if checkpoint.load and checkpoint.start_from:
        yield "checkpoint.start_from", "checkpoint.load is given too", "start_from takes the weights alone; keep one"
    for name in (name for name in keys.FIRST_START if arguments.get(name) not in (None, False)):
        key = f"megatron_args.{name}"
        if not (checkpoint.load or checkpoint.start_from):
            way = "leave it out"
            if name == "ckpt_step":
                way += f", and to go back in a run write the step into its checkpoints/{checkpoints.TRACKER}"
            yield key, "is about a start from checkpoint.load or checkpoint.start_from, which are null", way
        elif checkpoint.start_from and name in {"no_load_optim", "no_load_rng", "override_ckpt_iteration"}:
            yield key, "checkpoint.start_from takes the weights alone", "leave it out"
    for key in checkpoint.may_change:
        if not keys.is_key(key):
            yield "checkpoint.may_change", f"{key} is no key", "write section.key"
        elif keys.is_fixed(key):
            yield "checkpoint.may_change", f"weights or states depend on {key}", "leave it out"
    torch_dist = arguments.get("ckpt_format") in (None, "torch_dist")
    if checkpoint.save and checkpoint.verify_integrity and not torch_dist:
        yield (
            "checkpoint.verify_integrity",
            f"only checkpoints of the format torch_dist carry checksums, not {arguments['ckpt_format']}",
            "choose false, or leave megatron_args.ckpt_format out",
        )
    if checkpoint.async_save and not torch_dist:
        reason = f"Megatron saves no checkpoints of the format {arguments['ckpt_format']} in the background"
        yield "checkpoint.async_save", reason, "choose false, or leave megatron_args.ckpt_format out"
    if arguments.get("non_persistent_save_interval") and arguments.get("non_persistent_ckpt_type") is None:
        reason = "Megatron saves those by a megatron_args.non_persistent_ckpt_type, which is null"
        yield "megatron_args.non_persistent_save_interval", reason, "set that to global, or leave both out"
