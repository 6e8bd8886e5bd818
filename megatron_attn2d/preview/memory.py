"""What the fullest GPU of a run has to hold: an estimate from the configuration alone.

Upstream's `theoretical_memory_usage` does not serve as it stands: it spreads the optimizer's state over data-parallel
ranks only, not over context ranks, counts the whole sequence's activations on every rank, knows nothing of full
recomputation, nor of the buffers that attention gathers into. Its count of parameters is ours (a test compares them).

Activations follow Korthikanti et al. (arXiv 2205.05198, table 2) without the scores, which no attention kernel keeps.
"""

from dataclasses import dataclass
from math import ceil

from megatron_attn2d.config.auto import workload
from megatron_attn2d.config.checks import UNEVEN
from megatron_attn2d.config.schema import Model, RunConfig
from megatron_attn2d.data import tokenizers
from megatron_attn2d.errors import UsageError
from megatron_attn2d.planner.cost import Candidate, transient_bytes

GIB = 2**30
RESERVED_GIB = 4.0
"""CUDA's context, NCCL's buffers for some ten process groups, cuBLAS workspaces and fragments: a round figure."""
NOT_ESTIMATED = (
    "num_experts",
    "multi_latent_attention",
    "mtp_num_layers",
    "hybrid_layer_pattern",
    "use_megatron_fsdp",
    "use_torch_fsdp2",
    "optimizer_cpu_offload",
    *UNEVEN,
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
    """Kept from forward to backward, for all micro-batches in flight."""
    attention: float
    """Gathered and partial tensors of one layer's backward pass."""
    logits: float
    """Of the output layer, and the loss's copies of them."""
    reserved: float
    """RESERVED_GIB on a GPU."""

    @property
    def total(self) -> float:
        """All of it, but the smaller of attention and logits: these have gone when attention runs backward."""
        return sum(vars(self).values()) - min(self.attention, self.logits)


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


def report(run: RunConfig) -> str:
    """The estimate for people: parts, total, and whether the card of `cluster` holds them."""
    weights = parameters(run).total
    count = f"{weights / 1e9:.3g} B parameters" if weights >= 1e9 else f"{weights / 1e6:.3g} M parameters"
    if reasons := [name for name in NOT_ESTIMATED if run.megatron_args.get(name)]:
        return f"{count} without {reasons[0]}; no estimate of memory with it"
    memory, room = estimate(run), run.cluster.memory_gib
    lines = [f"{count}; the fullest rank, estimated:"]
    lines += [f"{name:>14}{size / GIB:8.2f} GiB" for name, size in vars(memory).items()]
    total = memory.total / GIB
    verdict = "" if room is None else f" of {room:g}: {'fits' if total <= room else 'DOES NOT FIT'}"
    lines.append(f"{'at most':>14}{total:8.2f} GiB{verdict}")
    if _known_vocabulary(run) is None:
        lines.append(f"the vocabulary of {run.data.tokenizer_type} is not known here, and not counted")
    return "\n".join(lines)


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
    """Ids of the run's tokenizer; None where it can't be read on this machine."""
    try:
        return tokenizers.vocabulary(run.data)
    except UsageError:  # `train` tells why
        return None


def _stage(run: RunConfig, stage: int) -> Memory:
    parallel, count = run.parallelism, parameters(run)
    first, last = stage == 0, stage == parallel.pipeline - 1
    held = count.layers // parallel.pipeline * count.layer + first * count.embedding
    # A last stage apart from the first holds a copy of a shared table.
    held += last * (count.output if count.output or first else _vocabulary(run) * run.model.hidden_size)
    held = ceil(held / parallel.tensor)
    weight, state = (4, 8) if run.training.precision == "fp32" else (2, 12)  # 12: fp32 copy of the weight, two moments
    shards = run.context_parallel.size * run.data_parallel_size if run.optimizer.use_distributed_optimizer else 1
    return Memory(
        weights=held * weight,
        gradients=held * 4,
        optimizer=held * state / shards,
        activations=_tokens(run) * _kept_per_token(run, stage),
        attention=_attention(run),
        logits=_tokens(run) * last * _vocabulary(run) / parallel.tensor * (2 * _width(run) + 4),
        reserved=RESERVED_GIB * GIB * (run.environment.device == "cuda"),
    )


def _width(run: RunConfig) -> int:
    """Bytes of a number in the forward pass."""
    return 4 if run.training.precision == "fp32" else 2


def _tokens(run: RunConfig) -> float:
    """Tokens of a micro-batch on one rank."""
    return run.training.micro_batch_size * run.training.seq_length / run.context_parallel.size


def _kept_per_token(run: RunConfig, stage: int) -> float:
    """Bytes of activations per token that a stage holds at its fullest."""
    training, parallel = run.training, run.parallelism
    layers = run.model.num_layers // parallel.pipeline
    whole, begin = _layer_per_token(run)
    flying = _micro_batches_in_flight(run, stage)
    if training.recompute_granularity != "full":
        return flying * layers * whole
    block = training.recompute_num_layers or 1
    if training.recompute_method == "uniform":  # every block keeps its input; one at a time is recomputed
        return flying * ceil(layers / block) * begin + min(block, layers) * whole
    block = min(block, layers)
    return flying * (block * begin + (layers - block) * whole) + whole


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
