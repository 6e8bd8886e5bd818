"""The optimizer, and what is saved and loaded."""

REFUSED = {
    # optimizer
    "optimizer.grad_reduce_in_bf16=true": "optimizer.grad_reduce_in_bf16 = true: training.precision is fp32; ...",
    "optimizer.lr_decay_style=WSD": (
        "optimizer.lr_decay_style = 'WSD': WSD decays over its last steps; set megatron_args.lr_wsd_decay_iters too"
    ),
    "optimizer.min_lr=0.1": "optimizer.min_lr = 0.1: more than optimizer.lr = 0.001; choose 0.001 or less",
    "optimizer.lr_warmup_iters=60": (
        "optimizer.lr_warmup_iters = 60: the learning rate decays over 60 steps; choose less than 60"
    ),
    "optimizer.overlap_param_gather=true": (
        "optimizer.overlap_param_gather = true: needs use_distributed_optimizer and overlap_grad_reduce; "
        "choose false, or set both to true"
    ),
    "optimizer.optimizer=sgd checkpoint.save=true": (
        "optimizer.optimizer = 'sgd': Megatron can't load a saved state of SGD, so that the run could not be ..."
    ),
    "optimizer.optimizer=sgd optimizer.use_distributed_optimizer=true checkpoint.save=false": (
        "optimizer.use_distributed_optimizer = true: Megatron shards the state of Adam alone; choose false, or adam"
    ),
    # checkpoints
    "checkpoint.save=false checkpoint.save_interval=5": (
        "checkpoint.save_interval = 5: checkpoint.save is false; choose null"
    ),
    "checkpoint.save=false checkpoint.keep_last=2": (
        "checkpoint.keep_last = 2: checkpoint.save is false; leave it out"
    ),
    "checkpoint.keep_last=0": "checkpoint.keep_last = 0: must be greater than 0",
    "checkpoint.load=a checkpoint.start_from=b": (
        "checkpoint.start_from = 'b': checkpoint.load is given too; start_from takes the weights alone; keep one"
    ),
    "checkpoint.load=a megatron_args.finetune=true": (
        "megatron_args.finetune = true: checkpoint.start_from decides about --finetune; set checkpoint.start_from"
    ),
    "megatron_args.pretrained_checkpoint=a": (
        "megatron_args.pretrained_checkpoint = 'a': checkpoint.start_from decides about --pretrained-checkpoint; ..."
    ),
    "megatron_args.no_load_optim=true": (
        "megatron_args.no_load_optim = true: is about a start from checkpoint.load or checkpoint.start_from, which are "
        "null; leave it out"
    ),
    "checkpoint.start_from=a megatron_args.no_load_rng=true": (
        "megatron_args.no_load_rng = true: checkpoint.start_from takes the weights alone; leave it out"
    ),
    "megatron_args.ckpt_step=4": (
        "megatron_args.ckpt_step = 4: is about a start from checkpoint.load or checkpoint.start_from, which are null; "
        "leave it out, and to go back in a run write the step into its "
        "checkpoints/latest_checkpointed_iteration.txt"
    ),
    "megatron_args.override_opt_param_scheduler=true": (
        "megatron_args.override_opt_param_scheduler = true: checkpoint.may_change decides about ..."
    ),
    "megatron_args.use_checkpoint_args=true": (
        "megatron_args.use_checkpoint_args = true: --use-checkpoint-args takes the model from the checkpoint, ..."
    ),
    "megatron_args.exit_on_missing_checkpoint=true": "megatron_args.exit_on_missing_checkpoint = true: ...",
    "megatron_args.ckpt_format=torch": (
        "checkpoint.verify_integrity = true: only checkpoints of the format torch_dist carry checksums, not torch; "
        "choose false, or leave megatron_args.ckpt_format out"
    ),
    "megatron_args.non_persistent_save_interval=2": (
        "megatron_args.non_persistent_save_interval = 2: Megatron saves those by a "
        "megatron_args.non_persistent_ckpt_type, which is null; set that to global, or leave both out"
    ),
    "checkpoint.may_change=[data.path]": "checkpoint.may_change = ['data.path']: data.path is no key; ...",
    "checkpoint.may_change=[model.num_layers]": (
        "checkpoint.may_change = ['model.num_layers']: weights or states depend on model.num_layers; leave it out"
    ),
    "megatron_args.async_save=true": (
        "megatron_args.async_save = true: checkpoint.async_save decides about --async-save; set checkpoint.async_save"
    ),
}
