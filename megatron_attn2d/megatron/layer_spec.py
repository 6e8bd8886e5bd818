"""Upstream's layer specs with context-parallel attention in them.

`attention2d_layer_spec` is what `--spec megatron_attn2d.megatron.layer_spec attention2d_layer_spec` names and what a
`transformer_layer_spec=` takes (GPTModelBuilder, Megatron-Bridge); for hybrid models there is `hybrid_spec.py`. All
surgery is in `with_context_parallelism`, which takes any of upstream's specs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models import gpt
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_attn2d.megatron.core_attention import ContextParallelAttention
from megatron_attn2d.megatron.layer_grid import ATTENTION2D, announce_ring, split_mode

ATTENDS_IN_CONTEXT = "attends_in_context"
"""Marks the function that builds the layers of multi-token prediction once they get our attention; see compat.py."""


class CoreAttention:
    """Builds the attention of a layer: ours, or Transformer Engine's for the modes that it has and the layer asks for.

    A class, since Megatron builds core attention from a class; instances are of the attention that was chosen.
    """

    def __new__(
        cls, *, config: TransformerConfig, layer_number: int, cp_comm_type: str | None = None, **kwargs: Any
    ) -> Any:
        """The attention module, constructed with the arguments that Megatron hands to any core attention."""
        mode = cp_comm_type or config.cp_comm_type  # the layer's own is not handed over by latent attention
        if isinstance(mode, list):
            mode = mode[layer_number - 1]
        if HAVE_TE and split_mode(mode)[0] != ATTENTION2D:
            if config.context_parallel_size > 1 and mode == "p2p":
                announce_ring()
            return TEDotProductAttention(config=config, layer_number=layer_number, cp_comm_type=cp_comm_type, **kwargs)
        return ContextParallelAttention(config=config, layer_number=layer_number, cp_comm_type=mode, **kwargs)


class SequenceParallelTorchNorm:
    """Builds torch's norm, as upstream does without Apex and Transformer Engine, also under sequence parallelism.

    Upstream's wrapper refuses that, since nothing marks the parameters of torch's norm for the summation of their
    gradients over the tensor-parallel ranks, which see different tokens. Here they carry that mark.
    """

    def __new__(cls, config: TransformerConfig, *args: Any, **kwargs: Any) -> Any:
        """The norm, constructed with the arguments of upstream's `WrappedTorchNorm`."""
        without = copy.copy(config)
        without.sequence_parallel = False
        norm = WrappedTorchNorm(without, *args, **kwargs)
        assert isinstance(norm, torch.nn.Module)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def with_context_parallelism(spec: Any) -> Any:
    """`spec` (a ModuleSpec, or what one is made of) with every core attention, and torch's norm, replaced.

    Raises:
        ValueError: a core attention is neither Megatron's own nor Transformer Engine's.
    """
    if spec is WrappedTorchNorm:
        return SequenceParallelTorchNorm
    if isinstance(spec, list):
        return [with_context_parallelism(one) for one in spec]
    if isinstance(spec, functools.partial):
        return functools.partial(spec.func, *spec.args, **_replaced(spec.keywords))
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec) if field.init}
        return dataclasses.replace(spec, **_replaced(fields))
    return spec


def _replaced(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _core_attention(value) if name == "core_attention" else with_context_parallelism(value)
        for name, value in fields.items()
    }


def _core_attention(spec: Any) -> Any:
    if spec not in (DotProductAttention, TEDotProductAttention):
        raise ValueError(
            f"core attention {spec} can't be replaced: only DotProductAttention and TEDotProductAttention can"
        )
    return CoreAttention


def attention2d_layer_spec(
    config: GPTModelConfig | TransformerConfig, vp_stage: int | None = None, *, head_groups: int = 1
) -> TransformerBlockSubmodules | ModuleSpec:
    """Upstream's default spec for the model (dense or MoE, local or Transformer Engine) with our attention in it.

    Args:
        config: of the model; a bare TransformerConfig (Megatron-Bridge's providers are) stands for its own model.
        vp_stage: the virtual pipeline stage to build, None without virtual stages.
        head_groups: in how many groups of heads attention2d overlaps messages and kernels.

    Raises:
        ValueError: the model asks for what would attend otherwise.
    """
    model = config if isinstance(config, GPTModelConfig) else _model_of(config)
    transformer = config.transformer if isinstance(config, GPTModelConfig) else config
    if transformer.attention_backend is AttnBackend.local:
        raise ValueError("attention_backend local: Megatron would replace context-parallel attention by its own")
    provides = hasattr(config, "provide")  # as Megatron-Bridge does: then these layers, too, are described by this spec
    if transformer.mtp_num_layers and not provides and not getattr(gpt.mtp_block_spec, ATTENDS_IN_CONTEXT, False):
        raise ValueError(
            "mtp_num_layers: Megatron builds multi-token prediction with an attention of its own choice; train with "
            "megatron-attn2d train or megatron_attn2d.pretrain_gpt, which replace that one too"
        )
    transformer.attention2d_head_groups = head_groups  # where the module finds it: builders pass the config alone
    spec = default_layer_spec(model, vp_stage)
    if isinstance(spec, ModuleSpec):  # a layer: as a block, so that the final norm is part of it
        groups = getattr(transformer, "_pg_collection", None)  # which a Megatron-Bridge provider holds
        pp_rank = None if groups is None else groups.pp.rank()
        layers = get_num_layers_to_build(transformer, vp_stage=vp_stage, pp_rank=pp_rank)
        spec = TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=LayerNormImpl)
    return with_context_parallelism(spec)


def _model_of(config: TransformerConfig) -> GPTModelConfig:
    """The model of a bare configuration, which a Megatron-Bridge provider is, with what the layers' spec depends on."""
    if getattr(config, "use_transformer_engine_full_layer_spec", False):
        raise ValueError(
            "use_transformer_engine_full_layer_spec: Transformer Engine's whole layer has an attention of its own; "
            "leave it False"
        )
    # A copy, since GPTModelConfig writes its defaults into fields that a provider has too.
    transformer = copy.copy(config)
    transformer.use_grouped_gemm_for_dense_mlp |= getattr(config, "dense_grouped_gemm", False)
    return GPTModelConfig(
        transformer=transformer,
        restore_modelopt_state=getattr(config, "restore_modelopt_state", False),
        use_arbitrary_attention_mask=getattr(config, "use_arbitrary_attention_mask", None),
    )
