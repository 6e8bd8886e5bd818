"""Each field of TransformerConfig that touches attention is read by our modules, or it says here why it need not be."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from types import ModuleType
from typing import Any

import pytest

_INFERENCE = "inference, which has no context parallelism"
_AROUND = "of the layers around core attention"
_OTHER_SPEC = "another core attention, which with_context_parallelism refuses"
_OTHER_LAYER = "of layers without softmax attention"
_FP32 = "our kernels take the softmax in fp32 whatever it says"
_GRAPHS = "how Megatron captures, whatever is captured"

ELSEWHERE = {
    "apply_query_key_layer_scaling": "scales scores down and up again, so that fp16 holds them; " + _FP32,
    "attention_output_gate": _AROUND,
    "attention_softmax_in_fp32": _FP32,
    "bf16": "q, k and v say their dtype",
    "cuda_graph_retain_backward_graph": _GRAPHS,
    "cuda_graph_scope": "an older name, which the configuration moves to cuda_graph_impl and cuda_graph_modules",
    "cuda_graph_use_single_mempool": _GRAPHS,
    "cuda_graph_warmup_steps": _GRAPHS,
    "delay_offload_until_cuda_graph": _GRAPHS,
    "dsa_indexer_head_dim": _OTHER_SPEC,
    "dsa_indexer_n_heads": _OTHER_SPEC,
    "enable_cuda_graph": "an older name, which the configuration moves to cuda_graph_impl",
    "ep_overlap_early_attn_memory_release": _AROUND,
    "experimental_attention_variant": _OTHER_SPEC,
    "experimental_attention_variant_loss_scale_func": _OTHER_SPEC,
    "external_cuda_graph": "an older name, which the configuration moves to cuda_graph_impl",
    "flash_attention_version": "of Transformer Engine's kernels; ours are chosen by what they serve (choose_kernel)",
    "fp16": "q, k and v say their dtype",
    "inference_cuda_graph_scope": _INFERENCE,
    "kitchen_attention_backend": _OTHER_SPEC,
    "linear_attention_freq": _OTHER_LAYER,
    "linear_key_head_dim": _OTHER_LAYER,
    "linear_num_key_heads": _OTHER_LAYER,
    "linear_num_value_heads": _OTHER_LAYER,
    "linear_value_head_dim": _OTHER_LAYER,
    "mamba_head_dim": _OTHER_LAYER,
    "mamba_num_heads": _OTHER_LAYER,
    "masked_softmax_fusion": "of a kernel that we don't have",
    "moe_pad_experts_for_cuda_graph_inference": _INFERENCE,
    "moe_router_pre_softmax": "of the router",
    "mtp_detach_heads": _AROUND,
    "mup_attn_scale_power": "becomes softmax_scale in the configuration",
    "mup_base_head_dim": "becomes softmax_scale in the configuration",
    "qk_clip_alpha": "says nothing without qk_clip, which is refused",
    "qk_clip_threshold": "says nothing without qk_clip, which is refused",
    "qk_head_dim": "handed over as k_channels",
    "qk_l2_norm": _AROUND,
    "qk_layernorm": _AROUND,
    "qk_pos_emb_head_dim": "handed over as k_channels",
    "sequence_parallel": "attention comes after the gather over tensor ranks",
    "use_kitchen_attention": _OTHER_SPEC,
    "v_head_dim": "handed over as v_channels",
}
"""The fields that touch attention and that our modules don't read, and why not."""

_NAMES = re.compile(
    r"att(n|ention)|softmax|(^|_)qk_|window|context_parallel|^cp_|logit|fp8_(dot|multi)|cuda_graph|deterministic|invariant"
    "|head|kv_channels"
)


def fields() -> set[str]:
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    return {field.name for field in dataclasses.fields(MLATransformerConfig)}


def read_in(source: ModuleType, name: str | None = None) -> set[str]:
    """Fields that a module of Python, or its class `name`, reads as an attribute or by a string."""
    tree: ast.AST = ast.parse(inspect.getsource(source))
    if name is not None:  # of a class that is defined twice, once without Transformer Engine, the last
        [*_, tree] = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name]
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found |= {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return found & fields()


def test_each_field_that_touches_attention_has_a_verdict() -> None:
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import dot_product_attention

    from megatron_attn2d.megatron import core_attention, cuda_graphs, layer_grid, refusals

    upstreams = read_in(transformer_engine, "TEDotProductAttention")
    upstreams |= read_in(dot_product_attention, "DotProductAttention")
    touching = upstreams | {name for name in fields() if _NAMES.search(name)}
    unread = touching - set().union(*map(read_in, (core_attention, cuda_graphs, layer_grid, refusals)))
    assert unread == set(ELSEWHERE)


SWITCHES: dict[str, tuple[dict[str, Any], str]] = {
    "FP8 attention": (
        {"fp8_dot_product_attention": True},
        "asks for attention in FP8, and ours computes in bf16",
    ),
    "FP8 attention, fed by FP8 layers": (
        {"fp8_multi_head_attention": True},
        "FP8 in linear layers is fine",
    ),
    "batch invariance": (
        {"batch_invariant_mode": True, "attention_backend": "flash", "flash_attention_version": 3},
        "kernels of Megatron's own attention; choose deterministic_mode",
    ),
    "determinism that torch does not know of": (
        {"deterministic_mode": True},
        "deterministic_mode without torch.use_deterministic_algorithms(True), by which kernels are chosen, is not",
    ),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_that_would_be_ignored_is_refused(switch: str) -> None:
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_attn2d.megatron.core_attention import _refuse_unsupported

    changes, message = SWITCHES[switch]
    if "attention_backend" in changes:
        changes = changes | {"attention_backend": AttnBackend[changes["attention_backend"]]}
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, **{"attention_dropout": 0.0, **changes}
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        _refuse_unsupported(config, "self")
