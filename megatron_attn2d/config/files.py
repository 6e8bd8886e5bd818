"""Whether what a run reads is there and where it writes can be written: the last look before processes start."""

import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from megatron_attn2d import checkpoints
from megatron_attn2d.config.errors import ConfigError, ConfigErrors, show
from megatron_attn2d.config.loading import read_run
from megatron_attn2d.config.run import build_run
from megatron_attn2d.config.schema import Model, RunConfig
from megatron_attn2d.planner.run import LATENT_DIMS

_PLANNED = (
    *(f"optimizer.{key}" for key in ("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_warmup_iters")),
    *("optimizer.weight_decay", "training.global_batch_size", "training.train_iters"),
)
"""What the learning rate's course follows from. Megatron compares it with the checkpoint's, after all has started."""
_FREE = {"hidden_dropout", "attention_dropout", "init_method_std", "max_position_embeddings"}
_SHAPES = (
    *(f"model.{name}" for name in Model.model_fields if name not in _FREE),
    *("data.tokenizer_type", "data.vocab_size", "training.precision"),
    *("optimizer.optimizer", "optimizer.use_distributed_optimizer"),
)
"""What decides which weights and states there are, and what they mean. Megatron takes most over without a word."""
ALSO_SHAPES: dict[str, object] = {
    "window_size": None,
    "window_attn_skip_freq": None,
    "softmax_type": "vanilla",
    "qk_l2_norm": False,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rotary_interleaved": False,
    "squared_relu": False,
    "quick_geglu": False,
    "num_experts": None,
    "moe_router_topk": 2,
    "moe_layer_freq": 1,
    "moe_ffn_hidden_size": None,
    "moe_shared_expert_intermediate_size": None,
    "multi_latent_attention": False,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    **LATENT_DIMS,
    "mtp_num_layers": None,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "mtp_hybrid_override_pattern": None,
}
"""The same among Megatron's own arguments, and what they are where they are left out."""


def check_files(run: RunConfig) -> None:
    """Raise ConfigError, naming each key with its path, the reason and a way out, if files of `run` are missing."""
    # Directories are made to see whether they can be: only for a run that starts.
    if errors := [*_data(run), *_checkpoint(run), *_continued(run)] or [*_directories(run)]:
        raise ConfigErrors(errors)


def _data(run: RunConfig) -> Iterator[ConfigError]:
    from megatron_attn2d.data import is_complete

    for prefix in run.data.paths:
        if not is_complete(Path(prefix)):
            reason = f"{prefix}.bin and {prefix}.idx are not both there"
            yield ConfigError("data.paths", prefix, reason, "build it: megatron-attn2d data build")
    tokenizer = run.data.tokenizer_model
    if tokenizer and run.data.tokenizer_type != "NullTokenizer" and not Path(tokenizer).exists():
        yield ConfigError(
            "data.tokenizer_model", tokenizer, "there is no such file or folder", "name one on local disk"
        )


def _checkpoint(run: RunConfig) -> Iterator[ConfigError]:
    load = run.checkpoint.load
    begun = checkpoints.last_complete(Path(run.directory) / "checkpoints") is not None
    if load and not begun and not (Path(load) / checkpoints.TRACKER).is_file():
        # Megatron would begin with random weights.
        reason = f"there is no checkpoint in it, as it holds no {checkpoints.TRACKER}"
        yield ConfigError("checkpoint.load", load, reason, "name the folder that another run saves to, or null")


def _continued(run: RunConfig) -> Iterator[ConfigError]:
    """What another configuration than the one that a run was begun with has changed, and must not."""
    path = Path(run.directory) / "config.yaml"
    if not path.is_file() or checkpoints.last_complete(Path(run.directory) / "checkpoints") is None:
        return
    try:
        begun = build_run(read_run(path))
    except ConfigError:  # of another version of this package
        return
    overriding = ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")
    planned_anew = any(map(run.megatron_args.get, overriding))
    anew = "another run.dir, or megatron_args.override_opt_param_scheduler=true to plan the learning rate anew"
    for keys, instead in (
        (() if planned_anew else _PLANNED, anew),
        (_SHAPES, "another run.dir"),
    ):
        for key in keys:
            before, now = attrgetter(key)(begun), attrgetter(key)(run)
            if before != now:
                reason = f"the run in {run.directory} was begun with {show(before)}"
                yield ConfigError(key, now, reason, f"choose {show(before)}, or {instead}")
    for name, default in ALSO_SHAPES.items():
        before, now = (of.megatron_args.get(name) for of in (begun, run))
        if _word(before, default) != _word(now, default):
            reason = f"the run in {run.directory} was begun with {show(before)}"
            yield ConfigError(f"megatron_args.{name}", now, reason, f"choose {show(before)}, or another run.dir")


def _word(value: object, default: object) -> str:
    """What Megatron reads, however it is written: a list, a string or a number."""
    value = default if value is None else value
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _directories(run: RunConfig) -> Iterator[ConfigError]:
    written = {"run.dir": run.directory}
    if not (run.data.paths or run.data.mock):
        written["data.dir"] = run.data.dir
    for key, path in written.items():
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            yield ConfigError(key, path, f"can't be made a directory ({error.strerror})", "choose another")
            continue
        if not os.access(path, os.W_OK | os.X_OK):
            yield ConfigError(key, path, "can't be written to", "choose another")
