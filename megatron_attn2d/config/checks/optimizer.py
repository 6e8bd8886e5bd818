"""Checks that the optimizer's keys fit each other."""

from collections.abc import Iterator

from megatron_attn2d.config.checks.refusal import Refusal
from megatron_attn2d.config.schema import RunConfig


def check_optimizer(run: RunConfig) -> Iterator[Refusal]:
    """Refuse rates and schedules that contradict each other, and what SGD or an overlap lacks."""
    optimizer = run.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield "optimizer.min_lr", f"more than optimizer.lr = {optimizer.lr}", f"choose {optimizer.lr} or less"
    if optimizer.lr_decay_style == "WSD" and not run.megatron_args.keys() & {
        "lr_wsd_decay_iters",
        "lr_wsd_decay_samples",
    }:
        yield "optimizer.lr_decay_style", "WSD decays over its last steps", "set megatron_args.lr_wsd_decay_iters too"
    decay = optimizer.lr_decay_iters or run.training.train_iters
    if optimizer.lr_warmup_iters >= decay:
        yield "optimizer.lr_warmup_iters", f"the learning rate decays over {decay} steps", f"choose less than {decay}"
    if optimizer.overlap_param_gather and not (optimizer.use_distributed_optimizer and optimizer.overlap_grad_reduce):
        yield (
            "optimizer.overlap_param_gather",
            "needs use_distributed_optimizer and overlap_grad_reduce",
            "choose false, or set both to true",
        )
    if optimizer.optimizer == "sgd" and optimizer.use_distributed_optimizer:
        yield "optimizer.use_distributed_optimizer", "Megatron shards the state of Adam alone", "choose false, or adam"
    if optimizer.optimizer == "sgd" and run.checkpoint.save and not run.megatron_args.get("no_save_optim"):
        yield (
            "optimizer.optimizer",
            "Megatron can't load a saved state of SGD, so that the run could not be continued",
            "choose adam, or checkpoint.save=false",
        )
