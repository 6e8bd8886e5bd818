"""What context parallelism says of itself in any launch: one line from rank 0 while the model is built.

    context parallelism over 16 ranks: layers 1-31: attention2d on a grid of 4x4 (cp_comm_type); layer 32: ring (p2p);
    kernel cudnn; derived: no_create_attention_mask_in_dataloader, ...

A launch of Megatron-LM that forgets a flag is a ring, or makes a mask that nobody reads: here it is told so.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_attn2d.attention.kernels import choose_kernel
from megatron_attn2d.attention.kernels.base import Request
from megatron_attn2d.megatron.layer_grid import (
    ATTENTION2D,
    choose_shape,
    hierarchical_sizes,
    queries_per_kv_head,
    split_mode,
)

_NAMES = {"p2p": "ring (p2p)", "a2a": "ulysses (a2a)"}
_INTRODUCED = "attention2d_introduced"
"""Marks the configuration of a model whose first layer has been built."""
_TRANSFORMER_ENGINE = "Transformer Engine"


def introduce(
    config: TransformerConfig,
    groups: ProcessGroupCollection | None,
    head_dims: tuple[int, int],
    dropout: float,
    transformer_engine: bool,
) -> None:
    """Derives what the launch left out, and prints the line, once, on rank 0.

    Args:
        config: of the model.
        groups: of the model; None stands for Megatron's own.
        head_dims: of keys and of values.
        dropout: of attention.
        transformer_engine: whether modes other than attention2d are Transformer Engine's.
    """
    if vars(config).get(_INTRODUCED):
        return
    setattr(config, _INTRODUCED, True)
    said = [_modes(config, hierarchical_sizes(groups, config), transformer_engine)]
    said.append(_kernels(config, head_dims, dropout, transformer_engine))
    said += _derived(config)
    ranks = config.context_parallel_size
    announce(f"context parallelism over {ranks} rank{'s' * (ranks > 1)}: {'; '.join(said)}")


def launched_with() -> Any:
    """The arguments of a launch by Megatron's own training loop; None elsewhere."""
    return getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)


def tell_unread_mask(mask: Tensor) -> None:
    """Says once what the mask costs that a loader has made and no layer reads."""
    if mask.dim() == 4 and mask.size(-1) > 1:
        size = _size(mask.numel() * mask.element_size())
        announce(
            f"context parallelism: each batch brings a mask of {size} per rank, which attention does not read: pass "
            "--no-create-attention-mask-in-dataloader (in a data set's configuration create_attention_mask=False)"
        )


def kernel_name(config: TransformerConfig, head_dims: tuple[int, int], dropout: float, windows: bool) -> str:
    """The kernel that attention of these head dims (keys, values) takes on this device."""
    request = Request(
        "cuda" if torch.cuda.is_available() else "cpu",
        config.params_dtype,
        *head_dims,
        windows=windows,
        dropout=dropout > 0,
        grouped=config.num_query_groups not in (None, config.num_attention_heads),
    )
    return choose_kernel("auto", request).name


@cache
def announce(text: str) -> None:
    """Prints a line, once, on rank 0, among those that Megatron prints while it builds the model."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def _mode(config: TransformerConfig, layer: int) -> str:
    """The mode of a layer, counted from 1."""
    modes = config.cp_comm_type
    return (modes[layer - 1] if isinstance(modes, list) else modes) or "p2p"


def _modes(config: TransformerConfig, sizes: tuple[int, ...], transformer_engine: bool) -> str:
    """'layers 1-31: attention2d on a grid of 4x4 (cp_comm_type); layer 32: ring (p2p)'"""
    if config.context_parallel_size == 1:
        asked = ATTENTION2D in str(config.cp_comm_type)  # p2p is Megatron's default
        chosen = f"{config.cp_comm_type} has no effect" if asked else "nothing is spread"
        return f"{chosen} (context_parallel_size 1)"
    layers: dict[str, list[int]] = {}
    for layer in range(1, config.num_layers + 1):
        layers.setdefault(_described(_mode(config, layer), config, sizes, transformer_engine), []).append(layer)
    if len(layers) > 1:
        return "; ".join(f"layer{'s' * (len(ones) > 1)} {_ranges(ones)}: {what}" for what, ones in layers.items())
    [what] = layers
    if _mode(config, 1) == "p2p":
        return f"{what}: --cp-comm-type {ATTENTION2D} was not given"
    return f"{what} in all layers"


def _described(mode: str, config: TransformerConfig, sizes: tuple[int, ...], transformer_engine: bool) -> str:
    name, asked = split_mode(mode)
    if name != ATTENTION2D:
        return _NAMES.get(mode, mode) + f" of {_TRANSFORMER_ENGINE}" * transformer_engine
    shape, origin = choose_shape(asked, sizes, config.context_parallel_size, queries_per_kv_head(config))
    groups = getattr(config, "attention2d_head_groups", 1)
    return f"{ATTENTION2D} on a grid of {shape} ({origin})" + f" in {groups} head groups" * (groups > 1)


def _kernels(config: TransformerConfig, head_dims: tuple[int, int], dropout: float, transformer_engine: bool) -> str:
    found: dict[str, None] = {}
    for layer in range(1, config.num_layers + 1):
        if transformer_engine and split_mode(_mode(config, layer))[0] != ATTENTION2D:
            found[f"{_TRANSFORMER_ENGINE}'s"] = None
            continue
        windows = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer)
        found[kernel_name(config, head_dims, dropout, windows) + " in windows" * windows] = None
    return f"kernel{'s' * (len(found) > 1)} {', '.join(found)}"


def _derived(config: TransformerConfig) -> Iterator[str]:
    """What is derived, for the loader, which is made after the model, and what else should be given."""
    args = launched_with()
    if args is None or config.context_parallel_size == 1:
        return
    if getattr(args, "create_attention_mask_in_dataloader", False):
        args.create_attention_mask_in_dataloader = False
        size = _size(args.seq_length**2)
        yield f"derived: no_create_attention_mask_in_dataloader, as no layer reads that mask of {size} per sequence"
    if not config.calculate_per_token_loss:
        yield "without --calculate-per-token-loss each rank's mean loss weighs the same, whatever it masks"


def _ranges(numbers: list[int]) -> str:
    """'1-3, 5' for 1, 2, 3 and 5."""
    runs = [
        [number for _, number in run] for _, run in itertools.groupby(enumerate(numbers), lambda one: one[1] - one[0])
    ]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _size(count: int) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
