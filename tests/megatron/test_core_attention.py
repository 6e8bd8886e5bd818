"""The module that Megatron builds: on Megatron's own groups, against the dense reference; refusals by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.attention.dense import dense_gradients, inputs, zigzag
from tests.pool import RankPool


@contextmanager
def built(cp: int, mode: str | None, sizes: list[int] | None, **changes: Any) -> Iterator[Any]:
    """The core attention of a two-layer model, on Megatron's groups, which end with the block."""
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_attn2d.megatron.core_attention import ContextParallelAttention

    parallel_state.initialize_model_parallel(context_parallel_size=cp, hierarchical_context_parallel_sizes=sizes)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        context_parallel_size=cp,
        **{"num_attention_heads": 4, "num_query_groups": 2, "attention_dropout": 0.0, **changes},
    )
    try:
        yield ContextParallelAttention(config, 1, AttnMaskType.causal, "self", cp_comm_type=mode)
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state._HIERARCHICAL_CONTEXT_PARALLEL_GROUPS = None  # upstream keeps them


def errors(rank: int, cp: int, cp_comm_type: str | None, sizes: list[int] | None) -> float:
    from megatron.core import parallel_state

    with built(cp, cp_comm_type, sizes) as module:
        assert list(module.parameters()) == []
        whole = inputs(6 * cp, 2, (4, 2), dims=(8, 8))
        mine = zigzag(6 * cp, cp, parallel_state.get_context_parallel_rank())
        q, k, v = (x[mine].requires_grad_() for x in whole[:3])
        out = module(q, k, v, None).unflatten(2, (4, 8))
        results = (out, *torch.autograd.grad(out, (q, k, v), whole[3][mine]))
    return max((a - b[mine]).abs().max().item() for a, b in zip(results, dense_gradients(*whole, True), strict=True))


@pytest.mark.parametrize(
    ("ranks", "cp", "cp_comm_type", "sizes"),
    [
        (1, 1, None, None),
        (4, 4, "attention2d", [2, 2]),
        (4, 4, "attention2d", [1, 4]),
        (4, 4, "attention2d", [4, 1]),
        (6, 6, "attention2d", [2, 3]),
        (8, 4, "attention2d", [2, 2]),  # two data-parallel replicas
        (4, 4, "p2p", None),
        (4, 4, "all_gather", None),
        (4, 4, "a2a", None),
        (4, 4, "attention2d", [2, 2, 1]),
        (8, 8, "attention2d", [2, 2, 2]),
        (8, 8, "attention2d", [4, 1, 2]),
        (8, 8, "attention2d", [2, 2, 2, 1]),
        (4, 4, "attention2d", [1, 2, 2, 1]),
        (8, 8, "attention2d", [2, 1, 2, 2, 1]),
    ],
)
def test_against_dense(pool: RankPool, ranks: int, cp: int, cp_comm_type: str | None, sizes: list[int] | None) -> None:
    assert max(pool.run(errors, ranks, cp, cp_comm_type, sizes)) <= 1e-12


def refusal(
    rank: int, cp_comm_type: str | None, sizes: list[int] | None, changes: dict[str, Any], call: dict[str, Any]
) -> str:
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType

    if "attention_backend" in changes:
        changes = {"attention_backend": AttnBackend[changes["attention_backend"]]}
    try:
        with built(2, cp_comm_type, sizes, **changes) as module:
            if "attn_mask_type" in call:
                call = {"attn_mask_type": AttnMaskType[call["attn_mask_type"]]}
            q = torch.zeros(4, 1, 4, 8)
            module(q, q, q, None, **call)
    except ValueError as error:
        return str(error)
    return ""


REFUSALS = [
    (
        "a2a+p2p",
        None,
        {},
        {},
        "cp_comm_type 'a2a+p2p' (context_parallel.mode) is not served without Transformer Engine: choose",
    ),
    (None, None, {}, {}, "cp_comm_type None"),
    ("attention2d", None, {}, {}, "needs its grid: pass --hierarchical-context-parallel-sizes R C"),
    ("attention2d", [2, 1, 1, 1, 1, 1], {}, {}, "needs its grid"),
    (
        "a2a",
        None,
        {"num_attention_heads": 3, "num_query_groups": 3, "kv_channels": 8},
        {},
        "3 query heads don't divide",
    ),
    ("attention2d", [2, 1], {"attention_dropout": 0.1}, {}, "attention_dropout 0.1 is not supported"),
    ("attention2d", [2, 1], {"window_size": (4, 0)}, {}, "window_size (4, 0) is not supported"),
    ("attention2d", [2, 1], {"softmax_type": "off-by-one"}, {}, "softmax_type 'off-by-one' is not supported"),
    (
        "attention2d",
        [2, 1],
        {"log_max_attention_logit": True},
        {},
        "qk_clip / log_max_attention_logit is not supported",
    ),
    (
        "attention2d",
        [2, 1],
        {"cp_comm_type": ["attention2d", "a2a+p2p"]},
        {},
        "cp_comm_type a2a+p2p on one layer and attention2d on another is not supported by context-parallel attention: "
        "use one of the two, as both would take --hierarchical-context-parallel-sizes",
    ),
    (
        "attention2d",
        [2, 1],
        {"hybrid_context_parallel": True},
        {},
        "hybrid_context_parallel (dynamic context parallelism) is not supported by context-parallel attention: use "
        "context-parallel groups that stay the same",
    ),
    ("p2p", None, {"attention_backend": "local"}, {}, "attention_backend local, with which Megatron replaces it by"),
    ("p2p", None, {}, {"packed_seq_params": object()}, "packed sequences (THD) are not supported yet"),
    ("p2p", None, {}, {"attention_bias": torch.zeros(1)}, "attention bias is not supported"),
    (
        "p2p",
        None,
        {},
        {"attn_mask_type": "arbitrary"},
        "attention mask arbitrary is not supported: choose causal or no_mask",
    ),
]


@pytest.mark.parametrize(("cp_comm_type", "sizes", "changes", "call", "message"), REFUSALS)
def test_refusals(
    pool: RankPool, cp_comm_type: str | None, sizes: list[int] | None, changes: dict, call: dict, message: str
) -> None:
    for found in pool.run(refusal, 2, cp_comm_type, sizes, changes, call):
        assert message in found


def without_hierarchical_groups(rank: int, mode: str) -> str:
    """What an attention says to process groups that were made without Megatron's global state."""
    import torch.distributed as dist
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_attn2d.megatron.core_attention import ContextParallelAttention

    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.0, context_parallel_size=2
    )
    groups = ProcessGroupCollection(cp=dist.group.WORLD, hcp=None)
    try:
        ContextParallelAttention(config, 1, AttnMaskType.causal, "self", cp_comm_type=mode, pg_collection=groups)
    except ValueError as error:
        return str(error)
    return ""


def test_decentralised_groups_serve_the_modes_without_a_grid(pool: RankPool) -> None:
    message = "which decentralised process groups don't have: set use_decentralized_pg=False (Megatron-Bridge's"
    assert all(message in found for found in pool.run(without_hierarchical_groups, 2, "attention2d"))
    for mode in ("p2p", "all_gather", "a2a"):
        assert pool.run(without_hierarchical_groups, 2, mode) == [""] * 2
