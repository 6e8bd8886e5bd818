"""From a RunConfig to Megatron's command line."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megatron_attn2d.config import effects, upstream_flags
from megatron_attn2d.config.keys import FIRST_START, is_schedule
from megatron_attn2d.config.layer_pattern import PER_LAYER, hybrid_arguments, is_hybrid, layer_pattern, of_each_symbol
from megatron_attn2d.config.schema import NO_FLAG, Flag, Model, RunConfig
from megatron_attn2d.config.yaml_io import parse
from megatron_attn2d.errors import ConfigError, ConfigErrors, nearest
from megatron_attn2d.megatron.refusals import refusal
from megatron_attn2d.run.checkpoints import last_complete

CP_COMM_TYPES = {"attention2d": "attention2d", "ring": "p2p", "all_gather": "all_gather", "ulysses": "a2a"}

# Flags that no field emits by its own name, and the key that decides about each.
_DECIDED_BY = {
    "num-layers": "model.num_layers",
    "num-virtual-stages-per-pipeline-rank": "parallelism.virtual_pipeline",
    "group-query-attention": "model.num_query_groups",
    "num-query-groups": "model.num_query_groups",
    "max-position-embeddings": "model.max_position_embeddings",
    "position-embedding-type": "model.position_embedding_type",
    "rotary-base": "model.rotary_base",
    "cp-comm-type": "context_parallel.mode",
    "hierarchical-context-parallel-sizes": "context_parallel.grid",
    "data-path": "data.paths",
    "train-data-path": "data.paths",
    "dataloader-inter-document-masking": "data.document_masking",
    "document-multiple": "data.document_multiple",
    "document-bins": "data.document_bins",
    "examples": "data.format",
    "sft": "data.format",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "fp8-recipe": "training.fp8",
    "enable-cuda-graph": "training.cuda_graphs",
    "external-cuda-graph": "training.cuda_graphs",
    "cuda-graph-scope": "training.cuda_graphs",
    "eval-interval": "training.eval_interval",
    "save": "checkpoint.save",
    "save-interval": "checkpoint.save_interval",
    "load": "checkpoint.load",
    "finetune": "checkpoint.start_from",
    "pretrained-checkpoint": "checkpoint.start_from",
    "override-opt-param-scheduler": "checkpoint.may_change",
    "async-save": "checkpoint.async_save",
    "use-persistent-ckpt-worker": "checkpoint.async_save",
    "save-retain-interval": "checkpoint.keep_last",
    "tensorboard-dir": "logging.tensorboard",
    "wandb-exp-name": "run.name",
    "wandb-save-dir": "run.dir",
    "distributed-backend": "environment.device",
    "run-dir": "run.dir",
    "keep-attention-outputs": "training.keep_attention_outputs",
}
_IGNORED = "would be ignored: it is for data sets or losses other than ours"
# Arguments that bypass a run's YAML, besides those that no training takes (`megatron.refusals`).
_REFUSED = {
    "spec": "replaces the layers, and with them the attention that context_parallel.mode chooses",
    "local-rank": "is the launcher's business",
    "use-checkpoint-opt-param-scheduler": "takes the learning rate's course from the checkpoint, whatever is said here",
    "use-checkpoint-args": "takes the model from the checkpoint, whatever is said here",
    "use-mp-args-from-checkpoint-args": "takes the parallelism from the checkpoint, whatever is said here",
    "exit-on-missing-checkpoint": "ends each first start; that the named checkpoints exist is looked at in any case",
    "check-for-spiky-loss": _IGNORED,
    "dataloader-defer-npy-index-mmap": _IGNORED,
    "dataloader-fast-cache-load": _IGNORED,
    "fim-data": _IGNORED,
    "full-validation": _IGNORED,
    "multiple-validation-sets": _IGNORED,
    "per-dataset-sequences-path": _IGNORED,
    "rampup-batch-size": "is read by nobody in Megatron-Core 0.19",
    "step-batch-size-schedule": "excludes training.global_batch_size, which a run must have",
    "train-samples": "excludes training.train_iters, by which a run is planned and continued",
}

_PATTERNS = ("hybrid-layer-pattern", "hybrid-override-pattern", "mtp-hybrid-override-pattern")
_WINDOW = re.compile(r"\d+,(\d+|-1)")


def megatron_arguments(run: RunConfig) -> list[str]:
    """Megatron's command line for `run`, and `--run-dir`.

    Raises:
        ConfigError: `megatron_args` holds a key that Megatron doesn't know, a wrong value, or what `run` decides, or an
            argument would change nothing in this model.
    """
    sections = [getattr(run, name) for name in type(run).model_fields if name != "megatron_args"]
    arguments = [token for section in sections for token in _section_arguments(section)]
    builders = (_layers, _positions, _attention, _precision, _graphs, _data, _evaluation, _checkpoint, _logging)
    for build in builders:
        arguments += build(run)
    outdated = {key.removeprefix("megatron_args.") for key in left_out(run)}
    passed = {name: None if name in outdated else value for name, value in run.megatron_args.items()}
    if is_hybrid(run):
        passed = hybrid_arguments(run, passed)
    arguments += ["--run-dir", run.directory, *_passed_through(passed)]
    if errors := [_ignored(one) for one in effects.ignored(arguments)]:
        raise ConfigErrors(errors)
    return arguments


def _ignored(one: effects.Ignored) -> ConfigError:
    values = [parse(value, one.flag) for value in one.values] or [True]
    return ConfigError(key_of(one.flag), values[0] if len(values) == 1 else values, one.reason, one.choice)


def key_of(flag: str) -> str:
    """The key of a run's YAML that decides about an argument of Megatron's."""
    name = flag.removeprefix("--")
    return _owners().get(name, f"megatron_args.{name.replace('-', '_')}")


def _flag(name: str, *values: object) -> list[str]:
    return [f"--{name}", *map(str, values)]


def _spelling(name: str, metadata: list[Any]) -> Flag:
    return next((m for m in metadata if isinstance(m, Flag)), Flag(name.replace("_", "-")))


def _section_arguments(section: BaseModel) -> list[str]:
    arguments = []
    for name, field in type(section).model_fields.items():
        flag, value = _spelling(name, field.metadata), getattr(section, name)
        if flag == NO_FLAG or value is None:
            continue
        if isinstance(value, bool):
            arguments += _flag(flag.name) if value == flag.when else []
        else:
            arguments += _flag(flag.name, value)
    return arguments


def _layers(run: RunConfig) -> list[str]:
    if is_hybrid(run):  # its pattern says both
        return []
    arguments = _flag("num-layers", run.model.num_layers)
    if run.parallelism.virtual_pipeline is not None:
        arguments += _flag("num-virtual-stages-per-pipeline-rank", run.parallelism.virtual_pipeline)
    return arguments


def _positions(run: RunConfig) -> list[str]:
    model = run.model
    scaling, base = model.rope_scaling, model.rotary_base
    kind = "yarn" if scaling == "yarn" else model.position_embedding_type
    arguments = _flag("position-embedding-type", kind)
    arguments += _flag("max-position-embeddings", model.max_position_embeddings or run.training.seq_length)
    if scaling == "ntk":
        base = ntk_base(model)
    elif scaling == "linear":
        arguments += _flag("rotary-seq-len-interpolation-factor", round(model.rope_scaling_factor or 1))
    elif scaling == "llama3":
        arguments += ["--use-rope-scaling", *_flag("rope-scaling-factor", model.rope_scaling_factor)]
    elif scaling == "yarn":
        arguments += _flag("rotary-scaling-factor", model.rope_scaling_factor)
        arguments += _flag("yarn-original-max-position-embeddings", model.rope_original_length)
    return arguments + ([] if base is None else _flag("rotary-base", base))


def ntk_base(model: Model) -> int:
    """The base with which RoPE's lowest frequency is divided by the factor, and its highest one stays."""
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    rotated = int(head * (model.rotary_percent or 1.0))
    factor: float = (model.rope_scaling_factor or 1.0) ** (rotated / (rotated - 2))
    return round((model.rotary_base or 10000) * factor)


def _attention(run: RunConfig) -> list[str]:
    model, context = run.model, run.context_parallel
    arguments = []
    if model.num_query_groups:
        arguments += ["--group-query-attention", *_flag("num-query-groups", model.num_query_groups)]
    modes = context.layer_modes or [context.mode]
    if is_hybrid(run) and context.layer_modes:
        modes = of_each_symbol(context.layer_modes, layer_pattern(run))
    arguments += ["--keep-attention-outputs"] if run.keeps_attention_outputs else []
    arguments += _flag("cp-comm-type", *(CP_COMM_TYPES[mode] for mode in modes))
    if context.mode == "attention2d" and context.size > 1:
        # Upstream's groups of the last size but one are the columns, those of the last, more strided, the rows.
        (heads, rows, columns), (tile_rows, tile_columns) = run.grid, run.tile
        sizes = [rows, columns]
        if (tile_rows, tile_columns) != (rows, 1):
            sizes = [tile_rows, tile_columns, rows // tile_rows, columns // tile_columns]
        arguments += _flag("hierarchical-context-parallel-sizes", *([heads] if heads > 1 else []), *sizes)
        arguments += _flag("attention2d-head-groups", run.head_groups) if run.head_groups > 1 else []
    return arguments


def _precision(run: RunConfig) -> list[str]:
    arguments = [] if run.training.precision == "fp32" else _flag(run.training.precision)
    if (recipe := run.training.fp8) != "none":
        arguments += _flag("fp8-recipe", recipe)
        if run.megatron_args.get("fp8_format") is None:
            # Scales of a whole tensor want the wider range for gradients; a block's need the digits.
            arguments += _flag("fp8-format", "e4m3" if recipe == "blockwise" else "hybrid")
    return arguments


def _graphs(run: RunConfig) -> list[str]:
    given, arguments = run.megatron_args, []
    if run.training.cuda_graphs != "none" and given.get("cuda_graph_impl") is None:
        arguments += _flag("cuda-graph-impl", run.graph_implementation)
    if run.training.cuda_graphs == "attention" and given.get("cuda_graph_modules") is None:
        arguments += _flag("cuda-graph-modules", "attn")
    return arguments


def _data(run: RunConfig) -> list[str]:
    arguments = _flag("document-multiple", run.document_multiple) if run.document_multiple else []
    arguments += _flag("document-bins", run.data.document_bins) if run.data.document_bins else []
    arguments += _flag("examples") if run.data.format == "sft" else []
    return arguments + ([] if run.data.mock else _flag("data-path", *data_blend(run)))


def data_blend(run: RunConfig) -> list[str]:
    """The prefixes of the data sets, each after its weight where they have weights, as `--data-path` takes them."""
    paths = run.data.paths
    if isinstance(paths, dict):
        return [str(word) for path, weight in paths.items() for word in (weight, path)]
    return [*paths] or [embedded_data(run)]


def embedded_data(run: RunConfig) -> str:
    """Prefix of the embedded data set, which `data.indexed` builds, or `data.docstrings` that of examples."""
    return str(Path(run.data.dir) / ("python-docstrings" if run.data.format == "sft" else "python-standard-library"))


def _evaluation(run: RunConfig) -> list[str]:
    return _flag("eval-interval", run.training.eval_interval or run.training.train_iters)


def has_begun(run: RunConfig) -> bool:
    """Whether `run` has a checkpoint of its own, from which it goes on."""
    return last_complete(Path(run.directory) / "checkpoints") is not None


def left_out(run: RunConfig) -> list[str]:
    """The keys of `run` that are about its first start, and that a run with a checkpoint of its own leaves out."""
    named = [f"checkpoint.{name}" for name in ("load", "start_from") if getattr(run.checkpoint, name)]
    named += [f"megatron_args.{name}" for name in FIRST_START if run.megatron_args.get(name) not in (None, False)]
    return named if has_begun(run) else []


def _checkpoint(run: RunConfig) -> list[str]:
    checkpoint, own, begun = run.checkpoint, Path(run.directory) / "checkpoints", has_begun(run)
    arguments = []
    if begun or checkpoint.load or checkpoint.save:
        arguments += _flag("load", own if begun or not checkpoint.load else checkpoint.load)
    if checkpoint.start_from and not begun:
        arguments += _flag("pretrained-checkpoint", checkpoint.start_from)
    if any(map(is_schedule, checkpoint.may_change)):
        arguments += ["--override-opt-param-scheduler"]
    if not checkpoint.save:
        return arguments
    return [
        *arguments,
        *_flag("save", own),
        *_flag("save-interval", checkpoint.save_interval or run.training.train_iters),
        *(["--async-save"] if checkpoint.async_save else []),
        # One writer for the whole run, rather than a fork for each save; it needs a CUDA device, or dies unheard.
        *(["--use-persistent-ckpt-worker"] if checkpoint.async_save and run.environment.device == "cuda" else []),
    ]


def _logging(run: RunConfig) -> list[str]:
    directory, arguments = Path(run.directory), []
    if run.logging.tensorboard or run.logging.wandb_project:  # upstream hands to W&B what it hands to TensorBoard
        arguments += _flag("tensorboard-dir", directory / "tensorboard")
    if run.logging.wandb_project:
        arguments += _flag("wandb-exp-name", run.run.name) + _flag("wandb-save-dir", directory / "wandb")
    if run.cluster.peak_tflops:
        arguments += _flag("peak-tflops", run.cluster.peak_tflops)
    return arguments


def _passed_through(megatron_args: dict[str, Any]) -> list[str]:
    given = {name.replace("_", "-"): value for name, value in megatron_args.items() if value is not None}
    owners = _owners()
    for name, value in given.items():
        key = f"megatron_args.{name.replace('-', '_')}"
        if name in owners:
            raise ConfigError(key, value, f"{owners[name]} decides about --{name}", f"set {owners[name]}")
        if name in _REFUSED and value is not False:
            raise ConfigError(key, value, f"--{name} {_REFUSED[name]}", "leave it out")
        if refused := refusal(name.replace("-", "_"), value):
            raise ConfigError(key, value, f"--{name} {refused.reason}", refused.choice)
        if name in _PATTERNS and "D" in str(value):
            reason = "D, sparse attention, chooses its keys from the whole sequence, which no rank has"
            raise ConfigError(key, value, reason, "choose * or +")
    return [token for name, value in given.items() for token in _parsed_by_upstream(name, value)]


@cache
def _owners() -> dict[str, str]:
    """Which of our keys decides about which flag."""
    fields = {
        _spelling(name, field.metadata).name: f"{title}.{name}"
        for title, section in RunConfig.model_fields.items()
        for name, field in getattr(section.annotation, "model_fields", {}).items()
    }
    return {flag: key for flag, key in (fields | _DECIDED_BY).items() if flag}


def _parsed_by_upstream(name: str, value: object) -> list[str]:
    """The tokens for `--name value`, which upstream's parser would accept."""
    key, flag, known = f"megatron_args.{name.replace('-', '_')}", f"--{name}", upstream_flags.options()
    if flag not in known:
        by_destination = {option.dest: spelled for spelled, option in known.items()}
        if spelled := by_destination.get(name.replace("-", "_")):
            choice = f"Megatron writes it {spelled}"
        else:
            choice = nearest(
                name.replace("-", "_"), [option.dest for spelled, option in known.items() if spelled.startswith("--")]
            )
        raise ConfigError(key, reason="no argument of Megatron", choice=choice, has_value=False)
    if known[flag].nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(key, value, f"{flag} takes no value", "write true, or false to leave it out")
        return _flag(name) if value else []
    values = value if isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, int | float | str):
            raise ConfigError(key, value, f"{flag} takes a value", "write a number, a string or a list of them")
        if isinstance(one, str) and one.startswith("-"):
            raise ConfigError(key, value, f"{one} would be read as another argument", "begin it with something else")
    if name == "window-size":  # which Megatron wants in one word; its own parser takes seconds to import
        word = ",".join(map(str, values))
        if not _WINDOW.fullmatch(word):
            reason = "not how many tokens before and after it a token sees"
            raise ConfigError(key, value, reason, "write [left, right], the right one -1 for all")
        return _flag(name, word)
    if key.removeprefix("megatron_args.") in PER_LAYER and isinstance(value, list):  # in one word, too
        if not all(one in (0, 1) for one in value):
            raise ConfigError(key, value, f"{flag} takes 0 or 1 for each layer", "write [1, 0, ...], or one number")
        return _flag(name, f"[{','.join(map(str, value))}]")
    if known[flag].nargs is None and len(values) != 1:
        raise ConfigError(key, value, f"{flag} takes one value", "write that alone")
    tokens = _flag(name, *values)
    if (refused := upstream_flags.refusal(flag, tokens)) is not None:
        raise ConfigError(key, value, f"Megatron refuses it: {refused}", "see megatron/training/arguments.py")
    return tokens
