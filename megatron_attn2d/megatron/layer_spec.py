"""Upstream's layer specs with context-parallel attention in them.

`attention2d_layer_spec` is what `--spec megatron_attn2d.megatron.layer_spec attention2d_layer_spec` names and what a
`transformer_layer_spec=` takes (GPTModelBuilder, Megatron-Bridge). Callers that hand a spec on without calling it
(`gpt_builders.gpt_builder`, and so train_rl.py and tools/checkpoint) take `attention2d_layer`. For hybrid models there
is `hybrid_spec.py`. All surgery is in `with_context_parallelism`, which takes any of upstream's specs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_attn2d.megatron import document_bins
from megatron_attn2d.megatron.announcement import introduce, launched_with
from megatron_attn2d.megatron.core_attention import ContextParallelAttention
from megatron_attn2d.megatron.layer_grid import ATTENTION2D, split_mode
from megatron_attn2d.megatron.refusals import check_model
from megatron_attn2d.megatron.upstream.patching import Patch, install
from megatron_attn2d.megatron.upstream.torch_norm import SequenceParallelTorchNorm


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
        introduce(
            config,
            kwargs.get("pg_collection"),
            (kwargs.get("k_channels") or config.kv_channels, kwargs.get("v_channels") or config.kv_channels),
            config.attention_dropout,
            transformer_engine=_has_other_modes(),
        )
        if _has_other_modes() and split_mode(mode)[0] != ATTENTION2D:
            return TEDotProductAttention(config=config, layer_number=layer_number, cp_comm_type=cp_comm_type, **kwargs)
        return ContextParallelAttention(config=config, layer_number=layer_number, cp_comm_type=mode, **kwargs)


def _has_other_modes() -> bool:
    """Whether modes other than attention2d are Transformer Engine's: it can't be told of documents by bins."""
    return HAVE_TE and not document_bins.asked_for(launched_with())


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
    if spec is CoreAttention:  # Megatron-Bridge describes multi-token prediction by layers that have it already
        return spec
    if spec not in (DotProductAttention, TEDotProductAttention):
        raise ValueError(
            f"core attention {spec} can't be replaced: only DotProductAttention and TEDotProductAttention can"
        )
    return CoreAttention


def attention2d_layer_spec(
    config: GPTModelConfig | TransformerConfig, vp_stage: int | None = None, *, head_groups: int = 1
) -> TransformerBlockSubmodules:
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
    check_model(transformer)
    if transformer.mtp_num_layers:
        install(ATTENDING_IN_CONTEXT)
    transformer.attention2d_head_groups = head_groups  # where the module finds it: builders pass the config alone
    spec = default_layer_spec(model, vp_stage)
    if isinstance(spec, ModuleSpec):  # a layer: as a block, so that the final norm is part of it
        groups = getattr(transformer, "_pg_collection", None)  # which a Megatron-Bridge provider holds
        pp_rank = None if groups is None else groups.pp.rank()
        layers = get_num_layers_to_build(transformer, vp_stage=vp_stage, pp_rank=pp_rank)
        spec = TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=LayerNormImpl)
    spread: TransformerBlockSubmodules = with_context_parallelism(spec)
    return spread


def is_spread(config: TransformerConfig) -> bool:
    """Whether the layers of this model have our attention, as far as its spec has been asked for."""
    return hasattr(config, "attention2d_head_groups")


class Attention2DLayer(BaseTransformerLayer):
    """Builds the layer of this number that `attention2d_layer_spec` describes for the model's configuration.

    A class, since Megatron repeats a layer's spec only if its module is a class of layers; instances are of the layer
    that was chosen.
    """

    def __new__(
        cls, config: TransformerConfig, layer_number: int = 1, vp_stage: int | None = None, **kwargs: Any
    ) -> Any:
        """The layer, constructed with the arguments that Megatron hands to any layer.

        Raises:
            ValueError: the model asks for what would attend otherwise, is hybrid, or has layers of several kinds.
        """
        if "layer_type_list" in kwargs:
            raise ValueError(
                "hybrid_layer_pattern: --spec names a layer of GPTModel; choose megatron_attn2d.megatron.hybrid_spec "
                "attention2d_hybrid_stack_spec"
            )
        if config.heterogeneous_block_specs:
            raise ValueError(
                "heterogeneous_layers_config_path: this spec is of equal layers; choose "
                "megatron_attn2d.megatron.layer_spec attention2d_layer_spec"
            )
        groups = getattr(config, "attention2d_head_groups", 1)
        block = attention2d_layer_spec(config, vp_stage, head_groups=groups)
        layer = block.layer_specs[layer_number - 1]
        return build_module(layer, config=config, layer_number=layer_number, vp_stage=vp_stage, **kwargs)


attention2d_layer = ModuleSpec(module=Attention2DLayer)
"""The spec for callers that do not call it with a configuration; each layer looks at the one that it is built with."""


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


def _attending_in_context(init: Any) -> Any:
    """`MultiTokenPredictionBlock.__init__` with our attention in its layers where the model's own layers have it."""

    @functools.wraps(init)
    def build(self: Any, config: Any, spec: Any, *args: Any, **kwargs: Any) -> None:
        described = with_context_parallelism(spec) if is_spread(config) else spec
        init(self, config, described, *args, **kwargs)

    return build


ATTENDING_IN_CONTEXT = Patch(
    "megatron.core.transformer.multi_token_prediction:MultiTokenPredictionBlock.__init__",
    _attending_in_context,
    "builders describe the layers of multi-token prediction anew, whatever the spec of the other layers says",
)
"""Installed by the layer spec for a model with such layers, so that every launcher gets it."""
