"""The attention module that Megatron-Core builds in each layer, in place of its DotProductAttention.

    cp_comm_type        what it runs
    attention2d         ATTENTION2D on the grid of the hierarchical context-parallel sizes: [R, C] or [U, R, C];
                        [r, c, R/r, C/c] or [U, r, c, R/r, C/c] fill it tile by tile of r x c
    p2p                 ring attention
    all_gather          ATTENTION2D with one column: all keys and values are gathered
    a2a                 ATTENTION2D with the head axis alone: Ulysses
    a2a+p2p             refused: Transformer Engine has it

It holds no parameters, so checkpoints interchange with every other vanilla-softmax attention.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention.ulysses import check_heads

_CAUSAL = {AttnMaskType.causal: True, AttnMaskType.no_mask: False}


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
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp", "hcp"])
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        _refuse_unsupported(config, layer_number, attention_type, dropout)
        self.layer_number = layer_number
        self.mode = cp_comm_type
        self.head_dims = k_channels or config.kv_channels, v_channels or config.kv_channels
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.head_groups = getattr(config, "attention2d_head_groups", None)
        self.ring = None
        self.grid = Grid.single()
        if config.context_parallel_size == 1:
            return
        if cp_comm_type == "p2p":
            self.ring = pg_collection.cp
        elif cp_comm_type == "all_gather":
            self.grid = Grid.from_group(pg_collection.cp, rows=pg_collection.cp.size(), cols=1)
        elif cp_comm_type == "a2a":
            self.grid = Grid.from_group(pg_collection.cp, rows=1, cols=1, heads=pg_collection.cp.size())
        elif cp_comm_type == "attention2d":
            self.grid = _hierarchical_grid(pg_collection)
        else:
            raise ValueError(
                f"cp_comm_type {cp_comm_type!r} (context_parallel.mode) is not served without Transformer Engine: "
                "choose attention2d, p2p (ring), all_gather or a2a (ulysses)"
            )
        tensor = config.tensor_model_parallel_size
        check_heads(config.num_attention_heads // tensor, max(1, config.num_query_groups // tensor), self.grid.heads)

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
        """Attend query [s/cp, b, h, d] to key and value [s/cp, b, g, d] in the zigzag layout.

        The mask is that of `attn_mask_type`; `attention_mask` is not read, as Megatron's loader need not make it.

        Returns:
            [s/cp, b, h * d].
        """
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        if mask_type not in _CAUSAL:
            raise ValueError(f"attention mask {mask_type.name} is not supported: choose causal or no_mask")
        if packed_seq_params is not None:
            raise ValueError("packed sequences (THD) are not supported yet: train on unpacked sequences")
        if attention_bias is not None:
            raise ValueError("attention bias is not supported: choose rotary or learned positions")
        causal, label = _CAUSAL[mask_type], f"layer {self.layer_number}"
        on_grid = partial(attention2d, grid=self.grid, head_groups=self.head_groups)
        attend = on_grid if self.ring is None else partial(ring_attention, group=self.ring)
        out = attend(query, key, value, causal=causal, softmax_scale=self.softmax_scale, label=label)
        return out.flatten(2)


def _hierarchical_grid(groups: ProcessGroupCollection) -> Grid:
    levels = groups.hcp or []
    if len(levels) not in (2, 3, 4, 5):
        raise ValueError(
            "cp_comm_type attention2d needs its grid: pass --hierarchical-context-parallel-sizes R C or U R C "
            f"(context_parallel.grid), whose product is {groups.cp.size()}, the context-parallel size"
        )
    if len(levels) > 3:
        return _tiled_grid(groups.cp, tuple(level.size() for level in levels))
    # Sizes [R, C] make a contiguous group of R, a column of the grid, and a strided group of C, a row.
    kv_group, q_group = levels[-2:]
    return Grid.from_groups(kv_group=kv_group, q_group=q_group, head_group=levels[0] if len(levels) == 3 else None)


@lru_cache(maxsize=8)  # one grid for all layers: each makes communicators
def _tiled_grid(group: dist.ProcessGroup, sizes: tuple[int, ...]) -> Grid:
    heads, tile_rows, tile_cols, tiles_down, tiles_across = sizes if len(sizes) == 5 else (1, *sizes)
    return Grid.from_group(
        group,
        rows=tile_rows * tiles_down,
        cols=tile_cols * tiles_across,
        heads=heads,
        tile=(tile_rows, tile_cols),
    )


def _refuse_unsupported(config: TransformerConfig, layer_number: int, attention_type: str, dropout: float) -> None:
    refused = [
        (dropout > 0, f"attention_dropout {dropout}", "set model.attention_dropout: 0.0 (--attention-dropout 0)"),
        (
            is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number),
            f"window_size {config.window_size}",
            "full attention (no --window-size)",
        ),
        (config.softmax_type != "vanilla", f"softmax_type {config.softmax_type!r}", "softmax_type vanilla"),
        (config.qk_clip or config.log_max_attention_logit, "qk_clip / log_max_attention_logit", "leave both off"),
        (config.fp8_dot_product_attention, "fp8_dot_product_attention", "bf16 attention; FP8 in linear layers is fine"),
        (attention_type != "self", f"attention_type {attention_type!r}", "self attention"),
    ]
    for condition, what, instead in refused:
        if condition:
            raise ValueError(f"{what} is not supported by context-parallel attention: use {instead}")
