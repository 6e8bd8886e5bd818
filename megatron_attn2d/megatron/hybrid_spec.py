"""The layers of upstream's HybridModel (`--hybrid-layer-pattern`) with context-parallel attention in them.

`attention2d_hybrid_stack_spec` is what `--spec megatron_attn2d.megatron.hybrid_spec attention2d_hybrid_stack_spec`
names and what a `hybrid_stack_spec=` takes. With Transformer Engine it is upstream's own stack. Without it upstream has
none, so that the attention, latent-attention, MLP and MoE layers are halves of its local GPT layers, under the names
in the checkpoint that the stack of Transformer Engine has; Mamba and Gated DeltaNet need Transformer Engine.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_attn2d.errors import UsageError
from megatron_attn2d.megatron.layer_spec import with_context_parallelism


class RefusedLayer:
    """A layer that cannot be built; the pattern may do without it."""

    def __new__(cls, *args: Any, reason: str, **kwargs: Any) -> NoReturn:
        """Raises UsageError with the reason."""
        raise UsageError(f"hybrid_layer_pattern: {reason}")


def _refused(reason: str) -> ModuleSpec:
    return ModuleSpec(module=RefusedLayer, params={"reason": reason})


_SPARSE = _refused("D, sparse attention, chooses its keys from the whole sequence, which no rank has; choose * or +")


def _local_stack() -> ModuleSpec:
    dense = get_gpt_layer_local_submodules()
    latent = get_gpt_layer_local_submodules(multi_latent_attention=True)
    experts = get_gpt_layer_local_submodules(
        num_experts=8
    )  # any number: the layer takes its own from the configuration
    norm = WrappedTorchNorm  # of the kind that the configuration names, LayerNorm or RMSNorm
    missing = _refused("M and G, Mamba and Gated DeltaNet, need Transformer Engine, which is not installed")
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            mamba_layer=missing,
            gdn_layer=missing,
            dsa_layer=_SPARSE,
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=norm,
                    self_attention=dense.self_attention,
                    self_attn_bda=dense.self_attn_bda,
                    sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
                ),
            ),
            mla_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=norm,
                    self_attention=latent.self_attention,
                    self_attn_bda=latent.self_attn_bda,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=norm,
                    mlp=dense.mlp,
                    mlp_bda=dense.mlp_bda,
                    sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
                ),
            ),
            moe_layer=ModuleSpec(
                module=MoETransformerLayer,
                submodules=TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=experts.mlp, mlp_bda=experts.mlp_bda),
            ),
            mtp_block_spec=ModuleSpec(
                module=MultiTokenPredictionBlock,
                submodules=MultiTokenPredictionBlockSubmodules(
                    layer_specs=[get_mtp_layer_spec(None, use_transformer_engine=False)]
                ),
            ),
        ),
    )


def _stack_of_transformer_engine() -> ModuleSpec:
    submodules = dataclasses.replace(hybrid_stack_spec.submodules, dsa_layer=_SPARSE)
    return dataclasses.replace(hybrid_stack_spec, submodules=submodules)


attention2d_hybrid_stack_spec: ModuleSpec = with_context_parallelism(
    _stack_of_transformer_engine() if HAVE_TE else _local_stack()
)
