"""Classifies a run's keys: they decide about the weights, the learning rate, the order of the data, or only the speed.

A continued run may train on other ranks, in another mode of attention, with other logs. A key that decides about the
weights, the loss, the learning rate or the order of the data must keep its value, unless `checkpoint.may_change` names
it. So must every key or argument that stands in no list here: an unclassified one is refused rather than overlooked.
"""

import re
from operator import attrgetter

from megatron_attn2d.config import upstream_flags
from megatron_attn2d.config.schema import Model, RunConfig

FIRST_START = (
    *("ckpt_step", "no_load_optim", "no_load_rng", "load_main_params_from_ckpt", "override_ckpt_iteration"),
    *("moe_use_upcycling", "moe_upcycling_granularity"),
)
"""Arguments of Megatron that say how a run starts from another run's checkpoint. Each continuation that gave them
would start the run again."""
SCHEDULE = (
    *(f"optimizer.{key}" for key in ("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_warmup_iters")),
    *("optimizer.weight_decay", "training.global_batch_size", "training.train_iters"),
)
"""Keys that the learning rate's course follows from. Megatron compares them with the checkpoint once ranks run."""
_SCHEDULE_GROUP = "learning rate and weight decay"
ORDER = (
    *("data.paths", "data.mock", "data.split", "training.seq_length", "training.seed"),
    *("data.format", "data.document_masking", "data.document_multiple"),
    # Megatron shuffles the samples of all epochs together, so that their number decides about the order of each.
    *("training.global_batch_size", "training.train_iters"),
    *("megatron_args.dataloader_type", "megatron_args.no_data_sharding", "megatron_args.mid_level_dataset_surplus"),
    *("megatron_args.data_args_path", "megatron_args.per_split_data_args_path", "megatron_args.iterations_to_skip"),
)
"""Keys that decide which tokens a step trains on."""

_ANYWHERE = {"run", "parallelism", "context_parallel", "checkpoint", "logging", "environment", "cluster", "slurm"}
"""Sections that say where, how fast and how loudly a run trains."""
_FREE = {
    *("model.init_method_std", "optimizer.overlap_grad_reduce", "optimizer.overlap_param_gather"),
    *("data.dir", "data.num_workers", "data.data_cache_path", "data.document_bins"),
    *("training.micro_batch_size", "training.exit_interval", "training.eval_iters", "training.eval_interval"),
    *("training.recompute_granularity", "training.recompute_method", "training.recompute_num_layers"),
    *("training.keep_attention_outputs", "training.offload_activations", "training.loss_chunk_tokens"),
    *("training.self_check", "training.check_finite", "training.cuda_graphs", "optimizer.grad_reduce_in_bf16"),
}
"""Keys of the other sections that also say only where, how fast and how loudly a run trains."""
_FIXED = {
    *(f"model.{name}" for name in Model.model_fields if name not in {"hidden_dropout", "attention_dropout"}),
    *("data.tokenizer_type", "data.vocab_size", "training.precision"),
    *("optimizer.optimizer", "optimizer.use_distributed_optimizer"),
    # Megatron takes these from the checkpoint, whatever its arguments say.
    *("optimizer.adam_beta1", "optimizer.adam_beta2", "optimizer.adam_eps"),
}
"""Keys that decide which weights and optimizer states there are, and what they mean; Megatron does not compare most
of them with the checkpoint."""
_FIXED_ARGUMENTS = re.compile(
    r"window_(size|attn_skip_freq)|softmax_type|qk_l2_norm|use_rope_scaling|rope_scaling_factor|rotary_interleaved"
    r"|squared_relu|quick_geglu|add_qkv_bias|attention_output_gate|num_experts|moe_router_topk|moe_layer_freq"
    r"|moe_(ffn_hidden|latent)_size|moe_shared_expert_(intermediate_size|gate)|moe_single_grouped_(weight|bias)"
    r"|moe_router_enable_expert_bias|multi_latent_attention|(q|kv)_lora_rank|qk_head_dim|qk_pos_emb_head_dim|v_head_dim"
    r"|mtp_num_layers|mtp_use_repeated_layer|(mtp_)?hybrid_(layer|override)_pattern|experimental_attention_variant"
    r"|(mamba|linear|dsa|heterogeneous)_.*|make_vocab_size_divisible_by|pad_vocab_size"
)
"""Megatron's own arguments that decide about the same, by the attribute in which it stores them."""
_FREE_GROUPS = {
    *("profiling", "validation", "checkpointing", "distributed init", "logging", "straggler", "workload inspector"),
    *("inference", "one logger", "In-process restart", "ft_package", "rerun engine", "msc", "autoresume"),
    "fault injector",
}
"""Groups of Megatron's arguments that say where, how fast and how loudly a run trains."""
_FREE_ARGUMENTS = re.compile(
    # about memory, messages and kernels
    r"deterministic_mode|tp_comm_.*|cross_entropy_.*|overlap_.*|delay_.*|ep_overlap_.*|use_ring_exchange_p2p"
    r"|defer_embedding_wgrad_compute|wgrad_deferral_limit|microbatch_group_size_per_vp_stage|mtp_standalone"
    r"|expert_tensor_.*|account_for_.*|cpu_offloading_.*|attention_backend|flash_attention_version|use_fused_.*|fused_.*"
    r"|use_transformer_engine_op_fuser|recompute_.*|distribute_saved_activations|high_priority_.*|transformer_impl"
    r"|moe_shared_expert_overlap|use_grouped_gemm_.*|moe_grouped_gemm|moe_token_dispatcher_type|moe_enable_deepep"
    r"|moe_(flex|hybridep|deepep|ncclep|permute)_.*|moe_(layer_recompute|per_layer_logging|router_fusion)"
    r"|moe_paged_stash.*|.*cuda_graph.*|clone_scatter_output_in_embedding|config_logger_dir|symmetric_ar_type|nccl_.*"
    r"|inference_.*|mlp_chunks_.*|fine_grained_.*|(min_|delta_)?offload.*|activation_offload_fraction"
    r"|masked_softmax_fusion|bias_.*_fusion|apply_rope_fusion|no_persist_layer_norm|gradient_accumulation_fusion"
    r"|use_flash_attn|checkpoint_activations|optimizer_(cpu_offload|offload_fraction)|pin_cpu_.*"
    r"|use_torch_optimizer_for_cpu_offload|dump_param_to_param_group_map|empty_unused_memory_level"
    # about the loop, loading and initial weights
    r"|check_.*|gpu_sniff_test_interval|train_sync_interval|exit_.*|manual_gc.*|result_rejected_tracker_filename"
    r"|perform_initialization|use_cpu_initialization|(embedding_)?init_m.*|data_parallel_random_init"
    r"|mmap_bin_files|num_dataset_builder_threads|object_storage_cache_path|create_attention_mask_in_dataloader"
    # about text tokenizers: a run reads token ids
    r"|metadata_path|tokenizer_(hf|sentencepiece)_.*|trust_remote_code|chat_template|null_tokenizer_pad_id"
)
"""Arguments of the other groups that also say only where, how fast and how loudly a run trains."""


def changed(before: RunConfig, now: RunConfig) -> list[str]:
    """The keys, "section.name", in which `now` differs from `before`, except those that are free to differ."""
    keys = [
        f"{title}.{name}"
        for title, section in RunConfig.model_fields.items()
        if title not in {*_ANYWHERE, "megatron_args"}
        for name in getattr(section.annotation, "model_fields", {})
    ]
    found = [key for key in keys if key not in _FREE and value(before, key) != value(now, key)]
    if before.model.kind == "gpt":  # Megatron loads weights and optimizer states of a GPT into a hybrid model
        found = [key for key in found if key != "model.kind"]
    names = sorted(before.megatron_args.keys() | now.megatron_args.keys())
    arguments = [name for name in names if not _is_free(name)]
    return found + [
        f"megatron_args.{name}"
        for name in arguments
        if _word(name, before.megatron_args.get(name)) != _word(name, now.megatron_args.get(name))
    ]


def is_fixed(key: str) -> bool:
    """Whether weights or optimizer states depend on `key`, so that no run can continue with another value."""
    section, _, name = key.partition(".")
    if section == "megatron_args":
        return _FIXED_ARGUMENTS.fullmatch(_option(name).dest) is not None
    return key in _FIXED


def is_schedule(key: str) -> bool:
    """Whether Megatron compares `key` with the checkpoint's, as part of the learning rate's course."""
    section, _, name = key.partition(".")
    return key in SCHEDULE or (section == "megatron_args" and _option(name).group == _SCHEDULE_GROUP)


def is_key(key: str) -> bool:
    """Whether a run has the key `key`, or Megatron the argument that it names."""
    section, _, name = key.partition(".")
    if section == "megatron_args":
        return f"--{name.replace('_', '-')}" in upstream_flags.options()
    field = RunConfig.model_fields.get(section)
    return field is not None and name in getattr(field.annotation, "model_fields", {})


def given(run: RunConfig, key: str) -> object:
    """The value of `key` as it was written; None for an argument of Megatron that was not given."""
    section, _, name = key.partition(".")
    return run.megatron_args.get(name) if section == "megatron_args" else attrgetter(key)(run)


def value(run: RunConfig, key: str) -> object:
    """The value of `key` by which runs are compared: as written, except where it follows from other keys."""
    if key == "model.max_position_embeddings":  # only learned positions have weights
        learned = run.model.position_embedding_type == "learned_absolute"
        return (run.model.max_position_embeddings or run.training.seq_length) if learned else None
    if key == "data.document_multiple":  # None follows from the context ranks
        return run.document_multiple or None
    return given(run, key)


def _option(name: str) -> upstream_flags.Option:
    return upstream_flags.options().get(f"--{name.replace('_', '-')}", upstream_flags.Option(name))


def _is_free(name: str) -> bool:
    option = _option(name)
    return option.group in _FREE_GROUPS or _FREE_ARGUMENTS.fullmatch(option.dest) is not None


def _word(name: str, value: object) -> str:
    """The text that Megatron reads for a value, so that a list, a string and a number of one meaning are equal."""
    option = _option(name)
    if option.nargs == 0:
        return str(bool(value))
    value = option.default if value is None else value
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, int | float) else str(value)
