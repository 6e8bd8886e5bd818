"""Estimates the memory of the fullest GPU of a run, and of a node's host, from the configuration alone.

Upstream's `theoretical_memory_usage` does not serve here. It shards the optimizer's state over data-parallel ranks
only, not over context ranks, it counts the whole sequence's activations on every rank, and it ignores full
recomputation and the buffers into which attention gathers. Its count of parameters equals the one here (a test compares
them).

Activations follow Korthikanti et al. (arXiv 2205.05198, table 2) without the scores, which no attention kernel keeps.
"""

from dataclasses import dataclass
from math import ceil, log2

from megatron_attn2d.config.auto import workload
from megatron_attn2d.config.layer_pattern import UNEVEN_STAGES, is_hybrid
from megatron_attn2d.config.schema import RunConfig
from megatron_attn2d.errors import UsageError
from megatron_attn2d.planner.cost import Candidate, transient_bytes
from megatron_attn2d.preview.parameters import ffn_width, known_vocabulary, padded_vocabulary, parameters, widths

GIB = 2**30
RESERVED_GIB = 4.0
"""GiB on a GPU for CUDA's context, NCCL's buffers of some ten process groups, cuBLAS workspaces and fragmentation: a
round figure."""
HOST_RESERVED_GIB = 8.0
"""GiB per rank on the host for Python, torch, CUDA's libraries and the processes that load data: a round figure."""
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
"""Arguments of Megatron under which this arithmetic does not hold, so that there is no estimate."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at its peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Activations kept from forward to backward, for all micro-batches in flight; if they are offloaded, those in
    transfer."""
    layer: float
    """Activations of the layer that is recomputed; 0 where those of all layers are kept."""
    mlp: float
    """Gradients within the MLP, in one layer's backward pass."""
    attention: float
    """Gathered and partial tensors of attention, in one layer's backward pass."""
    logits: float
    """Logits and the loss's copies of them; for logits in chunks also the gradient of the output layer's weights."""
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
    """Pinned buffers of offloaded activations (training.offload_activations)."""
    checkpoint: float
    """The parts of a checkpoint that the node's ranks write, before they reach the disk."""
    reserved: float
    """HOST_RESERVED_GIB for each rank."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(vars(self).values())


def estimate(run: RunConfig) -> Memory:
    """The memory of the fullest GPU: of the pipeline stage with the largest total."""
    return max((_stage(run, stage) for stage in range(run.parallelism.pipeline)), key=lambda memory: memory.total)


def estimate_host(run: RunConfig) -> HostMemory:
    """The memory of a node's host, as if all of its ranks were the fullest rank."""
    ranks = run.environment.gpus_per_node or run.world_size
    memory = estimate(run)
    shards = run.context_parallel.size * run.data_parallel_size
    whole_optimizer = 1 if run.optimizer.use_distributed_optimizer else shards  # else one replica saves it
    written = memory.weights / shards + memory.optimizer / whole_optimizer
    return HostMemory(
        activations=ranks * max(_offloaded(run, stage) for stage in range(run.parallelism.pipeline)),
        checkpoint=ranks * written * run.checkpoint.save,
        reserved=ranks * HOST_RESERVED_GIB * GIB,
    )


def check(run: RunConfig) -> None:
    """Raise UsageError if the estimate exceeds the memory of a GPU or of a node by the `cluster` section.

    The message names the largest part, and keys that would make it smaller.
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
    """Keys that would make a part of the memory smaller, as text."""
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
    """The estimate for people: parts, total, and whether the memory of the `cluster` section holds them."""
    weights = parameters(run).total
    count = f"{weights / 1e9:.3g} B parameters" if weights >= 1e9 else f"{weights / 1e6:.3g} M parameters"
    if reason := _not_estimated(run):
        return f"{count} without {reason}; no estimate of memory with it"
    memory = estimate(run)
    lines = [f"{count}; the fullest rank, estimated:", *_parts(memory, memory.total, run.cluster.memory_gib)]
    if run.training.offload_activations:
        host = estimate_host(run)
        lines += ["the host of a node, estimated:", *_parts(host, host.total, run.cluster.host_memory_gib)]
    if known_vocabulary(run) is None:
        lines.append(f"the vocabulary of {run.data.tokenizer_type} is not known here, and not counted")
    return "\n".join(lines)


def _parts(memory: Memory | HostMemory, total: float, room: float | None) -> list[str]:
    verdict = "" if room is None else f" of {room:g} GiB: {'fits' if total <= room * GIB else 'DOES NOT FIT'}"
    unit, scale = ("GiB", GIB) if total >= GIB else ("MiB", 2**20)
    return [
        *(f"{name:>14}{size / scale:8.2f} {unit}" for name, size in vars(memory).items()),
        f"{'at most':>14}{total / scale:8.2f} {unit}{verdict}",
    ]


def _not_estimated(run: RunConfig) -> str | None:
    """The given argument of Megatron under which there is no estimate; None: there is an estimate."""
    return next((name for name in NOT_ESTIMATED if run.megatron_args.get(name)), None)


def _stage(run: RunConfig, stage: int) -> Memory:
    parallel, count = run.parallelism, parameters(run)
    first, last = stage == 0, stage == parallel.pipeline - 1
    held = count.layers // parallel.pipeline * count.layer + first * count.embedding
    # A last stage that is not the first one holds a copy of a shared table.
    held += last * (count.output if count.output or first else padded_vocabulary(run) * run.model.hidden_size)
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
    """Bytes of a number in the forward pass: 4 in fp32, else 2."""
    return 4 if run.training.precision == "fp32" else 2


def _tokens(run: RunConfig) -> float:
    """Tokens of a micro-batch on one rank."""
    return run.training.micro_batch_size * run.training.seq_length / run.context_parallel.size


def _logits(run: RunConfig) -> float:
    """Bytes of the output layer's backward pass: logits in the model's dtype and in fp32, and their gradient."""
    rows, width = padded_vocabulary(run) / run.parallelism.tensor, _width(run)
    chunk, tokens = run.training.loss_chunk_tokens, _tokens(run)
    if chunk is None:
        return tokens * rows * (2 * width + 4)
    # The weights' gradient in fp32, and a chunk's part of it; the hidden states of all tokens, and their gradient.
    weights, hidden = rows * run.model.hidden_size * (4 + width), 2 * tokens * run.model.hidden_size * width
    return min(chunk, tokens) * rows * (2 * width + 4) + weights + hidden


def _kept_per_token(run: RunConfig, stage: int) -> tuple[float, float]:
    """Bytes of activations per token that a stage's GPU keeps at its peak, and bytes of the recomputed layers."""
    training = run.training
    layers = run.model.num_layers // run.parallelism.pipeline
    whole, _ = _layer_per_token(run)
    flying = _micro_batches_in_flight(run, stage)
    if training.recompute_granularity != "full":
        return flying * layers * whole, 0.0
    pieces, each, per_piece = _recomputed(run)
    kept = 0 if training.recompute_method == "uniform" else flying * (layers - pieces) * whole
    # Offloaded, two pieces are on the GPU: the one that is recomputed, and the next, which is fetched meanwhile.
    kept += min(2, pieces) * each if training.offload_activations else flying * pieces * each
    return kept, per_piece * whole


def _recomputed(run: RunConfig) -> tuple[int, float, int]:
    """The number of pieces of a stage's recomputed layers, the bytes that each keeps per token, and its layers."""
    training, layers = run.training, run.model.num_layers // run.parallelism.pipeline
    layers *= 2 if is_hybrid(run) else 1  # attention and MLP are separate layers there
    block = min(training.recompute_num_layers or 1, layers)
    # uniform: each block of layers keeps its input; block: each of the first layers keeps its own.
    pieces, per_piece = (ceil(layers / block), block) if training.recompute_method == "uniform" else (block, 1)
    _, begin = _layer_per_token(run)
    model, tensor = run.model, run.parallelism.tensor
    outputs = (widths(model)[0] * _width(run) + 4 * model.num_attention_heads) / tensor
    return pieces, begin + run.keeps_attention_outputs * per_piece * outputs, per_piece


def _offloaded(run: RunConfig, stage: int) -> float:
    """Bytes of one rank's pinned buffers, each of which torch rounds up to a power of two."""
    training, model, tensor = run.training, run.model, run.parallelism.tensor
    if not training.offload_activations:
        return 0.0
    pieces, _, per_piece = _recomputed(run)
    begin = _layer_per_token(run)[1]
    outputs = widths(model)[0] * _width(run) / tensor, 4 * model.num_attention_heads / tensor
    buffers = [begin, *(run.keeps_attention_outputs * per_piece * outputs)]
    flying = ceil(_micro_batches_in_flight(run, stage))
    return flying * pieces * sum(2 ** ceil(log2(_tokens(run) * size)) for size in buffers)


def _layer_per_token(run: RunConfig) -> tuple[float, float]:
    """Bytes per token of a layer's activations, and of its input alone."""
    model, tensor, width = run.model, run.parallelism.tensor, _width(run)
    queries, keys, _ = widths(model)
    spread = tensor if run.parallelism.sequence_parallel else 1
    begin = width * model.hidden_size / spread
    masks = 2 * model.hidden_size / spread if model.hidden_dropout else 0
    # Inputs of two norms, of QKV and of the MLP; Q, K, V and O; the MLP's values around its nonlinearity.
    inside = 2 * queries + 2 * keys + ffn_width(model) * (3 if model.swiglu else 2)
    return 4 * begin + width * inside / tensor + masks, begin


def _micro_batches_in_flight(run: RunConfig, stage: int) -> float:
    stages, virtual = run.parallelism.pipeline, run.parallelism.virtual_pipeline
    batches = run.training.global_batch_size // (run.training.micro_batch_size * run.data_parallel_size)
    if virtual:  # upstream's figure for the interleaved schedule, an upper bound for later stages
        return stages * (1 + (stages - 1) / (stages * virtual))
    return min(stages - stage, batches)


def _attention(run: RunConfig) -> float:
    """Bytes of attention in one layer's backward pass besides its inputs, by the planner's formula."""
    size = run.context_parallel.size
    axes = {"attention2d": run.grid, "all_gather": (1, size, 1), "ulysses": (size, 1, 1), "ring": None}
    groups = {"attention2d": run.head_groups}
    return max(
        transient_bytes(Candidate(mode, axes[mode], None), size, workload(run), groups.get(mode, 1))
        for mode in {run.context_parallel.mode, *(run.context_parallel.layer_modes or ())}
    )
