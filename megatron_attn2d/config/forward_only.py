"""The configuration of a trained run for evaluation and generation: the same weights, without keys about training."""

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from megatron_attn2d.config.keys import changed, value
from megatron_attn2d.config.layer_pattern import UNEVEN_STAGES
from megatron_attn2d.config.loading import read_run
from megatron_attn2d.config.read import build_run
from megatron_attn2d.config.schema import RunConfig
from megatron_attn2d.errors import ConfigError, ConfigErrors, UsageError, show
from megatron_attn2d.megatron.upstream.quiet_imports import quiet_import

FORWARD_ONLY = (
    "training.micro_batch_size=1",
    "training.global_batch_size=1",
    "training.eval_iters=0",
    "training.recompute_granularity=null",
    "training.recompute_method=null",
    "training.recompute_num_layers=null",
    "training.keep_attention_outputs=false",
    "training.offload_activations=false",
    "training.cuda_graphs=none",
    "parallelism.data=1",
    "parallelism.virtual_pipeline=null",
    "environment.nodes=null",
    "environment.gpus_per_node=null",
    "optimizer.use_distributed_optimizer=false",
    "optimizer.overlap_grad_reduce=false",
    "optimizer.overlap_param_gather=false",
    "checkpoint.save=false",
    "checkpoint.save_interval=null",
    "checkpoint.keep_last=null",
    "checkpoint.async_save=false",
    "logging.tensorboard=false",
    "logging.wandb_project=null",
    "logging.attention_communication=false",
    "data.format=text",
    "data.document_masking=false",
    "data.document_multiple=null",
    "data.document_bins=null",
    "data.split=1,0,0",
)
"""Overrides that replace the keys about training."""
_STAGES = ("num_layers_per_virtual_pipeline_stage", "microbatch_group_size_per_vp_stage")
"""Arguments of Megatron about the interleaved schedule, which needs more than one batch."""
_WEIGHTS = ("model.", "megatron_args.", "data.vocab_size", "data.tokenizer_type")
"""Beginnings of the keys that decide about the weights and their meaning."""
_LAYOUT = ("context_parallel.size=", "context_parallel.mode=", "context_parallel.grid=", "parallelism.")
"""Beginnings of overrides that change the layout of the ranks."""


def on_another_grid(overrides: Sequence[str]) -> list[str]:
    """Overrides to put before `overrides`: where these change the layout of the ranks, they undo the saved grid."""
    if not any(override.startswith(_LAYOUT) for override in overrides):
        return []
    return ["context_parallel.grid=auto", "context_parallel.tile=null", "context_parallel.head_groups=auto"]


def trained_run(run_dir: Path) -> tuple[Path, RunConfig]:
    """The configuration file of the run in `run_dir`, and the run that it describes.

    Raises:
        UsageError: there is no such file.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the directory of a run")
    return path, build_run(read_run(path))


def accepted(
    path: Path,
    trained: RunConfig,
    decided: Sequence[str],
    overrides: Sequence[str],
    reasons: dict[str, str],
    command: str,
    free: tuple[str, ...] = (),
) -> list[str]:
    """The overrides with which `command` loads the run of `path`: its own, the user's, and nulls for what is outdated.

    Args:
        path: the run's configuration file.
        trained: the run as it was trained.
        decided: the overrides that `command` decides about.
        overrides: the user's.
        reasons: keys that `command` decides about besides those of `FORWARD_ONLY`, and why.
        command: its name, for messages.
        free: keys of `FORWARD_ONLY` that `command` leaves to the user.

    Raises:
        ConfigError: an override changes a key that `command` decides about, or on which the weights depend, or asks for
            pipeline stages that no evaluation can have.
    """
    asked = build_run(read_run(path, [*decided, *overrides]))
    _check_overrides(trained, build_run(read_run(path, decided)), asked, reasons, command, free)
    left_out = [f"megatron_args.{name}=null" for name in _stages_of_training(trained, asked)]
    return [*decided, *overrides, *left_out]


def _check_overrides(
    trained: RunConfig,
    decided: RunConfig,
    asked: RunConfig,
    reasons: dict[str, str],
    command: str,
    free: tuple[str, ...],
) -> None:
    """Raise ConfigError where `asked` differs from what `command` decided, or from what the weights depend on.

    `decided` is the run as `command` leaves it, `asked` the same with the user's overrides; see `accepted`.
    """
    keys = [override.partition("=")[0] for override in FORWARD_ONLY if not override.startswith("environment.")]
    keys = [key for key in keys if key not in free]
    errors = []
    for key in [*reasons, *keys]:
        ours, theirs = attrgetter(key)(decided), attrgetter(key)(asked)
        if theirs != ours and not (key == "run.dir" and Path(theirs).resolve() == Path(ours).resolve()):
            errors.append(ConfigError(key, theirs, reasons.get(key, f"{command} decides about it"), "leave it out"))
    for key in changed(decided, asked):
        if key.startswith(_WEIGHTS) and key not in reasons:
            before, now = value(trained, key), value(asked, key)
            if "pattern" in key and str(before).replace("|", "") == str(now).replace("|", ""):  # only the stages differ
                continue
            errors.append(ConfigError(key, now, f"the run was trained with {show(before)}", "leave it out"))
    if errors:
        raise ConfigErrors(errors)


def _stages_of_training(trained: RunConfig, asked: RunConfig) -> list[str]:
    """Arguments of Megatron about the pipeline stages of `trained` that can't hold for the evaluation `asked`.

    Raises:
        ConfigError: an override gives an argument that can't hold.
    """
    pipeline, left_out = asked.parallelism.pipeline, []
    for name in (*_STAGES, *UNEVEN_STAGES):
        given = asked.megatron_args.get(name)
        if given is None:
            continue
        reason = "one window is evaluated at a time, which an interleaved schedule can't"
        fits = name in UNEVEN_STAGES and pipeline == trained.parallelism.pipeline
        if name == "pipeline_model_parallel_layout":
            upstream = quiet_import("megatron.core.transformer.pipeline_parallel_layer_layout")
            stages = upstream.PipelineParallelLayerLayout.get_num_stages_from_str(str(given))
            fits = stages == pipeline
            reason = f"{stages} stages, but parallelism.pipeline is {pipeline}, and {reason}"
        if given == trained.megatron_args.get(name):
            left_out += [] if fits else [name]
        elif not fits and (name in _STAGES or name == "pipeline_model_parallel_layout"):
            raise ConfigError(f"megatron_args.{name}", given, reason, "leave it out")
    return left_out
