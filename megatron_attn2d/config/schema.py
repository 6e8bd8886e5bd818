"""The keys of a run's YAML: one class per section, in the order of the YAML, with a docstring under each field.

A field becomes the Megatron argument of its own name (`num_layers` -> `--num-layers`), unless its annotation holds a
`Flag`, which is another name, or `NO_FLAG` for fields that `arguments.py` or the launcher handles. None means that the
key is not given, so that Megatron's default holds. Types are strict: true is no integer, and "8" is no number.
"""

from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Mode = Literal["attention2d", "ring", "all_gather", "ulysses"]


class Flag(NamedTuple):
    """The name of a field's Megatron argument; the flag of a boolean is given when the value is `when`."""

    name: str
    when: bool = True


NO_FLAG = Flag("")
GRAPH_IMPLEMENTATIONS = {"attention": "transformer_engine", "layer": "local", "iteration": "full_iteration"}
"""Megatron's cuda_graph_impl for each value of training.cuda_graphs."""

Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(gt=0, lt=2**53)]
Ranks = Annotated[int, Field(gt=0, le=2**20)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Option = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$", max_length=100)]
# Names and paths become parts of file names, command lines and job scripts.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=100)]
Path = Annotated[str, StringConstraints(pattern=r"^[^-\x00-\x1f][^\x00-\x1f]*$", max_length=4000)]
Variable = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]


class Section(BaseModel):
    """A section of the YAML: it refuses unknown keys and wrong types, and never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Run(Section):
    """The name and the directory of the run."""

    name: Annotated[Name, NO_FLAG] = "run"
    """Names the run in logs, plots and trackers."""
    dir: Annotated[Path | None, NO_FLAG] = None
    """Receives config.yaml, metrics.jsonl, checkpoints and TensorBoard logs. None: runs/NAME."""


class Model(Section):
    """The GPT."""

    kind: Annotated[Literal["gpt", "hybrid"], NO_FLAG] = "gpt"
    """Upstream's class: GPTModel, or HybridModel, which also loads checkpoints of a GPTModel. The layer pattern of a
    hybrid model is megatron_args.hybrid_layer_pattern, or follows from the other keys."""
    num_layers: Annotated[Positive, NO_FLAG]
    """Number of layers, each of which is attention and an MLP."""
    hidden_size: Positive
    num_attention_heads: Positive
    num_query_groups: Annotated[Positive | None, NO_FLAG] = None
    """Key/value heads, for grouped-query attention. None: one for each query head."""
    ffn_hidden_size: Positive | None = None
    """None: 4 * hidden_size, or 8/3 of it with SwiGLU."""
    kv_channels: Positive | None = None
    """Width of a head. None: hidden_size / num_attention_heads."""
    max_position_embeddings: Annotated[Positive | None, NO_FLAG] = None
    """None: training.seq_length."""
    position_embedding_type: Annotated[Literal["learned_absolute", "rope", "none"], NO_FLAG] = "learned_absolute"
    rotary_base: Annotated[Positive | None, NO_FLAG] = None
    """Base of RoPE's frequencies. None: 10000."""
    rotary_percent: Annotated[float | None, Field(gt=0, le=1)] = None
    """Share of a head's width that RoPE rotates."""
    rope_scaling: Annotated[Literal["none", "linear", "ntk", "yarn", "llama3"], NO_FLAG] = "none"
    """How RoPE reaches beyond the length that the model was trained at. linear: all positions are divided by
    rope_scaling_factor. ntk: the base grows, so that the lowest frequency is divided by it. yarn: low frequencies are
    divided, high ones stay. llama3: the same by the rule of Llama 3.1, for models trained at 8192 tokens."""
    rope_scaling_factor: Annotated[float | None, Field(ge=1), NO_FLAG] = None
    """training.seq_length over the length that the model was trained at; a whole number for linear."""
    rope_original_length: Annotated[Positive | None, NO_FLAG] = None
    """The length that the model was trained at, by which yarn tells high frequencies from low ones."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    norm_epsilon: Annotated[float | None, Field(gt=0, lt=1)] = None
    qk_layernorm: bool = False
    """Normalise queries and keys before attention."""
    swiglu: bool = False
    """Gated SiLU in the MLP instead of GeLU."""
    add_bias_linear: Annotated[bool, Flag("disable-bias-linear", when=False)] = True
    """Biases in the linear layers."""
    untie_embeddings_and_output_weights: bool = False
    """An output layer of its own instead of the transposed embedding."""
    hidden_dropout: Fraction = 0.0
    attention_dropout: Fraction = 0.0
    init_method_std: Annotated[float | None, Field(gt=0)] = None
    """Standard deviation of the initial weights."""


class Parallelism(Section):
    """How the model is spread over ranks, apart from the section context_parallel."""

    tensor: Annotated[Ranks, Flag("tensor-model-parallel-size")] = 1
    pipeline: Annotated[Ranks, Flag("pipeline-model-parallel-size")] = 1
    virtual_pipeline: Annotated[Ranks | None, NO_FLAG] = None
    """Model chunks per pipeline rank, for the interleaved schedule."""
    sequence_parallel: bool = False
    """Split norms and dropout over the tensor ranks along the sequence."""
    expert: Annotated[Ranks, Flag("expert-model-parallel-size")] = 1
    """Ranks that share the experts of a mixture-of-experts layer."""
    data: Annotated[Ranks | None, NO_FLAG] = None
    """Replicas. None: whatever the world leaves after tensor, pipeline and context."""


class ContextParallel(Section):
    """How one sequence is spread over ranks, and by which attention, `mode`."""

    size: Annotated[Ranks, Flag("context-parallel-size")] = 1
    mode: Annotated[Mode, NO_FLAG] = "attention2d"
    layer_modes: Annotated[list[Mode] | None, NO_FLAG] = None
    """The mode of each layer, first to last; those with attention2d share `grid`. None: `mode` in every layer."""
    grid: Annotated[Literal["auto"] | Annotated[list[Ranks], Field(min_length=2, max_length=3)], NO_FLAG] = "auto"
    """[R, C] for attention2d: a row of C ranks gathers queries, a column of R keys and values; or [U, R, C], where
    the heads are spread over U ranks first. auto: the planner's choice, which the run's config.yaml then names."""
    tile: Annotated[Annotated[list[Ranks], Field(min_length=2, max_length=2)] | None, NO_FLAG] = None
    """Rows and columns of the block of the grid that consecutive ranks fill, such as those of a node. None: whole
    columns, [R, 1], or with `grid: auto` the planner's choice."""
    head_groups: Annotated[Literal["auto"] | Ranks, NO_FLAG] = "auto"
    """Number of groups of heads, so that attention2d overlaps the messages of one with the kernels of another. auto:
    the planner's choice where the YAML describes the cluster, else 1."""


class Data(Section):
    """The data sets and their tokenizer."""

    paths: Annotated[list[Path] | dict[Path, float], NO_FLAG] = []
    """Prefixes of Megatron .bin/.idx files, or a blend as {prefix: weight}. Empty: the embedded byte-level data set."""
    dir: Annotated[Path, NO_FLAG] = "data"
    """Folder in which the embedded data set is built."""
    format: Annotated[Literal["text", "sft"], NO_FLAG] = "text"
    """sft: the files hold examples of fine-tuning, by `data build --format sft`. Each is a sequence of its own that is
    not cut, and the loss is that of completions alone. Without paths: the embedded docstrings and their functions."""
    document_masking: Annotated[bool, NO_FLAG] = False
    """Each document is a sequence of its own: its tokens see no other's, and its positions begin at 0."""
    document_multiple: Annotated[Positive | None, NO_FLAG] = None
    """Each document is padded to a multiple of this many tokens. None: 2 * context_parallel.size, the chunks of a
    document. A larger multiple lets a run continue on other context ranks."""
    document_bins: Annotated[Positive | None, NO_FLAG] = None
    """Number of documents per sample that attention is told of: in a sample with fewer documents the rest are empty,
    and no sample may have more. None: under training.cuda_graphs as many as the fullest sample of the run has, else
    no fixed number."""
    mock: Annotated[bool, Flag("mock-data")] = False
    """Made-up tokens, for measuring speed."""
    split: Annotated[str, StringConstraints(pattern=r"^[0-9.]+,[0-9.]+,[0-9.]+$")] = "1,0,0"
    """Weights of training, validation and test; a part without documents must have weight 0."""
    tokenizer_type: Literal["NullTokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer"] = (
        "NullTokenizer"
    )
    """NullTokenizer: the files hold token ids and need no text tokenizer, as in the embedded byte-level data set."""
    tokenizer_model: Path | None = None
    """File or folder of the tokenizer, on local disk."""
    vocab_size: Positive | None = None
    """Number of ids, for NullTokenizer and TikTokenizer; the others have their own. Bytes: 512, which needs no other
    padding for any tensor size."""
    null_tokenizer_eod_id: Count | None = None
    """End-of-document token for NullTokenizer. Bytes: 256."""
    num_workers: Count | None = None
    """Loader processes per rank. None: Megatron's 2 on GPUs, none on CPU ranks."""
    data_cache_path: Path | None = None
    """Folder of the sample indices. None: beside the data."""


class Optimizer(Section):
    """The optimizer and its schedule."""

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: Annotated[float, Field(gt=0)]
    """Learning rate after the warm-up."""
    min_lr: NonNegative = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    lr_decay_iters: Positive | None = None
    """Steps until min_lr. None: training.train_iters."""
    lr_warmup_iters: Count = 0
    weight_decay: NonNegative = 0.1
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    clip_grad: NonNegative = 1.0
    """Largest norm of the gradient; 0 leaves it alone."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer's state over the data- and context-parallel ranks."""
    grad_reduce_in_bf16: bool = False
    """Accumulate and reduce gradients in bf16, 2 bytes per weight instead of 4. Micro-batches are then added in bf16
    too, so that a step should have few of them."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass computes."""
    overlap_param_gather: bool = False
    """Gather weights of the distributed optimizer while the forward pass computes."""


class Training(Section):
    """Batch, length and precision."""

    micro_batch_size: Positive = 1
    """Sequences per forward pass."""
    global_batch_size: Positive
    """Sequences per step, over all ranks."""
    train_iters: Positive
    exit_interval: Positive | None = None
    """Stop at a multiple of this step, with data and learning rate as for the whole run; train again to go on."""
    seq_length: Positive
    seed: Count = 1234
    precision: Annotated[Literal["fp32", "bf16", "fp16"], NO_FLAG] = "bf16"
    fp8: Annotated[Literal["none", "delayed", "tensorwise", "blockwise"], NO_FLAG] = "none"
    """Recipe by which linear layers compute in FP8, with Transformer Engine; attention stays in bf16. delayed: scales
    from past steps; tensorwise: one for each tensor; blockwise: one for each block of 128. The format is hybrid, for
    blockwise e4m3, or megatron_args.fp8_format."""
    cuda_graphs: Annotated[Literal["none", "attention", "layer", "iteration"], NO_FLAG] = "none"
    """The part of a step that is one CUDA graph, which the CPU starts at once: worth it where a GPU has few tokens and
    waits for the CPU. layer: one pass of each layer (Megatron's cuda_graph_impl local). attention: one pass of each
    layer's attention (transformer_engine, cuda_graph_modules attn), for layers with experts. iteration: all passes of a
    step (full_iteration). megatron_args.cuda_graph_impl and cuda_graph_modules choose otherwise."""
    eval_iters: Count = 0
    """Batches per evaluation; 0 for none."""
    eval_interval: Annotated[Positive | None, NO_FLAG] = None
    """Steps between evaluations. None: only at the end."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass instead of keeping them."""
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: Positive | None = None
    keep_attention_outputs: Annotated[bool, NO_FLAG] = False
    """With full recomputation, keep attention's output and log-sum-exp besides each layer's input, as many bytes again,
    so that attention's forward pass runs once instead of twice. This holds in layers with attention2d: the results of
    other modes, which may be Transformer Engine's, can't be kept."""
    offload_activations: bool = False
    """Move what full recomputation keeps to pinned memory of the host, and back while the layer above computes."""
    loss_chunk_tokens: Positive | None = None
    """Tokens per rank whose logits exist at a time: the output layer and the loss are computed in chunks, forward and
    backward. None: all at once, which for 128K tokens and a vocabulary of 128K takes 137 GB."""
    self_check: Annotated[bool, Flag("no-attention-self-check", when=False)] = True
    """Before the first step compare a tiny attention over the run's groups with the dense answer."""
    check_finite: Annotated[bool, Flag("check-finite-attention")] = False
    """Report NaN and Inf in attention's Q, K, V and dO with layer and rank; on GPUs it waits for each layer."""


class Checkpoint(Section):
    """When checkpoints are saved and how a run starts. A run continues from the last one in its own directory."""

    save: Annotated[bool, NO_FLAG] = True
    """false: keep nothing."""
    save_interval: Annotated[Positive | None, NO_FLAG] = None
    """Steps between checkpoints. None: only at the end, and on SIGTERM."""
    load: Annotated[Path | None, NO_FLAG] = None
    """Folder of another run's checkpoints, from which this run continues while it has none of its own: at the same
    step, with the same optimizer state and place in the data."""
    start_from: Annotated[Path | None, NO_FLAG] = None
    """Folder of checkpoints whose weights this run takes while it has none of its own; it starts at step 1, with a new
    optimizer state and the first token. megatron_args.ckpt_step chooses one of them."""
    may_change: Annotated[list[Name], NO_FLAG] = []
    """Keys, such as data.paths or optimizer.lr, that may differ from the configuration with which this run began."""
    keep_last: Positive | None = None
    """Number of checkpoints to keep, the newest complete ones. None: all."""
    verify_integrity: bool = True
    """Write a checksum of every file, and refuse a checkpoint with a changed one. Rank 0 reads every file once more,
    at 1 to 2 GB/s; false where that takes too long."""
    async_save: Annotated[bool, NO_FLAG] = False
    """Write checkpoints in the background; needs nvidia_resiliency_ext."""
    exit_signal_handler: bool = True
    """Save and exit on SIGTERM."""


class Logging(Section):
    """What a run reports, and where."""

    log_interval: Positive = 1
    """Steps between lines of Megatron's own log, RUN_DIR/logs/rank-N.log; the console shows every step."""
    tensorboard: Annotated[bool, NO_FLAG] = False
    """Write TensorBoard logs into the run's directory."""
    wandb_project: Name | None = None
    """Report to this project of Weights & Biases, as one run per run.dir, which each continuation resumes. It implies
    tensorboard, as Megatron reports to Weights & Biases only beside that."""
    wandb_entity: Name | None = None
    attention_communication: Annotated[bool, Flag("log-attention-communication")] = False
    """Report the share of a step in which a rank waits for attention's messages."""
    timing_log_level: Annotated[int, Field(ge=0, le=2)] = 0
    """Detail of Megatron's timers."""


class Environment(Section):
    """The machines of a run, and the environment of its ranks."""

    device: Annotated[Literal["cpu", "cuda"], NO_FLAG] = "cuda"
    """cpu: ranks are processes on this machine's cores, over Gloo."""
    nodes: Annotated[Ranks | None, NO_FLAG] = None
    gpus_per_node: Annotated[Ranks | None, NO_FLAG] = None
    distributed_timeout_minutes: Positive = 10
    """How long a collective may wait for a rank before the job ends."""
    variables: Annotated[dict[Name, Variable | int], NO_FLAG] = {}
    """Environment variables for every rank. `variables+:` adds to those of an extended file, which this replaces."""


class Cluster(Section):
    """Sizes and rates of the machines, by which the planner chooses for `auto`, and for estimates and the reported MFU.

    environment.gpus_per_node says how many GPUs a node has. Rates are those of one GPU, and of links in one direction;
    1 GB is 10^9 bytes, 1 GiB is 2^30 bytes. None: not known.
    """

    memory_gib: Annotated[Rate | None, NO_FLAG] = None
    """Memory of a GPU that processes can allocate, in GiB."""
    host_memory_gib: Annotated[Rate | None, NO_FLAG] = None
    """Memory of a node that processes can allocate, in GiB."""
    peak_tflops: Annotated[Rate | None, NO_FLAG] = None
    """Peak rate of dense matrix products in training.precision, by the data sheet, in 10^12 FLOP/s; the MFU's base."""
    attention_forward_tflops: Annotated[Rate | None, NO_FLAG] = None
    """Rate of the attention kernel on large rectangles, in 10^12 FLOP/s."""
    attention_backward_tflops: Annotated[Rate | None, NO_FLAG] = None
    stock_attention_speed: Annotated[Rate | None, NO_FLAG] = None
    """Of these rates, what the kernels of a ring and of all_gather reach, which are Transformer Engine's; None: 1."""
    intra_node_gb_per_s: Annotated[Rate | None, NO_FLAG] = None
    """Bandwidth of the links between the GPUs of a node, in GB/s."""
    intra_node_latency_us: Annotated[Rate | None, NO_FLAG] = None
    """Time of the smallest message within a node, in microseconds."""
    nic_gb_per_s: Annotated[Rate | None, NO_FLAG] = None
    """Bandwidth of the network between nodes, in GB/s: that of a node's cards, over its GPUs."""
    nic_latency_us: Annotated[Rate | None, NO_FLAG] = None
    """Time of the smallest message between nodes, in microseconds."""
    launch_us: Annotated[Rate | None, NO_FLAG] = None
    """CPU time to start an attention kernel or an exchange of chunks, in microseconds. None: not counted."""


class Slurm(Section):
    """How `submit` asks Slurm for nodes."""

    sbatch: Annotated[dict[Option, str | int | bool | None], NO_FLAG] = {}
    """Options of sbatch by their long names: {partition: gpu, time: "24:00:00"}. true: no value; null: leave it out.
    `sbatch+:` adds to those of an extended file, which this replaces."""
    srun: Annotated[dict[Option, str | int | bool | None], NO_FLAG] = {}
    """Options of the srun that starts the ranks, in the same form: {mpi: pmix, cpus-per-task: 96}."""
    grace_s: Annotated[Positive, NO_FLAG] = 300
    """Seconds before the time limit at which the ranks are told to save and exit."""
    max_failures: Annotated[Positive, NO_FLAG] = 3
    """Failures in a row, without a new checkpoint in between, after which the job is not queued again. Stops at the
    time limit or by pre-emption are counted apart, and may be one more."""
    setup: Annotated[Path | None, NO_FLAG] = None
    """Shell file that the job sources before it starts the ranks, for example to load modules."""
    python: Annotated[Path | None, NO_FLAG] = None
    """Interpreter of the ranks, or a wrapper that starts it. None: the one of `submit`; in a container python3."""
    container_runtime: Annotated[Literal["pyxis", "apptainer", "singularity"], NO_FLAG] = "pyxis"
    """What runs container_image: Pyxis, which adds options to srun, or the command of that name on the nodes."""
    container_image: Annotated[Path | None, NO_FLAG] = None
    """For Pyxis a file or registry#name:tag, for Apptainer and Singularity a file or an address such as docker://.
    None: no container."""
    container_mounts: Annotated[list[Path], NO_FLAG] = []
    """SOURCE:TARGET[:FLAGS] of further mounts; the working directory and the run's keep their own paths."""


class RunConfig(Section):
    """A whole run: one field per section of the YAML."""

    run: Run = Run()
    model: Model
    parallelism: Parallelism = Parallelism()
    context_parallel: ContextParallel = ContextParallel()
    data: Data = Data()
    optimizer: Optimizer
    training: Training
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    environment: Environment = Environment()
    cluster: Cluster = Cluster()
    slurm: Slurm = Slurm()
    megatron_args: dict[str, object] = {}
    """Any other argument of Megatron, by its name. null leaves out what an extended file gave."""

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica: tensor * pipeline * context."""
        return self.parallelism.tensor * self.parallelism.pipeline * self.context_parallel.size

    @property
    def world_size(self) -> int:
        """Number of all ranks."""
        return self.model_ranks * self.data_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Number of replicas, which follows from the ranks when a run is loaded."""
        return self.parallelism.data or 1

    @property
    def grid(self) -> tuple[int, int, int]:
        """U, R and C of attention2d's process grid: ranks over heads, rows and columns.

        Where a layer has a grid of several ranks, `load_run` has put numbers in the place of `auto`.
        """
        written = self.context_parallel.grid
        if written == "auto":
            assert self.context_parallel.mode != "attention2d" or self.context_parallel.size == 1, "not resolved yet"
            return 1, 1, 1
        heads, rows, columns = written if len(written) == 3 else (1, *written)
        return heads, rows, columns

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of the block of the grid that consecutive ranks fill."""
        rows, columns = self.context_parallel.tile or (self.grid[1], 1)
        return rows, columns

    @property
    def head_groups(self) -> int:
        """Number of groups of heads between which attention2d overlaps messages and kernels."""
        return 1 if self.context_parallel.head_groups == "auto" else self.context_parallel.head_groups

    @property
    def document_multiple(self) -> int:
        """Tokens to a multiple of which each document is padded; 0 where all documents are one sequence."""
        if not self.data.document_masking and self.data.format == "text":
            return 0
        return self.data.document_multiple or 2 * self.context_parallel.size

    @property
    def documents_in_bins(self) -> bool:
        """Whether attention is told of a fixed number of documents per sample, as in CUDA graphs."""
        fixed = self.data.document_bins is not None or self.graph_implementation != "none"
        return bool(self.document_multiple) and fixed

    @property
    def keeps_attention_outputs(self) -> bool:
        """Whether full recomputation keeps the output of attention in some layer."""
        modes = self.context_parallel.layer_modes or [self.context_parallel.mode]
        return self.training.keep_attention_outputs and "attention2d" in modes

    @property
    def graph_implementation(self) -> str:
        """Megatron's implementation of CUDA graphs, `none` without graphs."""
        given = self.megatron_args.get("cuda_graph_impl")
        return str(given or GRAPH_IMPLEMENTATIONS.get(self.training.cuda_graphs, "none"))

    @property
    def directory(self) -> str:
        """The directory in which the run writes."""
        return self.run.dir or f"runs/{self.run.name}"
