"""Layers of several kinds: patterns of hybrid models, and windows of some layers."""

REFUSED = {
    "megatron_args.hybrid_layer_pattern='*-D-'": (
        "megatron_args.hybrid_layer_pattern = '*-D-': D, sparse attention, chooses its keys from the whole sequence, "
        "which no rank has; choose * or +"
    ),
    "megatron_args={window_size: [8, 0], window_attn_skip_freq: [1, 0, 1]}": (
        "megatron_args.window_attn_skip_freq = [1, 0, 1]: has 3 entries, but model.num_layers is 4; write one per layer"
    ),
    "megatron_args={window_size: [8, 0], window_attn_skip_freq: [1, 0, 2, 1]}": (
        "megatron_args.window_attn_skip_freq = [1, 0, 2, 1]: --window-attn-skip-freq takes 0 or 1 for each layer; ..."
    ),
    "megatron_args={hybrid_layer_pattern: '*-+E', multi_latent_attention: true, num_experts: 4}": (
        "megatron_args.hybrid_layer_pattern = '*-+E': Megatron has attention (*) or latent attention (+); choose one"
    ),
    "megatron_args.hybrid_layer_pattern='*E'": (
        "megatron_args.hybrid_layer_pattern = '*E': E is a layer of experts; set megatron_args.num_experts too"
    ),
    "model.kind=hybrid megatron_args.pipeline_model_parallel_layout='E(t|)*4L' training.micro_batch_size=2": (
        "megatron_args.pipeline_model_parallel_layout = 'E(t|)*4L': the stages of model.kind = hybrid stand in its "
        "pattern; write stages as | in megatron_args.hybrid_layer_pattern"
    ),
    "model.kind=hybrid megatron_args={num_experts: 4, moe_layer_freq: '[1,0]*2'}": (
        "megatron_args.moe_layer_freq = '[1,0]*2': is text, which is not read here; write a number, or [1, 0, ...]"
    ),
    "model.kind=hybrid megatron_args={window_size: [8, 0], window_attn_skip_freq: '[1,0]*2'}": (
        "megatron_args.window_attn_skip_freq = '[1,0]*2': is text, which is not read here; write a number, or ..."
    ),
    "model.kind=hybrid megatron_args.hybrid_layer_pattern=MM": (
        "megatron_args.hybrid_layer_pattern = 'MM': has 0 layers of attention (* or +), but model.num_layers is 4; "
        "write them into it"
    ),
    "model.kind=hybrid megatron_args.mtp_num_layers=-1": (
        "megatron_args.mtp_num_layers = -1: not a number of layers; choose 1 or more, or leave it out"
    ),
    "model.kind=hybrid megatron_args.linear_attention_freq=2": (
        "megatron_args.linear_attention_freq = 2: is not read of a hybrid model; write those layers as G in ..."
    ),
    "model.kind=hybrid megatron_args={num_experts: 4, moe_layer_freq: 0}": (
        "megatron_args.moe_layer_freq = 0: selects one in so many layers; choose 1 or more, or leave it out"
    ),
    "model.kind=hybrid megatron_args.hybrid_layer_pattern='M*-|M*-'": (
        "megatron_args.hybrid_layer_pattern = 'M*-|M*-': has 2 layers of attention (* or +), but model.num_layers is "
        "4; choose model.num_layers=2, or another pattern"
    ),
    "model.kind=hybrid megatron_args={hybrid_layer_pattern: 'M*M*|-*M*M', window_size: [8, 0], "
    "window_attn_skip_freq: [0, 1]}": (
        "megatron_args.window_attn_skip_freq = [0, 1]: has 2 entries, but model.num_layers is 4; write one per layer"
    ),
    "model.kind=hybrid megatron_args.hybrid_layer_pattern='*|*|*|*'": (
        "megatron_args.hybrid_layer_pattern = '*|*|*|*': has 4 stages, parallelism.pipeline x virtual_pipeline are 2; "
        "write 1 | into it"
    ),
}
