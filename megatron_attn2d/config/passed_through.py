"""Megatron's own arguments below `megatron_args`: which pass through to its command line, and which are refused."""

import re
from functools import cache
from typing import Any

from megatron_attn2d.config import upstream_flags
from megatron_attn2d.config.layer_pattern import PER_LAYER
from megatron_attn2d.config.schema import Flag, RunConfig
from megatron_attn2d.errors import ConfigError, nearest
from megatron_attn2d.megatron.refusals import refusal

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
"""Flags that no key gives under its own name, and the key that decides about each."""
_IGNORED = "would be ignored: it is for data sets or losses other than ours"
_SCHEDULED = "asks the training loop for a schedule of single layers (return_schedule_plan), which ours does not make"
_BESIDE_IT = f"needs --overlap-moe-expert-parallel-comm, which {_SCHEDULED}"
_REFUSED = {
    "spec": "replaces the layers, and with them the attention that context_parallel.mode chooses",
    "local-rank": "is set by the launcher",
    "use-checkpoint-opt-param-scheduler": "takes the schedule from the checkpoint, against the keys of optimizer",
    "use-checkpoint-args": "takes the model from the checkpoint, against the keys of model",
    "use-mp-args-from-checkpoint-args": "takes the parallelism from the checkpoint, against the keys of parallelism",
    "exit-on-missing-checkpoint": "would end each first start; a run always checks that the checkpoints it names exist",
    "check-for-spiky-loss": _IGNORED,
    "dataloader-defer-npy-index-mmap": _IGNORED,
    "dataloader-fast-cache-load": _IGNORED,
    "fim-data": _IGNORED,
    "full-validation": _IGNORED,
    "multiple-validation-sets": _IGNORED,
    "per-dataset-sequences-path": _IGNORED,
    "overlap-moe-expert-parallel-comm": _SCHEDULED,
    "delay-wgrad-compute": _BESIDE_IT,
    "ep-overlap-early-attn-memory-release": _BESIDE_IT,
    "rampup-batch-size": "is not read by Megatron-Core 0.19",
    "step-batch-size-schedule": "excludes training.global_batch_size, which a run must have",
    "train-samples": "excludes training.train_iters, by which a run is planned and continued",
}
"""Arguments that would bypass keys of the YAML, that change nothing here, or that our training loop can't serve;
`megatron.refusals` has those that no training takes."""
_PATTERNS = ("hybrid-layer-pattern", "hybrid-override-pattern", "mtp-hybrid-override-pattern")
_WINDOW = re.compile(r"\d+,(\d+|-1)")


def key_of(flag: str) -> str:
    """The key of a run's YAML that decides about an argument of Megatron's."""
    name = flag.removeprefix("--")
    return owners().get(name, f"megatron_args.{name.replace('-', '_')}")


def flag_tokens(name: str, *values: object) -> list[str]:
    """`--name` and its values, as they stand on a command line."""
    return [f"--{name}", *map(str, values)]


def spelling(name: str, metadata: list[Any]) -> Flag:
    """How the field `name` is spelled among Megatron's arguments, by its annotation's `metadata`."""
    return next((m for m in metadata if isinstance(m, Flag)), Flag(name.replace("_", "-")))


def passed_through(megatron_args: dict[str, Any]) -> list[str]:
    """The tokens of Megatron's command line for the arguments below `megatron_args`; null leaves one out.

    Raises:
        ConfigError: a key of the run decides about an argument, it is refused, Megatron doesn't know it, or the value
            is none that Megatron's parser takes.
    """
    given = {name.replace("-", "_"): value for name, value in megatron_args.items() if value is not None}
    for name, value in given.items():
        _refuse(name, value)
    return [token for name, value in given.items() for token in _tokens(name, value)]


def _refuse(name: str, value: object) -> None:
    """Raise ConfigError if the argument `name`, with underscores, may not be given."""
    key, hyphened = f"megatron_args.{name}", name.replace("_", "-")
    if owner := owners().get(hyphened):
        raise ConfigError(key, value, f"{owner} decides about --{hyphened}", f"set {owner}")
    if hyphened in _REFUSED and value is not False:
        raise ConfigError(key, value, f"--{hyphened} {_REFUSED[hyphened]}", "leave it out")
    if refused := refusal(name, value):
        raise ConfigError(key, value, f"--{hyphened} {refused.reason}", refused.choice)
    if hyphened in _PATTERNS and "D" in str(value):
        reason = "D, sparse attention, chooses its keys from the whole sequence, which no rank has"
        raise ConfigError(key, value, reason, "choose * or +")


@cache
def owners() -> dict[str, str]:
    """The key that decides about each flag: {"num-layers": "model.num_layers", ...}."""
    fields = {
        spelling(name, field.metadata).name: f"{title}.{name}"
        for title, section in RunConfig.model_fields.items()
        for name, field in getattr(section.annotation, "model_fields", {}).items()
    }
    return {flag: key for flag, key in (fields | _DECIDED_BY).items() if flag}


def _tokens(name: str, value: object) -> list[str]:
    """The tokens for one argument, as Megatron's parser accepts them; ConfigError if it would not."""
    key, hyphened = f"megatron_args.{name}", name.replace("_", "-")
    flag, known = f"--{hyphened}", upstream_flags.options()
    if flag not in known:
        raise ConfigError(key, reason="no argument of Megatron", choice=_known_name(name), has_value=False)
    if known[flag].nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(key, value, f"{flag} takes no value", "write true, or false to leave it out")
        return flag_tokens(hyphened) if value else []
    values = value if isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, int | float | str):
            raise ConfigError(key, value, f"{flag} takes a value", "write a number, a string or a list of them")
        if isinstance(one, str) and one.startswith("-"):
            raise ConfigError(key, value, f"{one} would be read as another argument", "begin it with something else")
    if (word := _one_word(name, value, values)) is not None:
        return flag_tokens(hyphened, word)
    if known[flag].nargs is None and len(values) != 1:
        raise ConfigError(key, value, f"{flag} takes one value", "write one value")
    tokens = flag_tokens(hyphened, *values)
    if (refused := upstream_flags.refusal(flag, tokens)) is not None:
        raise ConfigError(key, value, f"Megatron refuses it: {refused}", "see megatron/training/arguments.py")
    return tokens


def _one_word(name: str, value: object, values: list[Any]) -> str | None:
    """The single word that Megatron wants for a list of some arguments; None for other arguments.

    Megatron's own parser would check that word, but importing it takes seconds.
    """
    key, flag = f"megatron_args.{name}", f"--{name.replace('_', '-')}"
    if name == "window_size":
        word = ",".join(map(str, values))
        if not _WINDOW.fullmatch(word):
            reason = "not how many tokens before and after it a token sees"
            raise ConfigError(key, value, reason, "write [left, right], the right one -1 for all")
        return word
    if name in PER_LAYER and isinstance(value, list):
        if not all(one in (0, 1) for one in value):
            raise ConfigError(key, value, f"{flag} takes 0 or 1 for each layer", "write [1, 0, ...], or one number")
        return f"[{','.join(map(str, value))}]"
    return None


def _known_name(name: str) -> str:
    """What to write instead of the unknown argument `name`."""
    known = upstream_flags.options()
    by_destination = {option.dest: flag for flag, option in known.items()}
    if flag := by_destination.get(name):
        return f"Megatron writes it {flag}"
    return nearest(name, [option.dest for flag, option in known.items() if flag.startswith("--")])
