"""The layers of a hybrid model (`model.kind: hybrid`) as Megatron's `--hybrid-layer-pattern` spells them.

A layer of a run, attention and an MLP, is two layers of Megatron's hybrid model, `*-`. Pipeline stages and arguments
that name each layer count Megatron's layers:

    model.num_layers 4, parallelism.pipeline 2         *-*-|*-*-
    megatron_args.num_experts                          *E in place of *-, by megatron_args.moe_layer_freq
    megatron_args.multi_latent_attention               + in place of *
    megatron_args.mtp_num_layers 2                     *-*-/*-/*-
    context_parallel.layer_modes [ring, attention2d]   p2p p2p attention2d attention2d

`megatron_args.hybrid_layer_pattern` gives another pattern, for example with Mamba layers (M).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from megatron_attn2d.config.schema import RunConfig

UNEVEN_STAGES = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)
"""Arguments of Megatron that give pipeline stages different numbers of layers."""
PER_LAYER = ("window_attn_skip_freq", "moe_layer_freq", "no_rope_freq", "linear_attention_freq")
"""Arguments of Megatron that take one number, or 0 or 1 for each layer."""
ATTENTION = re.compile(r"[*+]")
PIPE, MTP = "|", "/"
_IN_THE_PATTERN = ("moe_layer_freq", "mtp_num_layers")
SKIPPED: dict[str, Callable[[int, int], bool]] = {
    "window_attn_skip_freq": lambda layer, every: layer % every != 0,
    "no_rope_freq": lambda layer, every: layer % every == 0,
}
"""Arguments of Megatron that name layers: whether `every` selects the layer of number `layer`, counted from 1."""


def is_hybrid(run: RunConfig) -> bool:
    """Whether the model is upstream's HybridModel (`model.kind`)."""
    return run.model.kind == "hybrid"


def layer_pattern(run: RunConfig) -> str:
    """The pattern of a hybrid model: as given, or as it follows from the other keys."""
    given = run.megatron_args
    if pattern := given.get("hybrid_layer_pattern"):
        return str(pattern)
    attention = "+" if given.get("multi_latent_attention") else "*"
    layers = [attention + ("E" if has_experts else "-") for has_experts in _experts(run)]
    stages = run.parallelism.pipeline * (run.parallelism.virtual_pipeline or 1)
    size = len(layers) // stages
    main = PIPE.join("".join(layers[stage * size : (stage + 1) * size]) for stage in range(stages))
    depths = given.get("mtp_num_layers") or 0
    return main + (MTP + layers[-1]) * (depths if isinstance(depths, int) else 0)


def main_layers(pattern: str) -> str:
    """The symbols of the model's layers, without stages and multi-token prediction."""
    return pattern.partition(MTP)[0].replace(PIPE, "")


def of_each_symbol[Value](values: Sequence[Value], pattern: str) -> list[Value]:
    """One value per symbol, from one per attention layer: a layer without attention repeats the value before it.

    Args:
        values: one per attention layer.
        pattern: of the hybrid model.
    """
    found, seen = [], 0
    for symbol in main_layers(pattern):
        seen += ATTENTION.match(symbol) is not None
        found.append(values[max(seen, 1) - 1])
    return found


def hybrid_arguments(run: RunConfig, passed: dict[str, Any]) -> dict[str, Any]:
    """`passed`, the megatron_args, for a hybrid model: with the pattern, and with one entry per layer of Megatron's."""
    pattern, arguments = layer_pattern(run), {name: value for name, value in passed.items() if value is not None}
    if "hybrid_layer_pattern" not in arguments:
        for name in _IN_THE_PATTERN:
            arguments.pop(name, None)
    numbers = range(1, run.model.num_layers + 1)
    for name, of_every in SKIPPED.items():
        value = arguments.get(name)
        if isinstance(value, int):
            value = [int(of_every(number, value)) for number in numbers]
        if isinstance(value, list):
            arguments[name] = of_each_symbol(value, pattern)
    return {**arguments, "hybrid_layer_pattern": pattern}


def _experts(run: RunConfig) -> list[bool]:
    """For each layer of the run, whether it has experts."""
    layers, frequency = range(run.model.num_layers), run.megatron_args.get("moe_layer_freq")
    if not run.megatron_args.get("num_experts"):
        return [False for _ in layers]
    if isinstance(frequency, list):
        return [bool(one) for one in frequency]
    return [layer % (frequency if isinstance(frequency, int) else 1) == 0 for layer in layers]
