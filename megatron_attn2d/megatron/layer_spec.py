"""Upstream's layer specs with context-parallel attention in them.

`attention2d_layer_spec` is what Megatron's `--spec megatron_attn2d.megatron.layer_spec attention2d_layer_spec` names and
what a `transformer_layer_spec=` takes (GPTModelBuilder, Megatron-Bridge). All surgery is in `with_context_parallelism`,
which takes any of upstream's specs.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_attn2d.megatron.core_attention import ContextParallelAttention


class CoreAttention:
    """Builds the attention of a layer: ours, or Transformer Engine's for the modes that it has and the layer asks for.

    A class, since Megatron builds core attention from a class; instances are of the attention that was chosen.
    """

    def __new__(cls, *args: Any, cp_comm_type: str | None = None, **kwargs: Any) -> Any:
        """The attention module, constructed with the arguments that Megatron hands to any core attention."""
        ours = cp_comm_type == "attention2d" or not HAVE_TE
        module = ContextParallelAttention if ours else TEDotProductAttention
        return module(*args, cp_comm_type=cp_comm_type, **kwargs)


class SequenceParallelTorchNorm:
    """Builds torch's norm, as upstream does without Apex and Transformer Engine, also under sequence parallelism.

    Upstream's wrapper refuses that, since nothing marks the parameters of torch's norm for the summation of their
    gradients over the tensor-parallel ranks, which see different tokens. Here they carry that mark.
    """

    def __new__(cls, config: TransformerConfig, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """The norm, constructed with the arguments of upstream's `WrappedTorchNorm`."""
        without = copy.copy(config)
        without.sequence_parallel = False
        norm = WrappedTorchNorm(without, *args, **kwargs)
        assert isinstance(norm, torch.nn.Module)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


_REPLACEMENTS: dict[Any, Any] = {
    DotProductAttention: CoreAttention,
    TEDotProductAttention: CoreAttention,
    WrappedTorchNorm: SequenceParallelTorchNorm,
}


def with_context_parallelism(spec: Any) -> Any:
    """`spec` (a ModuleSpec, any dataclass or list of them) with core attention, and torch's norm, replaced throughout."""
    if isinstance(spec, type):
        return _REPLACEMENTS.get(spec, spec)
    if isinstance(spec, list):
        return [with_context_parallelism(one) for one in spec]
    if dataclasses.is_dataclass(spec):
        fields = {f.name: with_context_parallelism(getattr(spec, f.name)) for f in dataclasses.fields(spec) if f.init}
        return dataclasses.replace(spec, **fields)
    return spec


def attention2d_layer_spec(
    config: GPTModelConfig | TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules | ModuleSpec:
    """Upstream's default spec for the model (dense or MoE, local or Transformer Engine) with our attention in it.

    Args:
        config: of the model; a bare TransformerConfig (Megatron-Bridge's providers are) stands for its own model.
        vp_stage: the virtual pipeline stage to build, None without virtual stages.

    Raises:
        ValueError: the model asks for an attention that this replaces by something else.
    """
    model = config if isinstance(config, GPTModelConfig) else GPTModelConfig(transformer=config)
    transformer = model.transformer
    if transformer.attention_backend.name == "local":
        raise ValueError("attention_backend local: Megatron would replace context-parallel attention by its own")
    spec = default_layer_spec(model, vp_stage)
    if isinstance(spec, ModuleSpec):  # a layer: as a block, so that the final norm is part of it
        layers = get_num_layers_to_build(transformer, vp_stage=vp_stage)
        spec = TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=LayerNormImpl)
    return with_context_parallelism(spec)
