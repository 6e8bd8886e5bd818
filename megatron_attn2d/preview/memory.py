"""What the fullest GPU of a run has to hold, and a node's host: an estimate from the configuration alone.

Upstream's `theoretical_memory_usage` does not serve as it stands: it spreads the optimizer's state over data-parallel
ranks only, not over context ranks, counts the whole sequence's activations on every rank, knows nothing of full
recomputation, nor of the buffers that attention gathers into. Its count of parameters is ours (a test compares them).

Activations follow Korthikanti et al. (arXiv 2205.05198, table 2) without the scores, which no attention kernel keeps.
"""

from dataclasses import dataclass
from math import ceil, log2

from megatron_attn2d.config.auto import workload
from megatron_attn2d.config.layer_pattern import UNEVEN_STAGES, is_hybrid
from megatron_attn2d.config.schema import Model, RunConfig
from megatron_attn2d.data import tokenizers
from megatron_attn2d.errors import UsageError
from megatron_attn2d.planner.cost import Candidate, transient_bytes

GIB = 2**30
RESERVED_GIB = 4.0
"""CUDA's context, NCCL's buffers for some ten process groups, cuBLAS workspaces and fragments: a round figure."""
HOST_RESERVED_GIB = 8.0
"""Of a rank on the host: Python, torch, CUDA's libraries and the processes that load data: a round figure."""
NOT_ESTIMATED = (
    "num_experts",
    "multi_latent_attention",
    "mtp_num_layers",
    "hybrid_layer_pattern",
    "use_megatron_fsdp",
    "use_torch_fsdp2",
    "optimizer_cpu_offload",
    *UNEVEN_STAGES,
)
"""Arguments of Megatron under which this arithmetic does not hold."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights."""

    layer: int
    embedding: int
    """Table of tokens, and that of learned positions."""
    output: int
    """The output layer's own table; 0 where it shares the embedding's."""
    layers: int

    @property
    def total(self) -> int:
        """Of the whole model."""
        return self.layers * self.layer + self.embedding + self.output


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at its fullest."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept from forward to backward, for all micro-batches in flight; of those on the host, what is on its way."""
    layer: float
    """Of the layer that is computed anew; 0 where the activations of all layers are kept."""
    mlp: float
    """Gradients within the MLP, in one layer's backward pass."""
    attention: float
    """Gathered and partial tensors of attention, in one layer's backward pass."""
    logits: float
    """Of the output layer, and the loss's copies of them; in chunks, also the gradient of the layer's weights."""
    reserved: float
    """RESERVED_GIB on a GPU."""

    @property
    def total(self) -> float:
        """The largest sum at any time: a layer's MLP, its attention and the loss run backward one after the other."""
        lasting = self.weights + self.gradients + self.optimizer + self.activations + self.reserved
        return lasting + max(self.layer + max(self.mlp, self.attention), self.logits)


@dataclass(frozen=True)
class HostMemory:
    """Bytes on one node."""

    activations: float
    """Pinned buffers of what waits there (training.offload_activations)."""
    checkpoint: float
    """The parts of a checkpoint of the node's ranks, on their way to the disk."""
    reserved: float
    """HOST_RESERVED_GIB for each rank."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


def parameters(run: RunConfig) -> Parameters:
    """The weights of the model of `run`, with the vocabulary padded as Megatron does."""
    model = run.model
    hidden, ffn, bias = model.hidden_size, ffn_width(model), model.add_bias_linear
    queries, keys, head = _widths(model)
    norm = 1 if model.normalization == "RMSNorm" else 2
    mlp = (ffn * 2 if model.swiglu else ffn, hidden)
    outputs = (queries + 2 * keys, hidden, *mlp)
    layer = sum(inputs * out for inputs, out in zip((hidden, queries, hidden, ffn), outputs, strict=True))
    layer += bias * sum(outputs) + 2 * norm * hidden + model.qk_layernorm * 2 * norm * head
    positions = (model.max_position_embeddings or run.training.seq_length) * hidden
    learned = model.position_embedding_type == "learned_absolute"
    table = _vocabulary(run) * hidden
    return Parameters(
        layer=layer,
        embedding=table + learned * positions,
        output=table if model.untie_embeddings_and_output_weights else 0,
        layers=model.num_layers,
    )


def estimate(run: RunConfig) -> Memory:
    """The fullest GPU's memory: over all pipeline stages, the largest total."""
    return max((_stage(run, stage) for stage in range(run.parallelism.pipeline)), key=lambda memory: memory.total)


def estimate_host(run: RunConfig) -> HostMemory:
    """The fullest node's memory, if all of its ranks were the fullest rank."""
    ranks = run.environment.gpus_per_node or run.world_size
    memory = estimate(run)
    shards = run.context_parallel.size * run.data_parallel_size
    whole_optimizer = 1 if run.optimizer.use_distributed_optimizer else shards  # which one of the replicas saves
    written = memory.weights / shards + memory.optimizer / whole_optimizer
    return HostMemory(
        activations=ranks * max(_offloaded(run, stage) for stage in range(run.parallelism.pipeline)),
        checkpoint=ranks * written * run.checkpoint.save,
        reserved=ranks * HOST_RESERVED_GIB * GIB,
    )


def check(run: RunConfig) -> None:
    """Raise UsageError if the estimate is more than what `cluster` says a GPU or a node has.

    The message names the largest part, and what would make it smaller.
    """
    if _not_estimated(run):
        return
    for what, memory, key in (
        ("a GPU", estimate(run), "memory_gib"),
        ("a node", estimate_host(run), "host_memory_gib"),
    ):
        room = getattr(run.cluster, key)
        if room is not None and memory.total > room * GIB:
            part = max((name for name in vars(memory) if name != "reserved"), key=lambda name: getattr(memory, name))
            raise UsageError(
                f"{what} would have to hold {memory.total / GIB:.1f} GiB, and cluster.{key} is {room:g}; the largest "
                f"part is {part}, {getattr(memory, part) / GIB:.1f} GiB: {_smaller(run, part, key)}"
            )


def _smaller(run: RunConfig, part: str, key: str) -> str:
    """What would make a part of the memory smaller."""
    training, choices = run.training, []
    if key == "host_memory_gib":
        choices += ["training.keep_attention_outputs=false"] * run.keeps_attention_outputs
        return " or ".join([*choices, "more nodes"])
    if part == "activations":
        full = training.recompute_granularity == "full"
        choices.append("training.offload_activations=true" if full else "training.recompute_granularity=full")
    elif part == "logits" and training.loss_chunk_tokens is None:
        choices.append("training.loss_chunk_tokens=2048")
    elif part == "gradients" and training.precision == "bf16" and not run.optimizer.grad_reduce_in_bf16:
        choices.append("optimizer.grad_reduce_in_bf16=true")
    elif part == "optimizer" and not run.optimizer.use_distributed_optimizer:
        choices.append("optimizer.use_distributed_optimizer=true")
    elif part == "attention" and run.context_parallel.mode == "attention2d":
        choices.append("a larger context_parallel.head_groups")
    choices.append("a larger parallelism.tensor with sequence_parallel=true")
    return " or ".join([*choices, "a larger context_parallel.size"])


def report(run: RunConfig) -> str:
    """The estimate for people: parts, total, and whether what `cluster` describes holds them."""
    weights = parameters(run).total
    count = f"{weights / 1e9:.3g} B parameters" if weights >= 1e9 else f"{weights / 1e6:.3g} M parameters"
    if reason := _not_estimated(run):
        return f"{count} without {reason}; no estimate of memory with it"
    memory = estimate(run)
    lines = [f"{count}; the fullest rank, estimated:", *_parts(memory, memory.total, run.cluster.memory_gib)]
    if run.training.offload_activations:
        host = estimate_host(run)
        lines += ["the host of a node, estimated:", *_parts(host, host.total, run.cluster.host_memory_gib)]
    if _known_vocabulary(run) is None:
        lines.append(f"the vocabulary of {run.data.tokenizer_type} is not known here, and not counted")
    return "\n".join(lines)


def _parts(memory: Memory | HostMemory, total: float, room: float | None) -> list[str]:
    verdict = "" if room is None else f" of {room:g}: {'fits' if total <= room * GIB else 'DOES NOT FIT'}"
    return [
        *(f"{name:>14}{size / GIB:8.2f} GiB" for name, size in vars(memory).items()),
        f"{'at most':>14}{total / GIB:8.2f} GiB{verdict}",
    ]


def _not_estimated(run: RunConfig) -> str | None:
    """The argument of Megatron under which there is no estimate, if one is given."""
    return next((name for name in NOT_ESTIMATED if run.megatron_args.get(name)), None)


def ffn_width(model: Model) -> int:
    """Width of the MLP, by Megatron's rule where none is given."""
    if model.ffn_hidden_size:
        return model.ffn_hidden_size
    return 4 * model.hidden_size * 2 // 3 // 64 * 64 if model.swiglu else 4 * model.hidden_size


def _widths(model: Model) -> tuple[int, int, int]:
    """Widths of all query heads, of all key heads, of one head."""
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    return model.num_attention_heads * head, (model.num_query_groups or model.num_attention_heads) * head, head


def _vocabulary(run: RunConfig) -> int:
    multiple = 128 * run.parallelism.tensor
    return ceil((_known_vocabulary(run) or 0) / multiple) * multiple


def _known_vocabulary(run: RunConfig) -> int | None:
    """Ids of the run's tokenizer; where it can't be read on this machine what data.vocab_size says, or None."""
    try:
        return tokenizers.vocabulary(run.data) or run.data.vocab_size
    except UsageError:  # `train` tells why
        return run.data.vocab_size


def _stage(run: RunConfig, stage: int) -> Memory:
    parallel, count = run.parallelism, parameters(run)
    first, last = stage == 0, stage == parallel.pipeline - 1
    held = count.layers // parallel.pipeline * count.layer + first * count.embedding
    # A last stage apart from the first holds a copy of a shared table.
    held += last * (count.output if count.output or first else _vocabulary(run) * run.model.hidden_size)
    held = ceil(held / parallel.tensor)
    weight, state = (4, 8) if run.training.precision == "fp32" else (2, 12)  # 12: fp32 copy of the weight, two moments
    shards = run.context_parallel.size * run.data_parallel_size if run.optimizer.use_distributed_optimizer else 1
    kept, anew = _kept_per_token(run, stage)
    return Memory(
        weights=held * weight,
        gradients=held * (2 if run.optimizer.grad_reduce_in_bf16 else 4),
        optimizer=held * state / shards,
        activations=_tokens(run) * kept,
        layer=_tokens(run) * anew,
        mlp=_tokens(run) * _width(run) * ffn_width(run.model) * (2 if run.model.swiglu else 1) / parallel.tensor,
        attention=_attention(run),
        logits=last * _logits(run),
        reserved=RESERVED_GIB * GIB * (run.environment.device == "cuda"),
    )


def _width(run: RunConfig) -> int:
    """Bytes of a number in the forward pass."""
    return 4 if run.training.precision == "fp32" else 2


def _tokens(run: RunConfig) -> float:
    """Tokens of a micro-batch on one rank."""
    return run.training.micro_batch_size * run.training.seq_length / run.context_parallel.size


def _logits(run: RunConfig) -> float:
    """Bytes of the output layer's backward pass: logits in the model's dtype and in fp32, and their gradient."""
    rows, width = _vocabulary(run) / run.parallelism.tensor, _width(run)
    chunk, tokens = run.training.loss_chunk_tokens, _tokens(run)
    if chunk is None:
        return tokens * rows * (2 * width + 4)
    # The gradient of the weights in fp32 and that of a chunk; hidden states of all tokens and their gradient.
    weights, hidden = rows * run.model.hidden_size * (4 + width), 2 * tokens * run.model.hidden_size * width
    return min(chunk, tokens) * rows * (2 * width + 4) + weights + hidden


def _kept_per_token(run: RunConfig, stage: int) -> tuple[float, float]:
    """Bytes of activations per token that a stage's GPU holds at its fullest, and those of the layer computed anew."""
    training = run.training
    layers = run.model.num_layers // run.parallelism.pipeline
    whole, _ = _layer_per_token(run)
    flying = _micro_batches_in_flight(run, stage)
    if training.recompute_granularity != "full":
        return flying * layers * whole, 0.0
    pieces, each, per_piece = _recomputed(run)
    kept = 0 if training.recompute_method == "uniform" else flying * (layers - pieces) * whole
    # On the host: what the piece at hand has brought back, and the piece that comes next.
    kept += min(2, pieces) * each if training.offload_activations else flying * pieces * each
    return kept, per_piece * whole


def _recomputed(run: RunConfig) -> tuple[int, float, int]:
    """Into how many pieces a stage's recomputed layers fall, what each keeps per token, and how many layers it has."""
    training, layers = run.training, run.model.num_layers // run.parallelism.pipeline
    layers *= 2 if is_hybrid(run) else 1  # attention and MLP are layers of their own there
    block = min(training.recompute_num_layers or 1, layers)
    # uniform: every block of layers keeps its input; block: so many layers each keep theirs.
    pieces, per_piece = (ceil(layers / block), block) if training.recompute_method == "uniform" else (block, 1)
    _, begin = _layer_per_token(run)
    model, tensor = run.model, run.parallelism.tensor
    outputs = (_widths(model)[0] * _width(run) + 4 * model.num_attention_heads) / tensor
    return pieces, begin + run.keeps_attention_outputs * per_piece * outputs, per_piece


def _offloaded(run: RunConfig, stage: int) -> float:
    """Bytes of the pinned buffers of one rank; torch rounds each up to a power of two."""
    training, model, tensor = run.training, run.model, run.parallelism.tensor
    if not training.offload_activations:
        return 0.0
    pieces, _, per_piece = _recomputed(run)
    begin = _layer_per_token(run)[1]
    outputs = _widths(model)[0] * _width(run) / tensor, 4 * model.num_attention_heads / tensor
    buffers = [begin, *(run.keeps_attention_outputs * per_piece * outputs)]
    flying = ceil(_micro_batches_in_flight(run, stage))
    return flying * pieces * sum(2 ** ceil(log2(_tokens(run) * size)) for size in buffers)


def _layer_per_token(run: RunConfig) -> tuple[float, float]:
    """Bytes per token that a layer keeps, and those of its input alone."""
    model, tensor, width = run.model, run.parallelism.tensor, _width(run)
    queries, keys, _ = _widths(model)
    spread = tensor if run.parallelism.sequence_parallel else 1
    begin = width * model.hidden_size / spread
    masks = 2 * model.hidden_size / spread if model.hidden_dropout else 0
    # Inputs of two norms, of QKV and of the MLP; Q, K, V, O; the MLP before and after its nonlinearity.
    inside = 2 * queries + 2 * keys + ffn_width(model) * (3 if model.swiglu else 2)
    return 4 * begin + width * inside / tensor + masks, begin


def _micro_batches_in_flight(run: RunConfig, stage: int) -> float:
    stages, virtual = run.parallelism.pipeline, run.parallelism.virtual_pipeline
    batches = run.training.global_batch_size // (run.training.micro_batch_size * run.data_parallel_size)
    if virtual:  # upstream's figure for the interleaved schedule, an upper bound for later stages
        return stages * (1 + (stages - 1) / (stages * virtual))
    return min(stages - stage, batches)


def _attention(run: RunConfig) -> float:
    """Bytes of one layer's backward pass besides what is kept, by the planner's formula."""
    size = run.context_parallel.size
    axes = {"attention2d": run.grid, "all_gather": (1, size, 1), "ulysses": (size, 1, 1), "ring": None}
    groups = {"attention2d": run.head_groups}
    return max(
        transient_bytes(Candidate(mode, axes[mode], None), size, workload(run), groups.get(mode, 1))
        for mode in {run.context_parallel.mode, *(run.context_parallel.layer_modes or ())}
    )
