"""Compiles a RunConfig to Megatron's command line."""

from pathlib import Path

from pydantic import BaseModel

from megatron_attn2d.config import effects
from megatron_attn2d.config.keys import FIRST_START, is_schedule
from megatron_attn2d.config.layer_pattern import hybrid_arguments, is_hybrid, layer_pattern, of_each_symbol
from megatron_attn2d.config.passed_through import flag_tokens, key_of, passed_through, spelling
from megatron_attn2d.config.schema import NO_FLAG, Model, RunConfig
from megatron_attn2d.config.yaml_io import parse
from megatron_attn2d.errors import ConfigError, ConfigErrors
from megatron_attn2d.run.checkpoints import last_complete

CP_COMM_TYPES = {"attention2d": "attention2d", "ring": "p2p", "all_gather": "all_gather", "ulysses": "a2a"}


def megatron_arguments(run: RunConfig) -> list[str]:
    """Megatron's command line for `run`, with `--run-dir` and this package's own arguments.

    Raises:
        ConfigError: `megatron_args` holds an argument that `passed_through` refuses, or an argument would change
            nothing in this model.
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
    arguments += ["--run-dir", run.directory, *passed_through(passed)]
    if errors := [_ignored(one) for one in effects.ignored(arguments)]:
        raise ConfigErrors(errors)
    return arguments


def _ignored(one: effects.Ignored) -> ConfigError:
    values = [parse(value, one.flag) for value in one.values] or [True]
    return ConfigError(key_of(one.flag), values[0] if len(values) == 1 else values, one.reason, one.choice)


def _section_arguments(section: BaseModel) -> list[str]:
    arguments = []
    for name, field in type(section).model_fields.items():
        flag, value = spelling(name, field.metadata), getattr(section, name)
        if flag == NO_FLAG or value is None:
            continue
        if isinstance(value, bool):
            arguments += flag_tokens(flag.name) if value == flag.when else []
        else:
            arguments += flag_tokens(flag.name, value)
    return arguments


def _layers(run: RunConfig) -> list[str]:
    if is_hybrid(run):  # the layer pattern says how many layers and stages there are
        return []
    arguments = flag_tokens("num-layers", run.model.num_layers)
    if run.parallelism.virtual_pipeline is not None:
        arguments += flag_tokens("num-virtual-stages-per-pipeline-rank", run.parallelism.virtual_pipeline)
    return arguments


def _positions(run: RunConfig) -> list[str]:
    model = run.model
    scaling, base = model.rope_scaling, model.rotary_base
    kind = "yarn" if scaling == "yarn" else model.position_embedding_type
    arguments = flag_tokens("position-embedding-type", kind)
    arguments += flag_tokens("max-position-embeddings", model.max_position_embeddings or run.training.seq_length)
    if scaling == "ntk":
        base = ntk_base(model)
    elif scaling == "linear":
        arguments += flag_tokens("rotary-seq-len-interpolation-factor", round(model.rope_scaling_factor or 1))
    elif scaling == "llama3":
        arguments += ["--use-rope-scaling", *flag_tokens("rope-scaling-factor", model.rope_scaling_factor)]
    elif scaling == "yarn":
        arguments += flag_tokens("rotary-scaling-factor", model.rope_scaling_factor)
        arguments += flag_tokens("yarn-original-max-position-embeddings", model.rope_original_length)
    return arguments + ([] if base is None else flag_tokens("rotary-base", base))


def ntk_base(model: Model) -> int:
    """RoPE's base by which `model.rope_scaling_factor` divides the lowest frequency, and the highest one stays."""
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    rotated = int(head * (model.rotary_percent or 1.0))
    factor: float = (model.rope_scaling_factor or 1.0) ** (rotated / (rotated - 2))
    return round((model.rotary_base or 10000) * factor)


def _attention(run: RunConfig) -> list[str]:
    model, context = run.model, run.context_parallel
    arguments = []
    if model.num_query_groups:
        arguments += ["--group-query-attention", *flag_tokens("num-query-groups", model.num_query_groups)]
    modes = context.layer_modes or [context.mode]
    if is_hybrid(run) and context.layer_modes:
        modes = of_each_symbol(context.layer_modes, layer_pattern(run))
    arguments += ["--keep-attention-outputs"] if run.keeps_attention_outputs else []
    arguments += flag_tokens("cp-comm-type", *(CP_COMM_TYPES[mode] for mode in modes))
    if context.mode == "attention2d" and context.size > 1:
        # Upstream makes groups of each size, the first contiguous: over heads, then columns (of R ranks), then rows.
        (heads, rows, columns), (tile_rows, tile_columns) = run.grid, run.tile
        sizes = [rows, columns]
        if (tile_rows, tile_columns) != (rows, 1):
            sizes = [tile_rows, tile_columns, rows // tile_rows, columns // tile_columns]
        arguments += flag_tokens("hierarchical-context-parallel-sizes", *([heads] if heads > 1 else []), *sizes)
        arguments += flag_tokens("attention2d-head-groups", run.head_groups) if run.head_groups > 1 else []
    return arguments


def _precision(run: RunConfig) -> list[str]:
    arguments = [] if run.training.precision == "fp32" else flag_tokens(run.training.precision)
    if (recipe := run.training.fp8) != "none":
        arguments += flag_tokens("fp8-recipe", recipe)
        if run.megatron_args.get("fp8_format") is None:
            # One scale per tensor needs the wider range of e5m2 for gradients; with one per block, e4m3 rounds less.
            arguments += flag_tokens("fp8-format", "e4m3" if recipe == "blockwise" else "hybrid")
    return arguments


def _graphs(run: RunConfig) -> list[str]:
    given, arguments = run.megatron_args, []
    if run.training.cuda_graphs != "none" and given.get("cuda_graph_impl") is None:
        arguments += flag_tokens("cuda-graph-impl", run.graph_implementation)
    if run.training.cuda_graphs == "attention" and given.get("cuda_graph_modules") is None:
        arguments += flag_tokens("cuda-graph-modules", "attn")
    return arguments


def _data(run: RunConfig) -> list[str]:
    arguments = flag_tokens("document-multiple", run.document_multiple) if run.document_multiple else []
    arguments += flag_tokens("document-bins", run.data.document_bins) if run.data.document_bins else []
    arguments += flag_tokens("examples") if run.data.format == "sft" else []
    return arguments + ([] if run.data.mock else flag_tokens("data-path", *data_blend(run)))


def data_blend(run: RunConfig) -> list[str]:
    """What `--data-path` takes: the prefixes of the data sets, each after its weight in a blend."""
    paths = run.data.paths
    if isinstance(paths, dict):
        return [str(word) for path, weight in paths.items() for word in (weight, path)]
    return [*paths] or [embedded_data(run)]


def embedded_data(run: RunConfig) -> str:
    """Prefix of the embedded data set: of text, by `data.indexed`, or of examples, by `data.docstrings`."""
    return str(Path(run.data.dir) / ("python-docstrings" if run.data.format == "sft" else "python-standard-library"))


def _evaluation(run: RunConfig) -> list[str]:
    return flag_tokens("eval-interval", run.training.eval_interval or run.training.train_iters)


def has_begun(run: RunConfig) -> bool:
    """Whether `run` has a checkpoint in its own directory, from which it continues."""
    return last_complete(Path(run.directory) / "checkpoints") is not None


def left_out(run: RunConfig) -> list[str]:
    """The keys of `run` that only its first start reads; none before it has a checkpoint of its own."""
    named = [f"checkpoint.{name}" for name in ("load", "start_from") if getattr(run.checkpoint, name)]
    named += [f"megatron_args.{name}" for name in FIRST_START if run.megatron_args.get(name) not in (None, False)]
    return named if has_begun(run) else []


def _checkpoint(run: RunConfig) -> list[str]:
    checkpoint, own, begun = run.checkpoint, Path(run.directory) / "checkpoints", has_begun(run)
    arguments = []
    if begun or checkpoint.load or checkpoint.save:
        arguments += flag_tokens("load", own if begun or not checkpoint.load else checkpoint.load)
    if checkpoint.start_from and not begun:
        arguments += flag_tokens("pretrained-checkpoint", checkpoint.start_from)
    if any(map(is_schedule, checkpoint.may_change)):
        arguments += ["--override-opt-param-scheduler"]
    if not checkpoint.save:
        return arguments
    return [
        *arguments,
        *flag_tokens("save", own),
        *flag_tokens("save-interval", checkpoint.save_interval or run.training.train_iters),
        *(["--async-save"] if checkpoint.async_save else []),
        # One writer process for the whole run instead of a fork per save. Without a CUDA device it dies silently.
        *(["--use-persistent-ckpt-worker"] if checkpoint.async_save and run.environment.device == "cuda" else []),
    ]


def _logging(run: RunConfig) -> list[str]:
    directory, arguments = Path(run.directory), []
    if run.logging.tensorboard or run.logging.wandb_project:  # upstream reports to W&B only beside TensorBoard
        arguments += flag_tokens("tensorboard-dir", directory / "tensorboard")
    if run.logging.wandb_project:
        arguments += flag_tokens("wandb-exp-name", run.run.name) + flag_tokens("wandb-save-dir", directory / "wandb")
    if run.cluster.peak_tflops:
        arguments += flag_tokens("peak-tflops", run.cluster.peak_tflops)
    return arguments
