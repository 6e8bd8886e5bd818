"""Pretrains a GPT with Megatron-Core's own `pretrain()`: providers of the model, of the data and of the loss, no loop.

Run it under torchrun with Megatron's arguments (`python -m megatron_attn2d.pretrain_gpt ...`), or call `main` in every
rank. Attention goes through `attention2d_layer_spec`, unless `--spec` names another.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO
from unittest import mock

import torch

from megatron_attn2d.config.prefixes import is_complete
from megatron_attn2d.data import indexed
from megatron_attn2d.errors import UsageError
from megatron_attn2d.megatron.upstream import compat, cpu
from megatron_attn2d.megatron.upstream.batches import Batch, to_context_rank, to_tensor_ranks
from megatron_attn2d.megatron.upstream.patching import Patch, applied
from megatron_attn2d.training import chunked_loss, derive, progress, wandb_run
from megatron_attn2d.training.guards import same_start
from megatron_attn2d.training.guards.fitting import fitting
from megatron_attn2d.training.guards.integrity import verified
from megatron_attn2d.training.guards.retention import retained


def main(megatron_args: Sequence[str]) -> None:
    """Trains, as this rank, with Megatron's arguments and `--run-dir`; RANK, WORLD_SIZE, ... are in the environment.

    Can be called again in the same process: Megatron's global state is gone afterwards, and the process group too
    where it was created here.

    Raises:
        ValueError: an argument contradicts what is installed or what this project supports.
    """
    run_in_megatron(partial(_pretrain, len(megatron_args)), megatron_args)


def run_in_megatron(body: Callable[[TextIO], None], megatron_args: Sequence[str]) -> None:
    """Runs `body(console)` as this rank, inside `in_megatron`."""
    with in_megatron(megatron_args) as console:
        body(console)


@contextmanager
def in_megatron(megatron_args: Sequence[str]) -> Iterator[TextIO]:
    """All that lets Megatron work here, as this rank, with its arguments completed; yields the console.

    What this process prints while entered goes to the log of the run in `--run-dir`.
    """
    rank = int(os.environ.get("RANK", "0"))
    run_dir = _add_own_arguments(ArgumentParser(allow_abbrev=False)).parse_known_args(megatron_args)[0].run_dir
    with ExitStack() as stack:
        console = stack.enter_context(progress.quiet(run_dir, rank))
        stack.enter_context(compat.applied_fixes())
        stack.enter_context(cpu.seam())
        from megatron_attn2d.megatron import cuda_graphs
        from megatron_attn2d.training import upstream_refusals  # imports Megatron, whose greeting is for the log

        stack.callback(_reset_megatron, owns_process_group=not torch.distributed.is_initialized())
        stack.callback(cuda_graphs.delete)  # also after an error: groups can't be destroyed before their graphs
        derive.set_environment(megatron_args)
        stack.enter_context(upstream_refusals.told(megatron_args))
        arguments = derive.with_derived_arguments(megatron_args)
        stack.enter_context(mock.patch.object(sys, "argv", ["pretrain_gpt", *arguments]))
        try:
            yield console
        except SystemExit as end:  # upstream's way to end a run early, after a signal for one
            if end.code:
                raise
    cuda_graphs.forget()
    # The model's configuration and its groups refer to each other: left alone they keep Gloo's threads, which spin once
    # the other ranks have gone, until Python happens to look for cycles. Not after an error: the destructor of a
    # checkpoint's half-written file ends the process.
    gc.collect()


def parsed() -> tuple[Namespace, Any]:
    """Megatron's arguments of the command line, and its configuration of the run with our attention in the model."""
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(extra_args_provider=_add_own_arguments)
    return args, pretrain_cfg_container_from_args(args, _model(args))


def set_up_model() -> tuple[Namespace, list[torch.nn.Module]]:
    """Within `in_megatron`: its arguments, and this rank's chunks of the model with the weights of their checkpoint."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training

    args, config = parsed()
    training.initialize_megatron()
    chunks, _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=config,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return args, chunks


def _model(args: Namespace) -> Any:
    """Megatron's configuration of the model, with our attention."""
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

    from megatron_attn2d.megatron.hybrid_spec import attention2d_hybrid_stack_spec
    from megatron_attn2d.megatron.layer_spec import attention2d_layer_spec

    if args.hybrid_layer_pattern is not None:
        model = hybrid_config_from_args(args)
        model.transformer.attention2d_head_groups = args.attention2d_head_groups
        model.hybrid_stack_spec = model.hybrid_stack_spec or attention2d_hybrid_stack_spec
    else:
        model = gpt_config_from_args(args)
        model.rope_scaling_factor = args.rope_scaling_factor  # which upstream leaves at 8
        if model.transformer_layer_spec is None:
            model.transformer_layer_spec = partial(attention2d_layer_spec, head_groups=args.attention2d_head_groups)
    return model


def _pretrain(given: int, console: TextIO) -> None:
    """Trains with the arguments in sys.argv, of which the first `given` were given and the others were derived."""
    from megatron.core.enums import ModelType
    from megatron.training import training

    from megatron_attn2d.megatron.recomputation import keeping
    from megatron_attn2d.training.guards.finite_check import checked_for_finiteness
    from megatron_attn2d.training.guards.self_check import checked_before_training
    from megatron_attn2d.training.start_line import announced

    with wandb_run.continued(sys.argv[1:]):
        args, config = parsed()
    datasets = partial(_datasets)
    datasets.is_distributed = True  # type: ignore[attr-defined]  # the builder decides by itself on which ranks to build
    with ExitStack() as stack:
        stack.enter_context(progress.reported(args, console))
        stack.enter_context(retained(args))
        stack.enter_context(fitting())
        stack.enter_context(verified())
        stack.enter_context(checked_for_finiteness(args))
        stack.enter_context(_checked_buffers())
        stack.enter_context(keeping(args))
        stack.enter_context(same_start.agreed(sys.argv[1:]))
        stack.enter_context(announced(args, sys.argv[1 + given :], console))
        if args.attention_self_check:
            stack.enter_context(checked_before_training())
        # the time stamps outlive a run, and ranks that hold some make one collective call more than ranks that don't
        stack.enter_context(mock.patch.dict(training._STARTUP_TIMESTAMPS))
        training.pretrain(config, datasets, ModelType.encoder_or_decoder, _forward_step)


def _add_own_arguments(parser: ArgumentParser) -> ArgumentParser:
    parser.error = _refuse  # type: ignore[method-assign]  # rather than exit, the message being in a log file
    own = parser.add_argument_group("megatron_attn2d")
    own.add_argument("--run-dir", help="directory for metrics.jsonl and the logs of the ranks")
    own.add_argument("--attention2d-head-groups", type=int, default=1, help="groups of heads that overlap")
    own.add_argument(
        "--document-multiple",
        type=int,
        default=0,
        help="each document is a sequence of its own, padded to a multiple of so many tokens; 0: all are one",
    )
    own.add_argument(
        "--examples", action="store_true", help="data sets hold examples of fine-tuning, which are not cut"
    )
    own.add_argument("--keep-last", type=int, help="checkpoints to keep; default: all")
    own.add_argument("--peak-tflops", type=float, help="of a GPU, in 10^12 FLOP/s, for the MFU")
    own.add_argument("--log-attention-communication", action="store_true", help="measure waiting for its messages")
    own.add_argument("--loss-chunk-tokens", type=int, help="tokens whose logits exist at a time; default: all")
    own.add_argument("--offload-activations", action="store_true", help="full recomputation keeps on the host")
    own.add_argument("--keep-attention-outputs", action="store_true", help="full recomputation runs attention once")
    own.add_argument("--check-finite-attention", action="store_true", help="report NaN and Inf with layer and rank")
    own.add_argument(
        "--no-attention-self-check",
        action="store_false",
        dest="attention_self_check",
        help="start without comparing a tiny attention with the dense answer",
    )
    return parser


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"Megatron's arguments: {message}")


def _datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """The training, validation and test sets, each with at least the given number of samples."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
    from megatron.core.parallel_state import get_tensor_model_parallel_rank
    from megatron.training import get_args, get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

    from megatron_attn2d.data.documents import DocumentDataset, DocumentDatasetConfig, ExampleDataset
    from megatron_attn2d.data.matching import largest_id

    args = get_args()
    kind: Any = MockGPTDataset if args.mock_data else GPTDataset
    if args.document_multiple:
        kind = ExampleDataset if args.examples else DocumentDataset
    # Upstream asks for the samples of all steps at today's batch, and ends early where earlier steps took more of them.
    rest = max(0, (args.train_iters or 0) - args.iteration) * args.global_batch_size
    num_samples = [max(num_samples[0], args.consumed_train_samples + rest), *num_samples[1:]]
    prefixes = [Path(prefix) for prefix in args.data_path or []]  # and weights, which are no data sets
    for prefix in prefixes:
        indexed.verify_index(prefix)
        if args.rank == 0 and is_complete(prefix):
            _check_vocabulary(largest_id(prefix), str(prefix))
    indices = f"cache/{kind.__name__}_indices"  # beside the data
    caches = [Path(args.data_cache_path)] if args.data_cache_path else [prefix / indices for prefix in prefixes]
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = DocumentDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        document_multiple=args.document_multiple,
    )

    def is_built_here() -> bool:
        # Stages without tokens and losses attend documents too.
        used = args.document_multiple or is_first_or_last_pipeline_stage(vp_stage)
        return bool(used) and get_tensor_model_parallel_rank() == 0

    with indexed.sealed_caches(caches, verifies=os.environ.get("LOCAL_RANK", "0") == "0", seals=args.rank == 0):
        return BlendedMegatronDatasetBuilder(kind, num_samples, is_built_here, config).build()


def _check_vocabulary(largest: int, where: str) -> None:
    """Raise UsageError if a token is outside the tokenizer's vocabulary: tensor ranks would embed it as zeros."""
    from megatron.training import get_args, get_tokenizer

    if largest >= (size := get_tokenizer().vocab_size):
        raise UsageError(
            f"{where} holds token {largest}, and the vocabulary of {get_args().tokenizer_type} has {size}, from 0: "
            "train with the tokenizer that the data was made with (data.tokenizer_type, data.vocab_size)"
        )


def _check_batch(held: Batch) -> None:
    """Raise UsageError if a batch holds a token outside the vocabulary; on the CPU, where it takes microseconds.

    A batch on the GPU is one of an iteration's CUDA graph: reading it would break the capture. `_checked_buffers` has
    looked at it before.
    """
    ids = [int(t.max()) for key in ("tokens", "labels") if (t := held.get(key)) is not None and not t.is_cuda]
    if ids:
        _check_vocabulary(max(ids), "a batch")


def _checked_buffers() -> AbstractContextManager[None]:
    """While entered, batches are looked at before they go into the buffers of an iteration's CUDA graph."""

    def check_first(load: Any) -> Any:
        @functools.wraps(load)
        def loaded(loader: Any, inputs: Any, stage: str, microbatch: int) -> Any:
            _check_batch(inputs[0] if isinstance(inputs, tuple) else inputs)
            return load(loader, inputs, stage, microbatch)

        return loaded

    reason = "replays of a CUDA graph don't come by where batches are looked at else"
    return applied([Patch("megatron.core.full_cuda_graph:StaticBufferLoader.__call__", check_first, reason)])


def next_batch(iterator: Iterator[Batch] | None, vp_stage: int | None) -> tuple[Batch, Any]:
    """This rank's part of the next batch: its zigzag chunks, and only what its pipeline stage uses.

    Returns:
        tensors [b, s/cp], and None; or, with each document a sequence of its own, [1, b * s/cp] and PackedSeqParams.
    """
    from megatron.core import parallel_state as mpu
    from megatron.training import get_args

    args = get_args()
    first = mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    keys = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
    mtp = last and bool(args.mtp_num_layers)
    if args.document_multiple:
        from megatron_attn2d.training.packed_batch import packed_on_this_rank

        held = next(iterator) if iterator is not None else {}
        _check_batch(held)
        return packed_on_this_rank(held, args, first=first, last=last, mtp=mtp, counted=not vp_stage)
    if not (first or last):
        return dict.fromkeys(keys), None

    batch: Batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert iterator is not None
        held = next(iterator)
        _check_batch(held)
        batch = {key: t.cuda(non_blocking=True) if (t := held.get(key)) is not None else None for key in keys}
    batch = to_tensor_ranks(batch, args, first=first, last=last, mtp=mtp)
    return to_context_rank(batch, mpu.get_context_parallel_group()), None


def _forward_step(iterator: Iterator[Batch] | None, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro-batch through this rank's stage: its output, and what turns that of the last stage into a loss."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args, get_timers

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch, packing = next_batch(iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
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
    """Sum of the losses of this rank's tokens, their number, and both for the report, summed there over all ranks.

    Args:
        mask: [b, s/cp], 0 where a token doesn't count.
        losses: [b, s/cp].
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
    if torch.is_grad_enabled():  # a step's, that is: upstream would print more of a validation
        reported[progress.COUNTED] = torch.stack([counted, torch.full_like(counted, mask.numel())])
    return total, num_tokens, reported


def _reset_megatron(owns_process_group: bool) -> None:
    """Forgets the global state of the run that ends."""
    from megatron.core import parallel_state
    from megatron.training import global_vars
    from megatron.training.training import destroy_global_state

    if global_vars._GLOBAL_SIGNAL_HANDLER is not None:
        global_vars._GLOBAL_SIGNAL_HANDLER.release()
    destroy_global_state()
    parallel_state._HIERARCHICAL_CONTEXT_PARALLEL_GROUPS = None  # which upstream forgets to forget
    if owns_process_group and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
