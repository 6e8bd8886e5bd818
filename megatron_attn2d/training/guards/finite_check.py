"""Reports NaN and Inf in the inputs of attention where they arise: in which tensor, layer, rank and step.

Attention spreads one such number over a whole sequence, so that afterwards nobody can tell where it came from. The
check reads Q, K, V and dO of each rank before they are sent, where a masked row, whose log-sum-exp is rightly -inf,
raises no false alarm. On GPUs the host waits for the answer, so that the check is off by default.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_attn2d.megatron.core_attention import ContextParallelAttention
from megatron_attn2d.megatron.upstream.patching import Patch, applied
from megatron_attn2d.training.guards.self_check import attentions


class NonFiniteError(RuntimeError):
    """A tensor of attention holds NaN or Inf."""


def checked_for_finiteness(args: Namespace) -> AbstractContextManager[None]:
    """While entered, every attention of the trained model checks its inputs, if `args.check_finite_attention`.

    A check raises NonFiniteError.
    """
    if not args.check_finite_attention:
        return nullcontext()

    def watch_first(train: Any) -> Any:
        @functools.wraps(train)
        def watched(forward_step_func: Any, model: Any, *rest: Any, **kwargs: Any) -> Any:
            handles = [handle for attention in attentions(model) for handle in watch(attention, args)]
            try:
                return train(forward_step_func, model, *rest, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()

        return watched

    reason = "the attentions are watched from the first step on"
    return applied([Patch("megatron.training.training:train", watch_first, reason)])


def watch(attention: ContextParallelAttention, args: Namespace | None = None) -> tuple[Any, Any]:
    """Make an attention raise NonFiniteError for NaN or Inf in its inputs or in the gradient of its output.

    Args:
        attention: the module.
        args: Megatron's arguments, which hold the current step; None: messages name no step.

    Returns:
        The hooks' handles, whose `remove()` ends the check.
    """

    def where() -> str:
        step = getattr(args, "curr_iteration", None)
        return f"layer {attention.layer_number}" + ("" if step is None else f" at step {step + 1}")

    def inputs(module: Any, given: Sequence[Any], named: dict[str, Any]) -> None:
        tensors = [*given, *(named[name] for name in ("query", "key", "value") if name in named)][:3]
        _refuse_non_finite(tensors, "QKV", where())

    def output(module: Any, given: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: _refuse_non_finite([gradient], ["dO"], where()))

    return (
        attention.register_forward_pre_hook(inputs, with_kwargs=True),
        attention.register_forward_hook(output),
    )


def _refuse_non_finite(tensors: Sequence[Tensor], names: Sequence[str], where: str) -> None:
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).tolist()
    bad = [name for name, good in zip(names, finite, strict=True) if not good]
    if bad:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        raise NonFiniteError(f"NaN or Inf in {', '.join(bad)} of attention in {where} on rank {rank}")
