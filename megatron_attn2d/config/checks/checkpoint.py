"""Checks that a run can save and start as its keys say."""

import importlib.util
from collections.abc import Iterator

from megatron_attn2d.config import keys
from megatron_attn2d.config.checks.refusal import Refusal
from megatron_attn2d.config.schema import RunConfig
from megatron_attn2d.run import checkpoints


def check_checkpoint(run: RunConfig) -> Iterator[Refusal]:
    """Refuse keys about saving without saves, starts that contradict each other, and formats that lack a feature."""
    yield from _check_saves(run)
    yield from _check_start(run)
    yield from _check_may_change(run)
    yield from _check_format(run)


def _check_saves(run: RunConfig) -> Iterator[Refusal]:
    checkpoint = run.checkpoint
    if checkpoint.save_interval is not None and not checkpoint.save:
        yield "checkpoint.save_interval", "checkpoint.save is false", "choose null"
    for key, wanted in (
        ("checkpoint.keep_last", checkpoint.keep_last),
        ("checkpoint.async_save", checkpoint.async_save),
    ):
        if wanted and not checkpoint.save:
            yield key, "checkpoint.save is false", "leave it out"
    if checkpoint.async_save and importlib.util.find_spec("nvidia_resiliency_ext") is None:
        yield (
            "checkpoint.async_save",
            "Megatron saves in the background by nvidia_resiliency_ext, which is not installed",
            "pip install 'nvidia-resiliency-ext>=0.6', or choose false",
        )


def _check_start(run: RunConfig) -> Iterator[Refusal]:
    checkpoint, arguments = run.checkpoint, run.megatron_args
    if checkpoint.load and checkpoint.start_from:
        yield "checkpoint.start_from", "checkpoint.load is given too", "start_from takes the weights alone; keep one"
    for name in (name for name in keys.FIRST_START if arguments.get(name) not in (None, False)):
        key = f"megatron_args.{name}"
        if not (checkpoint.load or checkpoint.start_from):
            way = "leave it out"
            if name == "ckpt_step":
                way += f", and to go back in a run write the step into its checkpoints/{checkpoints.TRACKER}"
            yield key, "is about a start from checkpoint.load or checkpoint.start_from, which are null", way
        elif checkpoint.start_from and name in {"no_load_optim", "no_load_rng", "override_ckpt_iteration"}:
            yield key, "checkpoint.start_from takes the weights alone", "leave it out"


def _check_may_change(run: RunConfig) -> Iterator[Refusal]:
    for key in run.checkpoint.may_change:
        if not keys.is_key(key):
            yield "checkpoint.may_change", f"{key} is no key", "write section.key"
        elif keys.is_fixed(key):
            yield "checkpoint.may_change", f"weights or states depend on {key}", "leave it out"


def _check_format(run: RunConfig) -> Iterator[Refusal]:
    checkpoint, arguments = run.checkpoint, run.megatron_args
    torch_dist = arguments.get("ckpt_format") in (None, "torch_dist")
    if checkpoint.save and checkpoint.verify_integrity and not torch_dist:
        yield (
            "checkpoint.verify_integrity",
            f"only checkpoints of the format torch_dist carry checksums, not {arguments['ckpt_format']}",
            "choose false, or leave megatron_args.ckpt_format out",
        )
    if checkpoint.async_save and not torch_dist:
        reason = f"Megatron saves no checkpoints of the format {arguments['ckpt_format']} in the background"
        yield "checkpoint.async_save", reason, "choose false, or leave megatron_args.ckpt_format out"
    if arguments.get("non_persistent_save_interval") and arguments.get("non_persistent_ckpt_type") is None:
        reason = "Megatron saves those by a megatron_args.non_persistent_ckpt_type, which is null"
        yield "megatron_args.non_persistent_save_interval", reason, "set that to global, or leave both out"
