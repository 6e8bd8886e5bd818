"""Tensor, pipeline, sequence and expert parallelism."""

REFUSED = {
    "parallelism.tensor=3": (
        "parallelism.tensor = 3: does not divide model.num_attention_heads = 4; choose one of 1, 2, 4"
    ),
    "model.num_attention_heads=12 model.hidden_size=144 model.num_query_groups=6 parallelism.tensor=4": (
        "parallelism.tensor = 4: neither divides model.num_query_groups = 6 nor is a multiple of it; "
        "choose one of 1, 2, 3, 6"
    ),
    "parallelism.pipeline=3": (
        "parallelism.pipeline = 3: 3 stages do not share model.num_layers = 4 evenly; stages in all: one of 1, 2, 4"
    ),
    "parallelism.virtual_pipeline=4": (
        "parallelism.virtual_pipeline = 4: 8 stages do not share model.num_layers = 4 evenly; "
        "stages in all: one of 1, 2, 4"
    ),
    "parallelism.pipeline=1 parallelism.virtual_pipeline=2": (
        "parallelism.virtual_pipeline = 2: needs parallelism.pipeline > 1, which is 1; choose null"
    ),
    "parallelism.virtual_pipeline=2 training.micro_batch_size=4": (
        "training.global_batch_size = 4: 1 micro-batches per replica, the interleaved schedule needs "
        "parallelism.pipeline = 2; choose 8"
    ),
    "parallelism.sequence_parallel=true": (
        "parallelism.sequence_parallel = true: needs parallelism.tensor > 1, which is 1; choose false"
    ),
    "parallelism.sequence_parallel=true parallelism.tensor=4 training.seq_length=24": (
        "parallelism.sequence_parallel = true: 6 tokens per context rank do not split over parallelism.tensor = 4; ..."
    ),
    "parallelism.expert=2": (
        "parallelism.expert = 2: the model has no experts; choose 1, or set megatron_args.num_experts"
    ),
    "parallelism.expert=3 megatron_args.num_experts=3": (
        "parallelism.expert = 3: does not divide tensor * context * data = 4 ranks; choose one of 1, 2, 4"
    ),
    "megatron_args.pipeline_model_parallel_layout='E(t|)*4L' training.micro_batch_size=4": (
        "training.global_batch_size = 4: 1 micro-batches per replica, the interleaved schedule needs "
        "parallelism.pipeline = 2; choose 8"
    ),
    "megatron_args.num_layers_per_virtual_pipeline_stage=1 training.micro_batch_size=4": (
        "training.global_batch_size = 4: 1 micro-batches per replica, the interleaved schedule needs ..."
    ),
}
