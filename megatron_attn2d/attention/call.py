"""One call of attention: `prepare` checks its arguments and compares them across ranks, `run` makes it differentiable.

The grid, the ring and a single rank differ in their `Schedule` alone: when messages travel and when kernels run. This
file holds what is the same for all three.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.attention.agreement import check_agreement, facts_of
from megatron_attn2d.attention.checks import (
    check_first_derivative,
    check_heads,
    check_scale,
    check_sink,
    packed,
    request_of,
    sequences_of,
)
from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.kernels import Kernel, choose_kernel
from megatron_attn2d.attention.layout import Band
from megatron_attn2d.attention.merge import apply_sink, sink_gradient
from megatron_attn2d.attention.packing import Packing, Totals
from megatron_attn2d.attention.tile import AttentionOp


@dataclass(frozen=True)
class Call:
    """What a call of attention asks for, the same on all of its ranks.

    Attributes:
        packing: the packed sequences, spread over all ranks of the call; None for one sequence.
        sequences: the sequences, spread over the ranks that still share them while heads are attended.
        band: who sees whom within each sequence.
        op: the kernel, and how scores become probabilities.
        label: names the call in errors.
    """

    packing: Packing | None
    sequences: Packing
    band: Band
    op: AttentionOp
    label: str

    def starting(self, head: int) -> Call:
        """The call for the heads from `head` on."""
        return replace(self, op=self.op.starting(head))


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Sequence[dist.ProcessGroup | None],
    zigzag_ranks: int,
    ulysses_size: int = 1,
    kinds: dict[Any, Any] | None = None,
    *,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    sink: Tensor | None,
    dropout: Dropout | None,
    cu_seqlens: Totals | None,
    cu_seqlens_padded: Totals | None,
    max_seqlen: int | None,
    softmax_scale: float | None,
    backend: str,
    overlap_groups: int = 1,
    label: str,
) -> tuple[Call, Tensor, Tensor, Tensor]:
    """The call that these arguments ask for, and q, k and v as [s/cp, b, heads, head dim].

    Arguments that `attention2d` has too mean the same here.

    Args:
        q, k, v: shards.
        groups: the process groups on which the call exchanges messages; None for an axis of one rank.
        zigzag_ranks: over how many ranks tokens stay spread while heads are attended.
        ulysses_size: how many ranks share each of these shards and exchange sequence for heads.
        kinds: keeps what is worked out once per kind of call; None to work it out in every call.

    Raises:
        ValueError, ExchangeError: as `attention2d`.
    """
    packing = packed(cu_seqlens, cu_seqlens_padded, max_seqlen, (q, k, v), zigzag_ranks * ulysses_size)
    if packing is not None:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    dropout = Dropout.of_call(dropout)

    def work_out() -> tuple[Packing, Band, Kernel]:
        sequences, band = sequences_of(q, k, v, causal, window, zigzag_ranks, ulysses_size, packing)
        return sequences, band, choose_kernel(backend, request_of(q, v, sequences, band, dropout))

    if kinds is None or packing is not None or not (window is None or isinstance(window, tuple)):
        sequences, band, kernel = work_out()
    else:
        tensors = [(type(x), x.shape, x.dtype, x.device) for x in (q, k, v)]
        deterministic = torch.are_deterministic_algorithms_enabled()
        kind = (*tensors, causal, window, dropout is None, backend, deterministic)
        if kind not in kinds:
            if len(kinds) >= _MOST_KINDS:  # tests and evaluations may go through many lengths
                kinds.clear()
            kinds[kind] = work_out()
        sequences, band, kernel = kinds[kind]
    check_heads(q.size(2), k.size(2), ulysses_size, overlap_groups)
    check_sink(sink, q)
    scale = 1.0 / sqrt(q.size(3)) if softmax_scale is None else softmax_scale
    check_scale(scale)
    facts = facts_of(q, k, v, sequences, band, scale, sink, dropout, overlap_groups)
    check_agreement(groups, facts, q.device, label)
    for each in {sequences} if packing is None else {sequences, packing}:
        each.keep_if_captured()
    return Call(packing, sequences, band, AttentionOp(kernel, scale, dropout), label), q, k, v


_MOST_KINDS = 64


class Schedule(Protocol):
    """When the messages and the kernels of a call run, forward and backward.

    Legend as in `attention2d`; log-sum-exps and deltas are [..., h, n].
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The output [s/cp, b, h, dv] and its log-sum-exp."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, want_delta: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k and v, and delta = rowsum(dout * out), shaped like `lse`; None unless it is wanted."""
        ...


class Results(Protocol):
    """Where a call that is made twice, as activation recomputation does, leaves its results and finds them again."""

    def store(self, out: Tensor, lse: Tensor) -> None:
        """Keep the results of the first call; nobody changes them afterwards."""
        ...

    def load(self) -> tuple[Tensor, Tensor] | None:
        """The results of the first call, in the second one; None in the first."""
        ...


def run(
    schedule: Schedule, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, results: Results | None = None
) -> Tensor:
    """The output of a call that a schedule makes, differentiable once; not computed where `results` has it."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # as kernels ask for
    out: Tensor = _Attention.apply(*compact_for_save(q, k, v), sink, schedule, results)
    return out


class _Attention(torch.autograd.Function):
    """Attention by any schedule. Sinks are applied here, as they touch no key."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, schedule: Schedule, results: Results | None
    ) -> Tensor:
        if results is None or (found := results.load()) is None:
            out, lse = schedule.forward(q, k, v)
            if sink is not None:
                apply_sink(out, lse, sink)
            if results is not None:
                results.store(out, lse)
        else:
            out, lse = found
        ctx.save_for_backward(q, k, v, out, lse, sink)
        ctx.schedule = schedule
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        q, k, v, out, lse, sink = ctx.saved_tensors
        *gradients, delta = ctx.schedule.backward(grads[0], q, k, v, out, lse, want_delta=sink is not None)
        return (*gradients, None if sink is None else sink_gradient(lse, delta, sink), None, None)


def compact_for_save(*tensors: Tensor) -> list[Tensor]:
    """The tensors as autograd should save them: copied where together they fill at most half of their storage.

    With rotary positions queries and keys are new tensors. Values stay a part of what the projection of all three
    returned, as in Megatron. Saved as they are, they would keep all of it: with as many key heads as query heads that
    is two more tensors of the size of Q in every layer. (A norm of queries that saves its input keeps it all the same.)
    """
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
        return list(tensors)
    filled: Counter[int] = Counter()
    for x in tensors:
        filled[x.untyped_storage()._cdata] += x.nbytes

    def compact(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        few = 2 * filled[storage._cdata] <= storage.nbytes()
        return x.clone(memory_format=torch.contiguous_format) if few else x

    return [compact(x) for x in tensors]
