"""Refuses a checkpoint of another model, or of another learning-rate schedule, in words.

Upstream notices a wrong shape while it reads tensors, and reports it under its own names. It does not notice a
difference that adds no tensor, such as RMSNorm in the place of LayerNorm.
"""

from __future__ import annotations

import functools
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_attn2d.config.schema import Data, Model, Section
from megatron_attn2d.errors import UsageError, show
from megatron_attn2d.megatron.upstream.patching import Patch, applied
from megatron_attn2d.training.guards.integrity import checkpoint_to_load

_SHAPES = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels"),
    *("position_embedding_type", "normalization", "qk_layernorm", "swiglu", "add_bias_linear", "num_experts"),
    *("untie_embeddings_and_output_weights", "multi_latent_attention"),
)
_SECTIONS: dict[str, type[Section]] = {"model": Model, "data": Data}
_SCHEDULE = re.compile(r"OptimizerParamScheduler: class input value (.+) and checkpoint ?value (.+) for (.+) do not")
_LIMITS = re.compile(r"--override-ckpt-iteration|DistributedOptimizer|[Ff]ully parallel load|model-space")
"""Words of those RuntimeErrors of upstream that concern a checkpoint."""


def fitting() -> AbstractContextManager[None]:
    """While entered, a checkpoint that does not fit is refused with the keys in which it differs."""

    def compare_first(load_checkpoint: Any) -> Any:
        @functools.wraps(load_checkpoint)
        def load(
            ddp_model: Any, optimizer: Any, scheduler: Any, load_arg: str = "load", *rest: Any, **kwargs: Any
        ) -> Any:
            from megatron.core.dist_checkpointing.core import CheckpointingException
            from megatron.training import get_args

            args = get_args()
            checkpoint = checkpoint_to_load(args, load_arg)
            if checkpoint is not None and (checkpoint / "metadata.json").is_file():
                _check(checkpoint, args)
            try:
                return load_checkpoint(ddp_model, optimizer, scheduler, load_arg, *rest, **kwargs)
            except (AssertionError, CheckpointingException, CheckpointException) as error:  # torch's is no Exception
                if not (said := _in_words(error)):
                    raise
                raise UsageError(f"{checkpoint}: {said}") from error
            except (KeyError, RuntimeError, SystemExit) as error:
                if checkpoint is None or not (said := _in_words(error)):
                    raise
                raise UsageError(f"{checkpoint}: {said}") from error

        return load

    reason = "upstream answers a checkpoint that does not fit by a traceback, or not at all"
    return applied([Patch("megatron.training.training:load_checkpoint", compare_first, reason)])


def _check(checkpoint: Path, args: Namespace) -> None:
    """Raise UsageError, with a line per key, if the arguments in a checkpoint describe other weights than `args`."""
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    theirs = load_common_state_dict(checkpoint).get("args")
    pattern = getattr(theirs, "hybrid_layer_pattern", None)
    if pattern and not args.hybrid_layer_pattern:
        raise UsageError(
            f"{checkpoint}: model.kind is hybrid in this checkpoint and gpt here, which Megatron does not load; choose "
            "hybrid, or another checkpoint"
        )
    if theirs is None or pattern != args.hybrid_layer_pattern:
        return
    if lines := [f"{checkpoint}: {line}" for line in differences(theirs, args)]:
        raise UsageError("\n".join(lines))


def differences(theirs: Namespace, ours: Namespace) -> Iterator[str]:
    """A sentence for each of Megatron's arguments in which the weights of a checkpoint and of a run differ."""
    names = [*_SHAPES]
    names += ["max_position_embeddings"] * (ours.position_embedding_type == "learned_absolute")
    # Other tokenizers define the size themselves, and upstream undoes its own padding to tensor ranks.
    names += ["vocab_size"] * (getattr(theirs, "tokenizer_type", None) == ours.tokenizer_type == "NullTokenizer")
    for name in names:
        if hasattr(theirs, name) and _shape(theirs, name) != _shape(ours, name):
            section = next((title for title, one in _SECTIONS.items() if name in one.model_fields), "megatron_args")
            there, here = show(_shape(theirs, name)), show(_shape(ours, name))
            where = f"{there} in this checkpoint and {here} here"
            yield f"{section}.{name} is {where}; choose {there}, or another checkpoint"


def _shape(args: Namespace, name: str) -> Any:
    """The value of an argument, and for key/value heads their number: upstream fills it in after a start."""
    if name == "num_query_groups" and not args.group_query_attention:
        return args.num_attention_heads
    return getattr(args, name)


def _in_words(error: BaseException) -> str:
    """What `error` says about a checkpoint; empty for other errors, such as those of messages between ranks."""
    if isinstance(error, SystemExit):
        return "Megatron gave it up, and its log, logs/rank-0.log, says why"
    if isinstance(error, KeyError):
        return f"it holds no {error.args[0]!r}, as with no_save_optim; take the weights alone by checkpoint.start_from"
    if isinstance(error, RuntimeError) and not _LIMITS.search(str(error)):
        return ""
    if not (lines := str(error).strip().splitlines()):  # an assertion without a message: its traceback says more
        return ""
    said = lines[-1]
    if found := _SCHEDULE.search(said):
        here, there, what = found.groups()
        return (
            f"another course of the learning rate: {what} is {there} in this checkpoint and {here} here; choose the "
            "former, name the key in checkpoint.may_change, or take the weights alone by checkpoint.start_from"
        )
    return f"it does not fit this run: {said}"
