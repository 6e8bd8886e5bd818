"""This rank's part of a micro-batch, and a look at its token ids before they are embedded."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from megatron_attn2d.megatron.upstream.batches import Batch, to_context_rank, to_tensor_ranks
from megatron_attn2d.megatron.upstream.patching import Patch, applied
from megatron_attn2d.training.datasets import check_vocabulary

_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def next_batch(iterator: Iterator[Batch] | None, vp_stage: int | None) -> tuple[Batch, Any]:
    """Take the next batch, and of it this rank's zigzag chunks of the tensors that its pipeline stage uses.

    Args:
        iterator: over batches [b, s]; None on ranks that load no data.
        vp_stage: this rank's model chunk in the interleaved schedule; None without it.

    Returns:
        Tensors [b, s/cp], and None. Where each document is a sequence of its own: tensors [1, b * s/cp], and their
        PackedSeqParams, or None where documents are bins, which are the attention mask.

    Raises:
        UsageError: a token is outside the vocabulary, or a sample holds more documents than there are bins.
    """
    from megatron.core import parallel_state as mpu
    from megatron.training import get_args

    args = get_args()
    first = mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    mtp = last and bool(args.mtp_num_layers)
    if args.document_multiple:
        from megatron_attn2d.megatron import document_bins
        from megatron_attn2d.training.packed_batch import binned_on_this_rank, packed_on_this_rank

        held = next(iterator) if iterator is not None else {}
        check_batch(held)
        if document_bins.asked_for(args):
            return binned_on_this_rank(held, args, first=first, last=last, counted=not vp_stage), None
        return packed_on_this_rank(held, args, first=first, last=last, mtp=mtp, counted=not vp_stage)
    if not (first or last):
        return dict.fromkeys(_KEYS), None

    batch: Batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert iterator is not None
        held = next(iterator)
        check_batch(held)
        batch = {key: t.cuda(non_blocking=True) if (t := held.get(key)) is not None else None for key in _KEYS}
    batch = to_tensor_ranks(batch, args, first=first, last=last, mtp=mtp)
    return to_context_rank(batch, mpu.get_context_parallel_group()), None


def check_batch(held: Batch) -> None:
    """Raise UsageError if a batch on the CPU holds a token outside the vocabulary, or more documents than bins.

    This takes microseconds. A batch on the GPU belongs to the CUDA graph of an iteration: to read it would break the
    capture, and `checked_buffers` has looked at it before.
    """
    ids = [int(t.max()) for key in ("tokens", "labels") if (t := held.get(key)) is not None and not t.is_cuda]
    if ids:
        check_vocabulary(max(ids), "a batch")
    if (places := held.get("document_places")) is not None and not places.is_cuda:
        from megatron.training import get_args

        from megatron_attn2d.megatron import document_bins

        document_bins.check_batch(places, get_args())


def checked_buffers() -> AbstractContextManager[None]:
    """While entered, `check_batch` sees each batch before it goes into the buffers of an iteration's CUDA graph."""

    def check_first(load: Any) -> Any:
        @functools.wraps(load)
        def loaded(loader: Any, inputs: Any, stage: str, microbatch: int) -> Any:
            check_batch(inputs[0] if isinstance(inputs, tuple) else inputs)
            return load(loader, inputs, stage, microbatch)

        return loaded

    reason = "a replayed CUDA graph does not call next_batch, which looks at batches otherwise"
    return applied([Patch("megatron.core.full_cuda_graph:StaticBufferLoader.__call__", check_first, reason)])
