"""Batches, recomputation, what long sequences need, and FP8."""

from tests.config.base import FULL

REFUSED = {
    # batch
    "parallelism.data=3": (
        "training.global_batch_size = 4: not a multiple of training.micro_batch_size * replicas = 1 * 3; choose 6"
    ),
    "training.recompute_granularity=full": (
        "training.recompute_method = null: training.recompute_granularity is full; "
        "choose uniform or block with full, null otherwise"
    ),
    "training.recompute_granularity=selective training.recompute_num_layers=1": (
        "training.recompute_num_layers = 1: training.recompute_method is null; choose null"
    ),
    "training.recompute_granularity=full training.recompute_method=uniform": (
        "training.recompute_num_layers = null: training.recompute_method is uniform; "
        "choose 1, or more for fewer, larger pieces"
    ),
    "training.precision=fp16": (
        "training.precision = 'fp16': environment.device = cpu computes in fp32 or bf16; choose fp32"
    ),
    # what long sequences need
    "training.offload_activations=true": (
        "training.offload_activations = true: it concerns what full recomputation keeps; "
        "choose false, or training.recompute_granularity=full"
    ),
    f"{FULL} training.offload_activations=true megatron_args.distribute_saved_activations=true parallelism.tensor=2": (
        "training.offload_activations = true: megatron_args.distribute_saved_activations spreads what is kept ..."
    ),
    "training.loss_chunk_tokens=8 model.kind=hybrid": (
        "training.loss_chunk_tokens = 8: Megatron's hybrid models (model.kind) compute all logits at once; ..."
    ),
    "training.loss_chunk_tokens=8 megatron_args.mtp_num_layers=1": (
        "training.loss_chunk_tokens = 8: megatron_args.mtp_num_layers asks for another output layer or loss; ..."
    ),
    "model.num_query_groups=8": (
        "model.num_query_groups = 8: does not divide model.num_attention_heads = 4; choose one of 1, 2, 4"
    ),
    "model.num_query_groups=3": (
        "model.num_query_groups = 3: does not divide model.num_attention_heads = 4; choose one of 1, 2, 4"
    ),
    "model.max_position_embeddings=128": (
        "model.max_position_embeddings = 128: less than training.seq_length = 256; choose 256 or more"
    ),
    # FP8
    "training.fp8=delayed training.precision=bf16": (
        "training.fp8 = 'delayed': needs Transformer Engine and a GPU, environment.device is cpu; choose none"
    ),
    "environment.device=cuda training.fp8=delayed training.precision=fp32": (
        "training.fp8 = 'delayed': what is not in FP8 is in bf16, and training.precision is fp32; choose none"
    ),
    "environment.device=cuda megatron_args.fp8_format=hybrid": (
        "training.fp8 = 'none': megatron_args.fp8_format is given; choose delayed, tensorwise or blockwise"
    ),
    "environment.device=cuda training.fp8=tensorwise training.precision=bf16 model.ffn_hidden_size=100": (
        "model.ffn_hidden_size = 100: training.fp8 needs a multiple of 16 * parallelism.tensor = 16; choose "
        "such a multiple, or training.fp8=none"
    ),
}
