"""The layer spec: upstream's own, with our attention in it everywhere, or a refusal."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.megatron.combinations import MODELS
from tests.megatron.runs import arguments
from tests.pool import RankPool

SPEC = ["megatron_attn2d.megatron.layer_spec", "attention2d_layer_spec"]
HYBRID_SPEC = ["megatron_attn2d.megatron.hybrid_spec", "attention2d_hybrid_stack_spec"]
LATENT = {**MODELS["mla"], "num_layers": None}
MIXTURE = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 64, "disable_bias_linear": True}


def config(**options: Any) -> Any:
    """A transformer's configuration."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, transformer_impl="local", **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"spec": SPEC},
        MIXTURE,
        {"normalization": "RMSNorm", "qk_layernorm": True, "swiglu": True},
        {"num_layers_per_virtual_pipeline_stage": 1, "pipeline_model_parallel_size": 2},
        {**MIXTURE, "num_layers_per_virtual_pipeline_stage": 1, "pipeline_model_parallel_size": 2},
        {"num_layers": 3, "mtp_num_layers": 1},
        {"num_layers": None, "hybrid_layer_pattern": "*-*-*-*-"},
        {"num_layers": None, "hybrid_layer_pattern": "*E*E*E*-", **MIXTURE},
        {"num_layers": None, "hybrid_layer_pattern": "**-/*-/*-", "spec": HYBRID_SPEC},
        {"num_layers": None, "hybrid_layer_pattern": "+-+-+-+-", **LATENT},
    ],
    ids=[
        *("dense", "--spec", "MoE", "norms", "virtual stages", "MoE, virtual stages", "MTP"),
        *("hybrid", "hybrid, MoE", "hybrid, MTP, --spec", "hybrid, MLA"),
    ],
)
def test_every_layer_of_every_kind_of_model_gets_our_attention(
    options: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    nranks = options.get("pipeline_model_parallel_size", 1)
    ranks = pool.run(_modules, nranks, arguments(run_dir=tmp_path, mock_data=True, **options))
    kinds = [kind for rank in ranks for kind in rank]
    assert kinds.count("ContextParallelAttention") == 4
    assert "DotProductAttention" not in kinds


def test_a_bare_transformer_config_stands_for_its_model() -> None:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from megatron_attn2d.megatron import layer_spec

    with mock.patch.object(layer_spec, "get_num_layers_to_build", return_value=4):
        spec = layer_spec.attention2d_layer_spec(config())
    assert isinstance(spec, TransformerBlockSubmodules)
    assert spec.layer_norm is layer_spec.SequenceParallelTorchNorm
    assert len(spec.layer_specs) == 4
    for layer in spec.layer_specs:
        assert layer.submodules.self_attention.submodules.core_attention is layer_spec.CoreAttention
        assert layer.submodules.input_layernorm is layer_spec.SequenceParallelTorchNorm


def test_the_spec_of_multi_latent_attention_is_replaced_too() -> None:
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_attn2d.megatron import layer_spec

    transformer = MLATransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, transformer_impl="local")
    with mock.patch.object(layer_spec, "get_num_layers_to_build", return_value=1):
        [layer] = layer_spec.attention2d_layer_spec(transformer).layer_specs
    assert layer.submodules.self_attention.submodules.core_attention is layer_spec.CoreAttention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_backend": "local"}, "attention_backend local"),
        ({"use_transformer_engine_full_layer_spec": True}, "use_transformer_engine_full_layer_spec"),
    ],
    ids=str,
)
def test_what_would_attend_otherwise_is_refused(options: dict[str, Any], message: str) -> None:
    from megatron.core.transformer.enums import AttnBackend

    from megatron_attn2d.megatron.layer_spec import attention2d_layer_spec

    if "attention_backend" in options:
        options = {"attention_backend": AttnBackend[options["attention_backend"]]}
    with pytest.raises(ValueError, match=message):
        attention2d_layer_spec(provider(**options))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_provider_of_megatron_bridge_stands_for_its_model(stage: int) -> None:
    """With groups of its own, from which the stage comes, and multi-token prediction, whose layers it makes of ours."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.training.models import gpt

    from megatron_attn2d.megatron import layer_spec

    groups = SimpleNamespace(pp=SimpleNamespace(rank=lambda: stage))
    uneven = {
        "pipeline_model_parallel_size": 2,
        "pipeline_dtype": torch.float32,
        "num_layers_in_first_pipeline_stage": 1,
    }
    given = provider(**uneven, cp_comm_type="p2p", mtp_num_layers=1, provide=None, _pg_collection=groups)
    assert len(layer_spec.attention2d_layer_spec(given).layer_specs) == (1, 3)[stage]
    given.restore_modelopt_state, given.use_arbitrary_attention_mask = True, False
    block = TransformerBlockSubmodules(layer_specs=[])
    with mock.patch.object(gpt, "get_gpt_modelopt_spec", return_value=block) as quantised:
        assert layer_spec.attention2d_layer_spec(given).layer_specs == []
    assert quantised.call_args.kwargs["use_arbitrary_attention_mask"] is False


def provider(**options: Any) -> Any:
    """A configuration with the fields that Megatron-Bridge's GPTModelProvider has besides, where they are given."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    given = config(**{name: value for name, value in options.items() if name in fields})
    vars(given).update({name: value for name, value in options.items() if name not in fields})
    return given


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"layer_type_list": ["*"]}, "hybrid_layer_pattern: .* attention2d_hybrid_stack_spec"),
        ({"heterogeneous_block_specs": True}, {}, "heterogeneous_layers_config_path: .* attention2d_layer_spec"),
    ],
)
def test_a_spec_that_nobody_calls_refuses_other_models(
    changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    from megatron.core.transformer.spec_utils import build_module

    from megatron_attn2d.megatron.layer_spec import attention2d_layer

    with pytest.raises(ValueError, match=message):
        build_module(attention2d_layer, config(**changes), **arguments)


def test_an_unknown_core_attention_is_refused() -> None:
    from megatron.core.transformer.attention import SelfAttentionSubmodules

    from megatron_attn2d.megatron.layer_spec import with_context_parallelism

    with pytest.raises(ValueError, match=r"core attention <class 'torch.nn.*Identity'> can't be replaced"):
        with_context_parallelism(
            SelfAttentionSubmodules(linear_qkv=None, core_attention=torch.nn.Identity, linear_proj=None)
        )


@pytest.mark.parametrize(
    ("transformer_engine", "given", "configured", "chosen"),
    [
        (False, "p2p", "p2p", "ours"),
        (False, None, "p2p", "ours"),
        (True, "p2p", "p2p", "theirs"),
        (True, "all_gather", "all_gather", "theirs"),
        (True, "attention2d", "attention2d", "ours"),
        (True, None, "attention2d", "ours"),
        (True, None, None, "theirs"),
        (True, None, ["p2p", "attention2d"], "ours"),
        (True, None, ["p2p", "attention2d:4x2"], "ours"),
        (True, None, ["attention2d", "p2p"], "theirs"),
    ],
)
def test_transformer_engine_keeps_its_own_modes(
    transformer_engine: bool, given: str | None, configured: str | list[str] | None, chosen: str
) -> None:
    from megatron_attn2d.megatron import layer_spec

    with (
        mock.patch.object(layer_spec, "HAVE_TE", transformer_engine),
        mock.patch.object(layer_spec, "introduce"),
        mock.patch.object(layer_spec, "ContextParallelAttention", return_value="ours"),
        mock.patch.object(layer_spec, "TEDotProductAttention", return_value="theirs"),
    ):
        transformer: Any = SimpleNamespace(cp_comm_type=configured, attention_dropout=0.0, kv_channels=16)
        built: Any = layer_spec.CoreAttention(config=transformer, layer_number=2, cp_comm_type=given)
    assert built == chosen


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_torchs_norm_is_marked_for_the_sum_over_the_tensor_parallel_ranks(
    normalization: str, sequence_parallel: bool
) -> None:
    from megatron_attn2d.megatron.layer_spec import SequenceParallelTorchNorm

    transformer = config(normalization=normalization, sequence_parallel=sequence_parallel, tensor_model_parallel_size=2)
    norm: Any = SequenceParallelTorchNorm(transformer, hidden_size=64, eps=1e-5)
    assert isinstance(norm, getattr(torch.nn, normalization))
    assert [parameter.sequence_parallel for parameter in norm.parameters()] == [sequence_parallel] * len(
        list(norm.parameters())
    )
    assert transformer.sequence_parallel == sequence_parallel


def test_upstreams_norm_still_refuses_sequence_parallelism() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    with pytest.raises(AssertionError, match="sequence parallel not supported"):
        WrappedTorchNorm(config(sequence_parallel=True, tensor_model_parallel_size=2), hidden_size=64)


def _modules(rank: int, args: list[str]) -> list[str]:
    """The class names of the modules of this rank's model."""
    from megatron.training import training

    from megatron_attn2d.training import pretrain_gpt

    names: list[str] = []

    def instead_of_training(step: Any, model: Any, *rest: Any, **kwargs: Any) -> tuple[int, int]:
        names.extend(type(module).__name__ for chunk in model for module in chunk.modules())
        return 0, 0

    with mock.patch.object(training, "train", instead_of_training):
        pretrain_gpt.main(args)
    return names
