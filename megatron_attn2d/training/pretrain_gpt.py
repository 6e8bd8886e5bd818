"""Pretrains a GPT with Megatron-Core's own `pretrain()`: providers of the model, of the data and of the loss, no loop.

Run it under torchrun with Megatron's arguments (`python -m megatron_attn2d.pretrain_gpt ...`), or call `main` in every
rank. Attention goes through `attention2d_layer_spec`, unless `--spec` names another.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TextIO
from unittest import mock

import torch

from megatron_attn2d.megatron.upstream import rotary
from megatron_attn2d.megatron.upstream.batches import Batch
from megatron_attn2d.megatron.upstream.patching import applied
from megatron_attn2d.training import chunked_loss, progress, wandb_run
from megatron_attn2d.training.datasets import build_datasets
from megatron_attn2d.training.guards import same_start
from megatron_attn2d.training.guards.fitting import fitting
from megatron_attn2d.training.guards.integrity import verified
from megatron_attn2d.training.guards.retention import retained
from megatron_attn2d.training.micro_batch import checked_buffers, next_batch
from megatron_attn2d.training.session import parsed, run_in_megatron


def main(megatron_args: Sequence[str]) -> None:
    """Train, as this rank, with Megatron's arguments and `--run-dir`; RANK, WORLD_SIZE, ... are in the environment.

    It can be called again in the same process: afterwards Megatron's global state is gone, and so is the process group
    if it was created here.

    Raises:
        ValueError: an argument contradicts what is installed or what this project supports.
    """
    run_in_megatron(partial(_pretrain, len(megatron_args)), megatron_args)


def _pretrain(given: int, console: TextIO) -> None:
    """Train with the arguments in sys.argv: the user gave the first `given` of them, the others were derived."""
    from megatron.core.enums import ModelType
    from megatron.training import training

    from megatron_attn2d.megatron import bins_in_graphs, document_bins
    from megatron_attn2d.megatron.recomputation import keeping
    from megatron_attn2d.training.guards.finite_check import checked_for_finiteness
    from megatron_attn2d.training.guards.self_check import checked_before_training
    from megatron_attn2d.training.start_line import announced

    with wandb_run.continued(sys.argv[1:]):
        args, config = parsed()
    datasets = partial(build_datasets)
    datasets.is_distributed = True  # type: ignore[attr-defined]  # the builder decides by itself on which ranks to build
    with ExitStack() as stack:
        stack.enter_context(progress.reported(args, console))
        stack.enter_context(retained(args))
        stack.enter_context(fitting())
        stack.enter_context(verified())
        stack.enter_context(checked_for_finiteness(args))
        stack.enter_context(checked_buffers())
        stack.enter_context(keeping(args))
        if document_bins.asked_for(args):
            document_bins.check_model(args)
            stack.enter_context(applied(bins_in_graphs.patches(args)))
        stack.enter_context(same_start.agreed(sys.argv[1:]))
        stack.enter_context(announced(args, sys.argv[1 + given :], console))
        if args.attention_self_check:
            stack.enter_context(checked_before_training())
        # Time stamps would outlive the run, and a rank that holds some makes one collective call more than its peers.
        stack.enter_context(mock.patch.dict(training._STARTUP_TIMESTAMPS))
        training.pretrain(config, datasets, ModelType.encoder_or_decoder, _forward_step)


def _forward_step(iterator: Iterator[Batch] | None, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """Send one micro-batch through this rank's stage.

    Returns:
        The stage's output, and the function that makes a loss of the last stage's output.
    """
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args, get_timers

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch, packing = next_batch(iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    with rotary.at(batch.get(rotary.KEY)):
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=packing,
            **chunked_loss.of_model(get_args()),
        )
    return output, partial(_loss, batch["loss_mask"])


def _loss(
    mask: torch.Tensor | None, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the losses of this rank's tokens.

    Args:
        mask: [b, s/cp], 0 where a token doesn't count.
        losses: [b, s/cp], in nats.

    Returns:
        The sum, the number of tokens that count (int32), and pairs of sums for the report, which Megatron adds over all
        ranks.
    """
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    assert mask is not None
    total = torch.sum(losses.view(-1).float() * mask.view(-1).float())
    num_tokens = mask.sum().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=total,
            rejection_func=lambda loss: not torch.isfinite(loss).all(),
            message="a loss that is not finite, in the forward pass",
            tolerance=0.0,
            fatal=True,
        )
    counted = num_tokens.to(total.dtype)
    reported = {"lm loss": torch.stack([total.detach(), counted])}
    if torch.is_grad_enabled():  # in a training step: in a validation upstream would print every pair as a loss
        reported[progress.COUNTED] = torch.stack([counted, torch.full_like(counted, mask.numel())])
    return total, num_tokens, reported


if __name__ == "__main__":
    main(sys.argv[1:])
