"""The output layer and the cross entropy in chunks of tokens: the logits of all tokens never exist at once.

At a million tokens on 8 ranks the logits of a rank would be 131,072 x 151,936 numbers, 40 GB in bf16, and their
gradient as much again. Here the forward pass computes a chunk of logits, reduces it to one loss per token and drops it.
The backward pass recomputes the chunk from the hidden states and each token's log-sum-exp. That adds a fourth matrix
product to three. At these lengths it takes less than 0.1 percent of a step, so that plain torch serves as well as a
fused kernel would, and it runs on CPU ranks too. Where tensor-parallel ranks share the vocabulary, there are two
collectives in all, however many chunks there are.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from megatron_attn2d.attention.merge import accumulation_dtype


def of_model(args: Namespace) -> dict[str, Any]:
    """Keyword arguments that make Megatron's model compute the loss in chunks; {} without `--loss-chunk-tokens`."""
    if args.loss_chunk_tokens is None:
        return {}
    return {"output_processor": _losses_of_hidden_states, "output_processor_context": args.loss_chunk_tokens}


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int, group: ProcessGroup | None = None
) -> Tensor:
    """The cross entropy of `hidden @ weight.T`, token by token.

    Args:
        hidden: [n, d], the same on all ranks of `group`; its gradient is the sum of those that the ranks return.
        weight: [v, d], this rank's rows of the vocabulary, which the ranks share in their order.
        labels: [n], ids in the whole vocabulary; int64.
        chunk: tokens whose logits exist at a time.
        group: the ranks that share the vocabulary; None for one rank.

    Returns:
        [n] in fp32, or in fp64 for fp64.
    """
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, chunk, group)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, group: ProcessGroup | None
    ) -> Tensor:
        own = labels - weight.size(0) * (0 if group is None else group.rank())
        lse = hidden.new_empty(hidden.size(0), dtype=accumulation_dtype(hidden.dtype))
        target = torch.zeros_like(lse)
        for rows in _chunks(hidden.size(0), chunk):
            logits = _logits(hidden[rows], weight)
            column, held = _columns(own[rows], weight.size(0))
            target[rows] = logits.gather(1, column).squeeze(1).where(held, 0.0)
            top = logits.amax(1)
            lse[rows] = logits.sub_(top.unsqueeze(1)).exp_().sum(1).log_().add_(top)
        if group is not None:
            lse, target = _over_vocabulary(lse, target, group)
        ctx.save_for_backward(hidden, weight, own, lse)
        ctx.chunk = chunk
        return lse - target

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, own, lse = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=lse.dtype)  # summed over chunks: rounded once
        for rows in _chunks(hidden.size(0), ctx.chunk):
            scores = _logits(hidden[rows], weight).sub_(lse[rows].unsqueeze(1)).exp_()
            column, held = _columns(own[rows], weight.size(0))
            scores.scatter_add_(1, column, -held.to(scores.dtype).unsqueeze(1))
            dlogits = scores.mul_(grads[0][rows].unsqueeze(1)).to(hidden.dtype)
            torch.mm(dlogits, weight, out=dhidden[rows])
            dweight += dlogits.t() @ hidden[rows]
        return dhidden, dweight.to(weight.dtype), None, None, None


def _chunks(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(begin, begin + chunk) for begin in range(0, tokens, chunk))


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """The logits [chunk, v] in the dtype of sums, as a new tensor that the caller may overwrite."""
    return (hidden @ weight.t()).to(accumulation_dtype(hidden.dtype))


def _columns(own: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The column of each label among this rank's, [n, 1], or 0, and whether this rank has the label, [n]."""
    held = (own >= 0) & (own < width)
    return own.where(held, 0).unsqueeze(1), held


def _over_vocabulary(lse: Tensor, target: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The log-sum-exp [n] over the whole vocabulary, and the target's logit [n] from the rank that has it."""
    top = lse.clone()
    all_reduce(top, ReduceOp.MAX, group)
    both = torch.stack([(lse - top).exp_(), target])
    all_reduce(both, ReduceOp.SUM, group)
    return both[0].log().add_(top), both[1]


def _losses_of_hidden_states(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    context: int,
    config: Any,
    **_: Any,
) -> Tensor:
    """The losses of a GPTModel's last hidden states [s, b, d], or [s/tp, b, d] under sequence parallelism.

    Megatron calls it as `output_processor`, in the place of the output layer and the loss; `context` is the chunk.

    Returns:
        [b, s] in fp32, or in fp64 for fp64.

    Raises:
        ValueError: the model has an output layer or a loss of another kind.
    """
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )

    _refuse_other_outputs(output_layer, config)
    group = output_layer.tp_group
    if output_layer._forward_pre_hooks:
        # With overlap_param_gather a hook of each module waits for its parameters before the module runs.
        with torch.no_grad():
            output_layer(hidden_states[:1], weight=output_weight)
    weight = output_layer.weight if output_weight is None else output_weight
    if output_layer.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
    elif group.size() > 1:
        hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
    losses = linear_cross_entropy(
        hidden_states.flatten(0, 1),
        weight,
        labels.t().flatten(),
        chunk=context,
        group=group if group.size() > 1 else None,
    )
    return losses.view(labels.size(1), labels.size(0)).t().contiguous()


def _refuse_other_outputs(output_layer: Any, config: Any) -> None:
    refused = [
        (config.use_mup, "use_mup, which scales logits"),
        (config.mtp_num_layers, "mtp_num_layers, whose losses need all logits"),
        (getattr(output_layer, "bias", None) is not None, "a bias in the output layer"),
        (output_layer.gtp_remat_size > 1, "generalized tensor parallelism, which shards the output layer's weight"),
    ]
    for is_so, what in refused:
        if is_so:
            raise ValueError(f"loss_chunk_tokens is not supported with {what}; leave one of the two out")
