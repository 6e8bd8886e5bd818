"""Arguments of Megatron that a key decides about, that can't hold here, or that would change nothing."""

REFUSED = {
    # decided by a key, or impossible
    "megatron_args.lr=0.1": "megatron_args.lr = 0.1: optimizer.lr decides about --lr; set optimizer.lr",
    "megatron_args.tensor-model-parallel-size=2": (
        "megatron_args.tensor_model_parallel_size = 2: parallelism.tensor decides about "
        "--tensor-model-parallel-size; set parallelism.tensor"
    ),
    "megatron_args.cp_comm_type=[p2p]": (
        "megatron_args.cp_comm_type = ['p2p']: context_parallel.mode decides about --cp-comm-type; "
        "set context_parallel.mode"
    ),
    "megatron_args.bf16=true": (
        "megatron_args.bf16 = true: training.precision decides about --bf16; set training.precision"
    ),
    "megatron_args.attention_backend=local": (
        "megatron_args.attention_backend = 'local': --attention-backend makes Megatron replace context-parallel "
        "attention by its own, which sees the tokens of one rank only; choose auto, flash, fused or unfused"
    ),
    "megatron_args.hybrid_context_parallel=true": (
        "megatron_args.hybrid_context_parallel = true: --hybrid-context-parallel changes the context-parallel group "
        "with every batch, and a grid is laid once; leave it out"
    ),
    "megatron_args.moe_router_topk=[1, 2]": (
        "megatron_args.moe_router_topk = [1, 2]: --moe-router-topk takes one value; write one value"
    ),
    "megatron_args.window_size=[512, 0, 1]": (
        "megatron_args.window_size = [512, 0, 1]: not how many tokens before and after it a token sees; "
        "write [left, right], the right one -1 for all"
    ),
    "megatron_args.window_size=wide": "megatron_args.window_size = 'wide': not how many tokens before and after it ...",
    "megatron_args.window_size=[-1, 0]": "megatron_args.window_size = [-1, 0]: not how many tokens before and ...",
    "megatron_args={num-experts: 4, num_experts: 8}": (
        "megatron_args.num_experts = 8: is given with hyphens and with underscores; keep one"
    ),
    "megatron_args.qk-clip=true": (
        "megatron_args.qk_clip = true: --qk-clip needs the largest score, which our attention does not report yet; "
        "leave it out"
    ),
    "megatron_args.rampup_batch_size=[2, 2, 4]": (
        "megatron_args.rampup_batch_size = [2, 2, 4]: --rampup-batch-size is not read by Megatron-Core 0.19; ..."
    ),
    "megatron_args.overlap_moe_expert_parallel_comm=true": (
        "megatron_args.overlap_moe_expert_parallel_comm = true: --overlap-moe-expert-parallel-comm asks the training "
        "loop for a schedule of single layers (return_schedule_plan), which ours does not make; leave it out"
    ),
    "megatron_args.delay_wgrad_compute=true": (
        "megatron_args.delay_wgrad_compute = true: --delay-wgrad-compute needs --overlap-moe-expert-parallel-comm, ..."
    ),
    "megatron_args.step_batch_size_schedule='0:2 4:4'": (
        "megatron_args.step_batch_size_schedule = '0:2 4:4': --step-batch-size-schedule excludes training.global_b..."
    ),
    "megatron_args.train_samples=100": "megatron_args.train_samples = 100: --train-samples excludes training.train_...",
    "megatron_args={fim_data: true, fim_rate: 0.5}": (
        "megatron_args.fim_data = true: --fim-data would be ignored: it is for data sets or losses other than ours; ..."
    ),
    "megatron_args.full_validation=true": "megatron_args.full_validation = true: --full-validation would be ignored...",
    "megatron_args.yaml_cfg=x.yaml": (
        "megatron_args.yaml_cfg = 'x.yaml': --yaml-cfg discards all other arguments; leave it out"
    ),
    "megatron_args.num_experts=1": (
        "megatron_args.num_experts = 1: a token goes to megatron_args.moe_router_topk = 2 of them; choose 2 or ..."
    ),
    # measured to change nothing
    "megatron_args.reset_position_ids=true model.position_embedding_type=rope": (
        "megatron_args.reset_position_ids = true: --reset-position-ids changes nothing in a GPT whose "
        "position_embedding_type is rope; leave it out"
    ),
    "megatron_args.use_rope_scaling=true": "megatron_args.use_rope_scaling = true: --use-rope-scaling changes ...",
    "model.rotary_base=500000": (
        "model.rotary_base = 500000: --rotary-base changes nothing in a GPT whose position_embedding_type is "
        "learned_absolute; leave it out"
    ),
    "megatron_args={multi_latent_attention: true, yarn_original_max_position_embeddings: 8192}": (
        "megatron_args.yarn_original_max_position_embeddings = 8192: --yarn-original-max-position-embeddings changes "
        "nothing in a GPT with latent attention whose rope_type is yarn; leave it out"
    ),
    "megatron_args={hybrid_layer_pattern: '*-*-', use_rope_scaling: true} model.position_embedding_type=rope": (
        "megatron_args.use_rope_scaling = true: --use-rope-scaling changes nothing in a hybrid model whose ..."
    ),
    "megatron_args.hybrid_layer_pattern='*-*-' model.qk_layernorm=true": (
        "model.qk_layernorm = true: --qk-layernorm changes nothing in a hybrid model whose ..."
    ),
    "megatron_args.rope_scaling_factor=16 model.position_embedding_type=rope": (
        "megatron_args.rope_scaling_factor = 16: --rope-scaling-factor changes nothing without use_rope_scaling; "
        "set use_rope_scaling too, or leave it out"
    ),
    "megatron_args.moe_z_loss_coeff=0.001": "megatron_args.moe_z_loss_coeff = 0.001: --moe-z-loss-coeff changes ...",
    "megatron_args.grpo_iterations=4": "megatron_args.grpo_iterations = 4: --grpo-iterations changes nothing in ...",
    "megatron_args={'': 1}": "megatron_args.: no argument of Megatron; none of ...",
    "megatron_args.log_progres=true": "megatron_args.log_progres: no argument of Megatron; did you mean log_progress?",
    "megatron_args.apply_rope_fusion=false": (
        "megatron_args.apply_rope_fusion: no argument of Megatron; Megatron writes it --no-rope-fusion"
    ),
    "megatron_args.log_progress=1": (
        "megatron_args.log_progress = 1: --log-progress takes no value; write true, or false to leave it out"
    ),
    "megatron_args.ddp_bucket_size=many": (
        "megatron_args.ddp_bucket_size = 'many': Megatron refuses it: argument --ddp-bucket-size: invalid int ..."
    ),
    "megatron_args.weight_decay_incr_style=up": (
        "megatron_args.weight_decay_incr_style = 'up': Megatron refuses it: argument --weight-decay-incr-style: ..."
    ),
    "megatron_args.tokenizer_special_tokens=[--bf16]": (
        "megatron_args.tokenizer_special_tokens = ['--bf16']: --bf16 would be read as another argument; ..."
    ),
    "megatron_args.ddp_bucket_size=true": (
        "megatron_args.ddp_bucket_size = true: --ddp-bucket-size takes a value; "
        "write a number, a string or a list of them"
    ),
}
