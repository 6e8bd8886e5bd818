"""The attention module that Megatron-Core builds in each layer, in place of its DotProductAttention.

    cp_comm_type        what it runs
    attention2d         ATTENTION2D on the grid with the fewest bytes, or that of the hierarchical sizes
    attention2d:4x4     ATTENTION2D on that grid; for all forms see `layer_grid`
    p2p                 ring attention
    all_gather          ATTENTION2D with one column: all keys and values are gathered
    a2a                 ATTENTION2D with the head axis alone: Ulysses
    a2a+p2p             refused: Transformer Engine has it

It holds no parameters but learnable sinks, under upstream's name: checkpoints interchange with every other attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
    is_graph_safe_cuda_rng_tracker,
)
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention.checks import check_heads
from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.megatron import cuda_graphs, document_bins
from megatron_attn2d.megatron.announcement import launched_with, tell_unread_mask
from megatron_attn2d.megatron.layer_grid import layer_grid, split_mode
from megatron_attn2d.megatron.recomputation import attentions
from megatron_attn2d.megatron.refusals import REFUSED, check_model
from megatron_attn2d.megatron.upstream.compat import ROLLS_WITHIN_PADDING

_CAUSAL = {AttnMaskType.causal: True, AttnMaskType.no_mask: False}
_CAUSAL_PACKED = {**_CAUSAL, AttnMaskType.padding_causal: True, AttnMaskType.padding: False}


class KeyValueCache(Protocol):
    """What attention is asked of while text is generated; see `inference`."""

    def attend(self, layer: ContextParallelAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep key and value of the new tokens, and attend query [t, 1, h, d] to all that is kept: [t, 1, h * dv]."""


class ContextParallelAttention(MegatronModule):
    """Core attention over the context-parallel group; the arguments are those of every core attention of Megatron-Core.

    Raises:
        ValueError: for a configuration that it does not serve; nothing is ignored silently.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp", "hcp", "tp"])
        _refuse_unsupported(config, attention_type)
        self.captured = cuda_graphs.hold_attention(config)
        if self.captured:
            cuda_graphs.prepare(config)
        self.layer_number = layer_number
        self.mode, asked = split_mode(cp_comm_type)
        self.head_dims = k_channels or config.kv_channels, v_channels or config.kv_channels
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = tuple(config.window_size) if windowed else None
        self.tp_group = pg_collection.tp
        self.softmax_offset = self._sinks(config)
        self.head_groups = getattr(config, "attention2d_head_groups", 1)
        self.ring = None
        self.grid = Grid.single()
        tensor = config.tensor_model_parallel_size
        heads, kv_heads = config.num_attention_heads // tensor, max(1, config.num_query_groups // tensor)
        self.cache: KeyValueCache | None = None
        self.kept_heads = heads if config.multi_latent_attention else kv_heads
        if config.context_parallel_size == 1:
            return
        if self.mode == "p2p":
            self.ring = pg_collection.cp
        elif self.mode == "all_gather":
            # `reuse`: another communicator for each layer would cost more than streams of high priority gain.
            self.grid = Grid.from_group(pg_collection.cp, rows=pg_collection.cp.size(), cols=1, reuse=True)
        elif self.mode == "a2a":
            size = pg_collection.cp.size()
            self.grid = Grid.from_group(pg_collection.cp, rows=1, cols=1, ulysses_size=size, reuse=True)
        elif self.mode == "attention2d":
            self.grid = layer_grid(pg_collection, asked, config)
        else:
            raise ValueError(
                f"cp_comm_type {cp_comm_type!r} (context_parallel.mode) is not served without Transformer Engine: "
                "choose attention2d, p2p (ring), all_gather or a2a (ulysses)"
            )
        check_heads(heads, kv_heads, self.grid.ulysses_size)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend query [s/cp, b, h, d] to key and value [s/cp, b, g, d] in the zigzag layout, or to those of `cache`.

        The mask is that of `attn_mask_type`; `attention_mask` is not read, as Megatron's loader need not make it.
        Where it is `document_bins`, b is 1, and each document is a sequence in a zigzag of its own.
        With `packed_seq_params` (THD) the shapes are [t/cp, heads, d], each sequence in a zigzag of its own.

        Returns:
            [s/cp, b, h * d], or [t/cp, h * d].
        """
        if self.cache is not None:
            return self.cache.attend(self, query, key, value)
        causal = self._is_causal(attn_mask_type, packed_seq_params)
        if attention_bias is not None:
            raise ValueError("attention bias is not supported: choose rotary or learned positions")
        if attention_mask is not None and document_bins.are_bins(attention_mask):
            # Megatron takes the pack for one sequence.
            q, k, v = (x.squeeze(1) for x in (query, key, value))
            tokens = q.size(0) * self.config.context_parallel_size
            lengths, places = document_bins.rows_of(attention_mask)
            bins = {"cu_seqlens": lengths, "cu_seqlens_padded": places, "max_seqlen": tokens}
            return self.attend(q, k, v, causal, **bins).unsqueeze(1)
        if attention_mask is not None:
            tell_unread_mask(attention_mask)
        totals = {} if packed_seq_params is None else self._packed(packed_seq_params)
        return self.attend(query, key, value, causal, **totals)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, **totals: Any) -> Tensor:
        """Attention on the layer's grid or ring; shapes as in `forward`, `totals` as those of `attention2d`."""
        on_grid = partial(attention2d, grid=self.grid, overlap_groups=self.head_groups)
        attend = on_grid if self.ring is None else partial(ring_attention, group=self.ring)
        out = attend(
            query,
            key,
            value,
            causal=causal,
            window=self.window,
            sink=self.softmax_offset,
            dropout=self._draw_dropout(query),
            softmax_scale=self.softmax_scale,
            results=attentions(),
            label=f"layer {self.layer_number}",
            **totals,
        )
        return out.flatten(-2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """Learnable sinks, spread over tensor-parallel ranks by heads; nothing else."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )

    def _sinks(self, config: TransformerConfig) -> torch.Tensor | None:
        """A score for each head of this tensor-parallel rank, as upstream's DotProductAttention has it."""
        if config.softmax_type == "vanilla":
            return None
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        offsets = torch.zeros(heads, device=device, dtype=config.params_dtype)
        if config.softmax_type == "off-by-one":
            return offsets
        parameter = torch.nn.Parameter(offsets)
        if config.perform_initialization:
            config.init_method(parameter)
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        return parameter

    def _is_causal(self, attn_mask_type: AttnMaskType | None, packing: PackedSeqParams | None) -> bool:
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        # With packed sequences "padding" says no more than their lengths do.
        served = _CAUSAL if packing is None else _CAUSAL_PACKED
        if mask_type not in served:
            raise ValueError(f"attention mask {mask_type.name} is not supported: choose causal or no_mask")
        return served[mask_type]

    def _packed(self, packing: PackedSeqParams) -> dict[str, Any]:
        totals = _totals(packing, read=not self.captured)
        if self.config.mtp_num_layers and _are_padded(totals) and not _rolls_within_padding():
            raise ValueError(
                "packed sequences with padding are not supported with mtp_num_layers: multi-token prediction "
                "would predict a neighbour's tokens; train inside "
                "megatron_attn2d.megatron.upstream.compat.applied_fixes(), which mends it, or pack without padding"
            )
        return totals

    def _draw_dropout(self, query: Tensor) -> Dropout | None:
        """Dropout under a new seed, while training.

        It comes from the random numbers that all ranks of a replica have in common. Activation recomputation restores
        them, and so draws the same. A CUDA graph draws another seed in each replay, as Megatron registers a generator
        of each tracked state with the graph.

        Raises:
            ValueError: the seed would be the same in each replay.
        """
        if not self.training or self.dropout == 0:
            return None
        tracker = get_cuda_rng_tracker()
        if self.captured and not is_graph_safe_cuda_rng_tracker(tracker):
            raise ValueError(
                f"attention_dropout {self.dropout} under cuda_graph_impl {self.config.cuda_graph_impl!r}: each replay "
                "would drop the same probabilities; set use_te_rng_tracker (--te-rng-tracker)"
            )
        with tracker.fork(get_data_parallel_rng_tracker_name()):
            seed = torch.randint(2**62, (1,), device=query.device)
        return Dropout(self.dropout, seed, first_head=self.tp_group.rank() * query.size(-2))


def _rolls_within_padding() -> bool:
    return getattr(multi_token_prediction._roll_tensor_packed_seq, ROLLS_WITHIN_PADDING, False)


def _are_padded(totals: dict[str, Any]) -> bool:
    """Whether there is, or may be, padding between sequences."""
    lengths, places = totals["cu_seqlens"], totals["cu_seqlens_padded"]
    return places is not None and (isinstance(lengths, Tensor) or bool(lengths != places))


def _totals(packing: PackedSeqParams, read: bool) -> dict[str, Any]:
    """Running totals of packed sequences, and the longest of them, for attention.

    They are read from the GPU once per batch. For a CUDA graph they are not read: its replays find other numbers in the
    same tensors.

    Raises:
        ValueError: for what is packed in a way that is not served.
    """
    known: dict[str, Any] | None = vars(packing).get("_attention2d_totals")
    if known is not None:  # read once for all layers: each reading makes the GPU's queue run empty
        return known
    if packing.qkv_format != "thd":
        raise ValueError(f"packed_seq_params.qkv_format {packing.qkv_format!r} is not supported: choose thd")
    if packing.cp_group is not None or packing.local_cp_size is not None:
        raise ValueError(
            "packed_seq_params.cp_group (dynamic context parallelism) is not supported: it "
            f"{REFUSED['dynamic_context_parallel'].reason}; leave out --dynamic-context-parallel"
        )
    if packing.cu_seqlens_q is None:
        raise ValueError("packed_seq_params.cu_seqlens_q is missing: packed sequences need their running totals")
    totals: dict[str, Any] = {}
    for name, queries, keys in (
        ("cu_seqlens", packing.cu_seqlens_q, packing.cu_seqlens_kv),
        ("cu_seqlens_padded", packing.cu_seqlens_q_padded, packing.cu_seqlens_kv_padded),
    ):
        if queries is not None and queries.is_cuda and not read:
            totals[name] = queries.flatten()
            continue
        totals[name] = None if queries is None else queries.flatten().tolist()
        if keys is not None and keys is not queries and keys.flatten().tolist() != totals[name]:
            raise ValueError(f"{name}_q and {name}_kv differ: packed queries attend their own sequences only")
    if packing.cu_seqlens_q_padded is None and isinstance(packing.max_seqlen_q, int):
        totals["max_seqlen"] = packing.max_seqlen_q
    vars(packing)["_attention2d_totals"] = totals
    return totals


def keep_totals(packing: PackedSeqParams, totals: Sequence[int], places: Sequence[int]) -> PackedSeqParams:
    """`packing`, whose running totals, without and with padding, attention need not read from the GPU any more."""
    vars(packing)["_attention2d_totals"] = {"cu_seqlens": totals, "cu_seqlens_padded": places}
    return packing


def _refuse_unsupported(config: TransformerConfig, attention_type: str) -> None:
    check_model(config)
    launch = launched_with()
    refused = [
        (
            config.deterministic_mode and not torch.are_deterministic_algorithms_enabled(),
            "deterministic_mode without torch.use_deterministic_algorithms(True), by which kernels are chosen,",
            "--deterministic-mode, or call that function before the model is built",
        ),
        (
            isinstance(config.cp_comm_type, list)
            and {"attention2d", "a2a+p2p"} <= {split_mode(mode)[0] for mode in config.cp_comm_type},
            "cp_comm_type a2a+p2p on one layer and attention2d on another",
            "one of the two, as both would take --hierarchical-context-parallel-sizes for theirs",
        ),
        (
            getattr(launch, "reset_attention_mask", False),  # the loader's mask, which is not read
            "--reset-attention-mask, a mask for each sequence of the batch,",
            "packed sequences (cu_seqlens), or leave it out",
        ),
        (
            # Upstream spreads the whole pack over the ranks, but rotates, and attention masks, as if each document were
            # spread: what fails in its RoPE (split_with_sizes) is wrong where lengths happen to divide.
            getattr(launch, "dataloader_inter_document_masking", False) and config.context_parallel_size > 1,
            "--dataloader-inter-document-masking, whose documents don't divide over context ranks,",
            "megatron-attn2d train with data.document_masking, which pads them, or --sft's packs",
        ),
        (
            getattr(launch, "reset_position_ids", False) and launch.position_embedding_type != "learned_absolute",
            "--reset-position-ids, which only learned positions read,",
            "packed sequences (cu_seqlens), whose rotary positions begin anew, or leave it out",
        ),
        (attention_type != "self", f"attention_type {attention_type!r}", "self attention"),
    ]
    for condition, what, instead in refused:
        if condition:
            raise ValueError(f"{what} is not supported by context-parallel attention: use {instead}")
