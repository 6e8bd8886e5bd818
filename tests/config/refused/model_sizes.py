"""Sizes of a model, and positions beyond the length that it was trained at."""

from tests.config.base import ROPE

REFUSED = {
    # sizes
    "model.hidden_size=130": (
        "model.hidden_size = 130: not a multiple of model.num_attention_heads = 4; choose 132, or set model.kv_channels"
    ),
    "model.position_embedding_type=rope model.kv_channels=33": (
        "model.position_embedding_type = 'rope': RoPE rotates pairs, and a head has 33 numbers to rotate; "
        "choose an even model.kv_channels, or hidden_size / num_attention_heads"
    ),
    # positions
    f"{ROPE} model.rope_scaling=linear": (
        "model.rope_scaling_factor = null: model.rope_scaling = linear divides by it; "
        "choose training.seq_length over the length trained at"
    ),
    f"{ROPE} model.rope_scaling=linear model.rope_scaling_factor=2.5": (
        "model.rope_scaling_factor = 2.5: Megatron divides positions by whole numbers; choose 2"
    ),
    f"{ROPE} model.rope_scaling=yarn model.rope_scaling_factor=4": (
        "model.rope_original_length = null: model.rope_scaling = yarn tells high frequencies from low ones by it; "
        "choose the length that the model was trained at"
    ),
    f"{ROPE} model.rope_scaling=llama3 model.rope_scaling_factor=8 model.rope_original_length=4096": (
        "model.rope_original_length = 4096: Megatron's rule of Llama 3.1 takes 8192; choose 8192, or yarn"
    ),
    f"{ROPE} model.rope_scaling=ntk model.rope_scaling_factor=8 megatron_args.use_rope_scaling=true": (
        "megatron_args.use_rope_scaling = true: model.rope_scaling = ntk decides about it; leave it out"
    ),
    f"{ROPE} model.rope_scaling=llama3 model.rope_scaling_factor=8 model.kind=hybrid": (
        "model.rope_scaling = 'llama3': Megatron's hybrid models (model.kind) scale positions evenly or not at all; ..."
    ),
    "model.rope_scaling=linear model.rope_scaling_factor=2": (
        "model.rope_scaling = 'linear': model.position_embedding_type is learned_absolute; ..."
    ),
    "model.rope_scaling_factor=2": "model.rope_scaling_factor = 2.0: model.rope_scaling is none; choose null, ...",
}
