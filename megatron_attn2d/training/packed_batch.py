"""Takes this rank's part of a pack of documents: its zigzag chunks of each document, and the documents' lengths."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.training import training

from megatron_attn2d.attention.packing import Packing
from megatron_attn2d.data.documents import PLACES, TOTALS
from megatron_attn2d.megatron import document_bins
from megatron_attn2d.megatron.core_attention import keep_totals
from megatron_attn2d.megatron.upstream import rotary
from megatron_attn2d.megatron.upstream.batches import Batch, to_tensor_ranks
from megatron_attn2d.megatron.upstream.compat import mask_padding

KEYS = ("tokens", "labels", "loss_mask", "position_ids")
_ROTARY_LENGTHS = 8
"""Number of lengths to which the longest document is rounded up: upstream keeps a table of rotary angles per length."""


@dataclass(frozen=True)
class Pack:
    """The documents of a micro-batch, one after the other, in numbers on the host."""

    totals: list[int]
    """Running totals of the documents' tokens, from 0."""
    places: list[int]
    """Running totals of their places, padding included, from 0; the last is the number of tokens of the pack."""

    @classmethod
    def of(cls, totals: torch.Tensor, places: torch.Tensor) -> Pack:
        """The pack of the samples of a batch, one after the other; `totals` and `places` are theirs, [b, n]."""
        lengths, taken = totals.diff(), places.diff()
        held = taken > 0  # behind the last document of a sample its totals repeat
        return cls(*([0, *one[held].cumsum(0).tolist()] for one in (lengths, taken)))

    def parameters(self, totals: torch.Tensor, places: torch.Tensor) -> PackedSeqParams:
        """The documents for Megatron's layers; `totals` and `places` are those of the pack on the device, int32 [n]."""
        longest = self._rotary_length()
        return keep_totals(
            PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=totals,
                cu_seqlens_kv=totals,
                cu_seqlens_q_padded=places,
                cu_seqlens_kv_padded=places,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
                pad_between_seqs=self.totals != self.places,
            ),
            self.totals,
            self.places,
        )

    def _rotary_length(self) -> int:
        """A length of at least the longest place: all tokens for one place, and fewer for several.

        With all tokens upstream would let positions run on across places.
        """
        longest, tokens = max(b - a for a, b in pairwise(self.places)), self.places[-1]
        step = -(-tokens // _ROTARY_LENGTHS)
        rounded = -(-longest // step) * step
        return min(rounded, tokens) if len(self.places) == 2 or rounded < tokens else longest


def packed_on_this_rank(
    held: Batch, args: Any, *, first: bool, last: bool, mtp: bool, counted: bool
) -> tuple[Batch, PackedSeqParams]:
    """This rank's part of a batch of documents.

    Args:
        held: the batch as the loader gave it: tensors [b, s], and totals and places [b, n] on the CPU; {} on tensor
            ranks without a loader.
        args: Megatron's arguments: the sizes of the batch, and the number of pipeline stages.
        first: whether this rank embeds tokens.
        last: whether this rank computes losses.
        mtp: whether this rank predicts several tokens.
        counted: whether upstream's throughput counts these documents; once per rank and micro-batch.

    Returns:
        The tensors that this stage uses, [1, b * s / cp], and the documents for its layers.
    """
    group, context = mpu.get_tensor_model_parallel_group(), mpu.get_context_parallel_group()
    pack, batch = None, dict[str, Any]()
    if group.rank() == 0:
        totals, places = held[TOTALS], held[PLACES]
        assert totals is not None
        assert places is not None
        pack = Pack.of(totals, places)
        batch = {
            key: None if (x := held.get(key)) is None else x.reshape(1, -1).cuda(non_blocking=True)
            for key in (*KEYS, "attention_mask")
        }
        numbers = {"cu_seqlens": pack.totals, "cu_seqlens_padded": pack.places, "max_seqlen": [pack.places[-1]]}
        batch |= {key: torch.tensor(x, dtype=torch.int32, device="cuda") for key, x in numbers.items()}
    batch = to_tensor_ranks(batch, args, first=first, last=last, mtp=mtp, packed=True)
    totals_there, places_there = (batch[key].flatten() for key in ("cu_seqlens", "cu_seqlens_padded"))
    if pack is None:
        pack = Pack(totals_there.tolist(), places_there.tolist())
    if counted and torch.is_grad_enabled():  # documents of a validation would count in the next step
        training.update_seqlen_stats_from_cu_seqlens(totals_there)
    rank, ranks = context.rank(), context.size()
    padding = _padding(totals_there, places_there, pack.places[-1]) if args.num_experts else None
    if ranks > 1:
        # Attention asks for the same packing, which is cached.
        chunks = Packing.of(pack.totals, pack.places, pack.places[-1], ranks, totals_there.device)
        rows = chunks.positions([rank, 2 * ranks - 1 - rank])[0]
        batch |= {key: x.index_select(1, rows) for key in KEYS if (x := batch[key]) is not None}
        padding = None if padding is None else padding.index_select(1, rows)
    packing = pack.parameters(totals_there, places_there)
    if padding is not None:
        if args.sequence_parallel:
            padding = padding.chunk(group.size(), dim=1)[group.rank()]
        packing = mask_padding(packing, padding)
    return {key: batch[key] for key in (*KEYS, "attention_mask")}, packing


def binned_on_this_rank(held: Batch, args: Any, *, first: bool, last: bool, counted: bool) -> Batch:
    """`packed_on_this_rank` for CUDA graphs, which read no number of the host: a sample has `args.document_bins` bins.

    Returns:
        The tensors that this stage uses, [1, b * s / cp]; bins as the attention mask, and `rotary.KEY`.
    """
    group, context = mpu.get_tensor_model_parallel_group(), mpu.get_context_parallel_group()
    device, batch = torch.cuda.current_device(), dict[str, Any]()
    if group.rank() == 0:
        totals, places = held[TOTALS], held[PLACES]
        assert totals is not None
        assert places is not None
        bins = document_bins.of_samples(
            totals.cuda(non_blocking=True), places.cuda(non_blocking=True), args.document_bins
        )
        batch = {
            key: None if (x := held.get(key)) is None else x.reshape(1, -1).cuda(non_blocking=True) for key in KEYS
        }
    else:
        bins = torch.empty((2, args.micro_batch_size * args.document_bins + 1), dtype=torch.int32, device=device)
    if group.size() > 1:
        dist.broadcast(bins, mpu.get_tensor_model_parallel_src_rank(), group=group)
    used: dict[str, Any] = dict.fromkeys(KEYS)
    if first or last:
        used |= to_tensor_ranks({"attention_mask": None, **batch}, args, first=first, last=last, mtp=False, joined=True)
    if counted and torch.is_grad_enabled():
        training.update_seqlen_stats_from_cu_seqlens(bins[0])
    tokens = args.micro_batch_size * args.seq_length
    rows, positions = document_bins.rows_and_positions(bins, tokens, context.rank(), context.size())
    found = {key: x if (x := used[key]) is None else x.index_select(1, rows) for key in KEYS}
    return {**found, "attention_mask": bins, rotary.KEY: positions}


def _padding(totals: torch.Tensor, places: torch.Tensor, tokens: int) -> torch.Tensor:
    """Where a pack of `tokens` is padding, bool [1, tokens], by running totals of its documents and of their places."""
    ends = places[:-1] + totals.diff()
    return (torch.arange(tokens, device=ends.device) >= ends.repeat_interleave(places.diff(), output_size=tokens))[None]
