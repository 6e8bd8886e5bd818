"""The line that begins a training: model, sizes, ranks, attention and its kernel, data, and derived arguments."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TextIO

from megatron_attn2d.megatron.announcement import kernel_name
from megatron_attn2d.megatron.core_attention import ContextParallelAttention
from megatron_attn2d.megatron.layer_grid import ATTENTION2D, split_mode
from megatron_attn2d.megatron.upstream.patching import Patch, applied
from megatron_attn2d.training.guards.self_check import describe, distinct_attentions


def announced(args: Namespace, derived: Sequence[str], console: TextIO) -> AbstractContextManager[None]:
    """While entered, the last rank, which also reports the steps, prints the line before upstream's loop begins."""

    def announce_first(train: Any) -> Any:
        @functools.wraps(train)
        def announce(forward_step_func: Any, model: Any, *rest: Any, **kwargs: Any) -> Any:
            if args.rank == args.world_size - 1:
                print(line(args, distinct_attentions(model), derived), file=console, flush=True)
            return train(forward_step_func, model, *rest, **kwargs)

        return announce

    return applied([Patch("megatron.training.training:train", announce_first, "the line comes before the steps")])


def line(args: Namespace, attentions: Iterable[ContextParallelAttention], derived: Sequence[str]) -> str:
    """The line, whose parts are separated by semicolons.

    Args:
        args: Megatron's arguments, as it has read them.
        attentions: the layers' attention, one of each kind.
        derived: the derived flags, with their values.
    """
    return "; ".join(
        [
            _model(args),
            f"{args.global_batch_size:,} x {args.seq_length:,} tokens per step",
            f"tensor {args.tensor_model_parallel_size} x context {args.context_parallel_size} x pipeline "
            f"{args.pipeline_model_parallel_size} x data {args.data_parallel_size}",
            ", ".join(dict.fromkeys(_attention(one) for one in attentions)) or _no_attention_of_ours(args.cp_comm_type),
            _data(args),
            _derived(derived),
        ]
    )


def _model(args: Namespace) -> str:
    kind = "GPT" if args.hybrid_layer_pattern is None else f"hybrid {_cut(args.hybrid_layer_pattern)}"
    heads = f"{args.num_attention_heads} heads"
    if args.group_query_attention:
        heads += f", {args.num_query_groups} key/value heads"
    experts = f", {args.num_experts} experts" if args.num_experts else ""
    dtype = str(args.params_dtype).removeprefix("torch.")
    layers = f"{args.num_layers} layer{'s' * (args.num_layers > 1)}"
    return f"{kind}: {layers}, hidden size {args.hidden_size}, {heads}{experts}, {dtype}"


def _attention(attention: ContextParallelAttention) -> str:
    config, windows = attention.config, attention.window is not None
    kernel = kernel_name(config, attention.head_dims, attention.dropout, windows)
    where = describe(attention) if config.context_parallel_size > 1 else "attention on one rank"
    window = f", window {attention.window}" if windows else ""
    return f"{where}{window}, kernel {kernel}"


def _no_attention_of_ours(modes: Sequence[str]) -> str:
    """What the line says of attention where the last pipeline stage has none of this package.

    In a hybrid model that stage may have no attention at all.
    """
    if all(split_mode(mode)[0] == ATTENTION2D for mode in modes):
        return "no attention in the last pipeline stage"
    return f"attention of Transformer Engine ({' '.join(modes)})"


def _data(args: Namespace) -> str:
    data = "made-up data"
    if not args.mock_data:
        data = f"data {' '.join(_shortened(args.data_path or []))}, split {args.split}, seed {args.seed}"
    if not args.document_multiple:
        return data
    what = "example" if args.examples else "document"
    return f"{data}, each {what} a sequence of its own in a multiple of {args.document_multiple} tokens"


def _derived(arguments: Sequence[str]) -> str:
    """Derived flags with a value by name, and the number of the others; the log of rank 0 has all, with reasons."""
    flags = [word for word in arguments if word.startswith("--")]
    named = " ".join(arguments).removeprefix("--").split(" --") if flags else []
    named = [one for one in named if " " in one]
    if others := len(flags) - len(named):
        named.append(f"{others} switch{'es' * (others > 1)}")
    return f"derived: {', '.join(named) or 'nothing'}" + (" (reasons in the log of rank 0)" if named else "")


def _cut(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _shortened(words: Sequence[str], most: int = 8) -> Iterator[str]:
    yield from words[:most]
    if len(words) > most:
        yield f"and {len(words) - most} more"
