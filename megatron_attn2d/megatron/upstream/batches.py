"""A batch on its way to the ranks that share it, by upstream's helpers, whose names and arguments move."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_attn2d.megatron.upstream.versions import of_this_version

Batch = dict[str, torch.Tensor | None]


def to_tensor_ranks(
    batch: Batch, args: Any, *, first: bool, last: bool, mtp: bool, packed: bool = False, joined: bool = False
) -> dict[str, Any]:
    """What a pipeline stage uses of a batch, on all its tensor-parallel ranks, of which rank 0 holds it.

    Args:
        batch: tensors [b, s]; with `joined` or `packed` [1, b * s]; {} on ranks other than 0.
        args: Megatron's.
        first, last: whether this is the first, the last stage.
        mtp: whether the stage predicts several tokens.
        packed: whether the documents' totals are part of it, and samples joined.
        joined: whether samples are one sequence.
    """
    return of_this_version("hand a batch to tensor ranks", {"0.19": _to_tensor_ranks_0_19})(
        batch, args, first, last, mtp, packed, joined or packed
    )


def to_context_rank(batch: Batch, group: dist.ProcessGroup) -> dict[str, Any]:
    """This context rank's two zigzag chunks of each tensor: [b, s] to [b, s/cp]."""
    return of_this_version("cut a batch for context ranks", {"0.19": _to_context_rank_0_19})(batch, group)


def _to_tensor_ranks_0_19(
    batch: Batch, args: Any, first: bool, last: bool, mtp: bool, packed: bool, joined: bool
) -> dict[str, Any]:
    from megatron.core import parallel_state as mpu
    from megatron.core.utils import get_batch_on_this_tp_rank

    found: dict[str, Any] = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader and not joined,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        # A pack's totals are padded to chunks on one context rank too, and upstream hands those on for 2 or more.
        cp_size=2 if packed else args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=1 if joined else args.micro_batch_size,
        seq_length=args.seq_length * (args.micro_batch_size if joined else 1),
        mtp_on_this_rank=mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    return found


def _to_context_rank_0_19(batch: Batch, group: dist.ProcessGroup) -> dict[str, Any]:
    from megatron.core.utils import get_batch_on_this_cp_rank

    found: dict[str, Any] = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return found
