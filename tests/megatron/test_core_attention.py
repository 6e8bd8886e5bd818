"""The module that Megatron builds: on Megatron's own groups, against the dense reference; refusals by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.attention.dense import dense_gradients, hidden, inputs, packed_zigzag, zigzag
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
        (4, 4, "attention2d", None),  # the grid with the fewest bytes
        (8, 4, "attention2d:1x4", None),  # on each replica's own group
        (8, 8, "attention2d:2x2x2", None),
        (8, 8, "attention2d:4x2/2x1", None),
        (4, 4, "attention2d:2x2", [2, 2]),
        (8, 8, "attention2d:2x4/2x2", [2, 2, 1, 2]),
    ],
)
def test_against_dense(pool: RankPool, ranks: int, cp: int, cp_comm_type: str | None, sizes: list[int] | None) -> None:
    assert max(pool.run(errors, ranks, cp, cp_comm_type, sizes)) <= 1e-12


def packing(**changes: Any) -> Any:
    """Megatron's parameters of packed sequences, of 8 tokens if nothing else is said."""
    from megatron.core.packed_seq_params import PackedSeqParams

    params: dict[str, Any] = {"qkv_format": "thd", "cu_seqlens_q": [0, 4, 8], "cu_seqlens_kv": [0, 4, 8], **changes}
    tensors = {k: torch.tensor(v, dtype=torch.int32) if isinstance(v, list) else v for k, v in params.items()}
    return PackedSeqParams(**tensors)


def packed_error(rank: int, cp_comm_type: str, sizes: list[int] | None) -> float:
    """Padding between packed sequences: against each sequence alone."""
    with built(4, cp_comm_type, sizes) as module:
        q, k, v, dout = (x.squeeze(1) for x in inputs(32, 1, (4, 2)))
        mine = packed_zigzag([8, 24], 4, rank)
        params = packing(
            cu_seqlens_q=[0, 7, 27],
            cu_seqlens_kv=[0, 7, 27],
            cu_seqlens_q_padded=[0, 8, 32],
            cu_seqlens_kv_padded=[0, 8, 32],
        )
        own = [x[mine].requires_grad_() for x in (q, k, v)]
        out = module(*own, None, packed_seq_params=params).unflatten(1, (4, 8))
        found = (out, *torch.autograd.grad(out, own, dout[mine]))
    expected = [torch.zeros_like(x) for x in (dout, q, k, v)]
    for alone in (slice(0, 7), slice(8, 28)):
        results = dense_gradients(*(x[alone].unsqueeze(1) for x in (q, k, v, dout)), True)
        for whole, result in zip(expected, results, strict=True):
            whole[alone] = result.squeeze(1)
    return max((a - b[mine]).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("cp_comm_type", "sizes"), [("attention2d", [2, 2]), ("p2p", None), ("a2a", None)])
def test_packed_sequences(pool: RankPool, cp_comm_type: str, sizes: list[int] | None) -> None:
    assert max(pool.run(packed_error, 4, cp_comm_type, sizes)) <= 1e-12


def upstream_error(rank: int, changes: dict[str, Any]) -> tuple[float, bool]:
    """Against Megatron's own attention without context parallelism: largest error, and whether checkpoints agree."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_attn2d.megatron.upstream import cpu

    whole = inputs(16, 2, (4, 2), dtype=torch.float32)
    unseen = hidden(16, 16, True, changes.get("window_size", (-1, -1)))
    with cpu.seam(), built(1, None, None, **changes) as ours:
        model_parallel_cuda_manual_seed(1)  # upstream draws for dropout, whatever its rate
        theirs = DotProductAttention(ours.config, 1, AttnMaskType.causal, "self")
        theirs.load_state_dict(ours.state_dict())
        results, states = [], []
        for module in (ours, theirs):
            leaves = [x.clone().requires_grad_() for x in whole[:3]]
            out = module(*leaves, unseen)
            wanted = [*leaves, *module.parameters()]
            results.append((out, *torch.autograd.grad(out, wanted, whole[3].flatten(2))))
            metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
            tensors = module.sharded_state_dict("core.", (), metadata)
            states.append({key: (x.global_shape, x.global_offset, x.dtype) for key, x in tensors.items()})
    error = max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
    return error, states[0] == states[1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window_size": (5, 0)},
        {"window_size": (5, 0), "window_attn_skip_freq": 2},
        {"softmax_type": "off-by-one"},
        {"softmax_type": "learnable", "init_method_std": 2.0},
        {"softmax_type": "learnable", "init_method_std": 2.0, "window_size": (3, 0)},
    ],
    ids=str,
)
def test_it_is_upstreams_attention(pool: RankPool, changes: dict[str, Any]) -> None:
    for error, same_checkpoints in pool.run(upstream_error, 1, changes):
        assert error <= 2e-6
        assert same_checkpoints


def test_a_graph_gets_totals_as_they_are() -> None:
    """Its replays find other numbers in the same tensors; without graphs they are read once for all layers."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_attn2d.megatron.core_attention import _totals

    with FakeTensorMode():
        totals = torch.empty(4, dtype=torch.int32, device="cuda")
        found = _totals(PackedSeqParams("thd", totals, totals, max_seqlen_q=64), read=False)
    assert found["cu_seqlens"].device.type == "cuda"
    assert (found["cu_seqlens_padded"], found["max_seqlen"]) == (None, 64)
    totals = torch.tensor([0, 8, 64])
    found = _totals(PackedSeqParams("thd", totals, totals, totals, totals, max_seqlen_q=64), read=True)
    assert found == {"cu_seqlens": [0, 8, 64], "cu_seqlens_padded": [0, 8, 64]}


def windows(rank: int, freq: Any) -> list[Any]:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_attn2d.megatron.core_attention import ContextParallelAttention

    with built(1, None, None, window_size=(5, 0), window_attn_skip_freq=freq) as module:
        layers = [ContextParallelAttention(module.config, n, AttnMaskType.causal, "self") for n in (1, 2)]
    return [layer.window for layer in layers]


@pytest.mark.parametrize(
    ("freq", "expected"), [(None, [(5, 0), (5, 0)]), (2, [(5, 0), None]), ([0, 1], [None, (5, 0)])], ids=str
)
def test_windows_are_those_of_the_layer(pool: RankPool, freq: Any, expected: list[Any]) -> None:
    assert pool.run(windows, 1, freq) == [expected]


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
            if "packing" in call:
                call, q = {"packed_seq_params": packing(**call["packing"])}, q.squeeze(1)
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
    ("attention2d", [2, 1, 1, 1, 1, 1], {}, {}, "are no grid: choose R C or U R C"),
    ("attention2d:2x1", [1, 2], {}, {}, "sizes [1, 2] (a grid of 1x2) differ: leave one of them out"),
    ("attention2d:2x2", None, {}, {}, "a grid of 2x2 covers 4 ranks and the context-parallel group has 2"),
    ("attention2d", None, {"hierarchical_context_parallel_sizes": [4, 2]}, {}, "a grid of 4x2 covers 8 ranks"),
    ("attention2d:2", None, {}, {}, "cp_comm_type 'attention2d:2' is no mode: choose attention2d, attention2d:RxC"),
    ("attention2d:0x2", None, {}, {}, "is no mode"),
    ("p2p:2x1", None, {}, {}, "cp_comm_type 'p2p:2x1' is no mode"),
    (
        "a2a",
        None,
        {"num_attention_heads": 3, "num_query_groups": 3, "kv_channels": 8},
        {},
        "3 query heads don't divide",
    ),
    (
        "attention2d",
        [2, 1],
        {"log_max_attention_logit": True},
        {},
        "log_max_attention_logit is not supported by context-parallel attention: it needs",
    ),
    (
        "attention2d",
        [2, 1],
        {"cp_comm_type": ["attention2d", "a2a+p2p"]},
        {},
        "cp_comm_type a2a+p2p on one layer and attention2d on another is not supported by context-parallel attention: "
        "use one of the two, as both would take --hierarchical-context-parallel-sizes",
    ),
    ("p2p", None, {}, {"packing": {"qkv_format": "sbhd"}}, "qkv_format 'sbhd' is not supported: choose thd"),
    ("p2p", None, {}, {"packing": {"local_cp_size": 1}}, "packed_seq_params.cp_group (dynamic context parallelism)"),
    ("p2p", None, {}, {"packing": {"cu_seqlens_q": None}}, "packed_seq_params.cu_seqlens_q is missing"),
    ("p2p", None, {}, {"packing": {"cu_seqlens_kv": [0, 4]}}, "cu_seqlens_q and cu_seqlens_kv differ"),
    (
        "p2p",
        None,
        {"mtp_num_layers": 1},
        {"packing": {"cu_seqlens_q_padded": [0, 16], "cu_seqlens_kv_padded": [0, 16]}},
        "packed sequences with padding are not supported with mtp_num_layers: multi-token prediction would",
    ),
    (
        "p2p",
        None,
        {},
        {"packing": {"cu_seqlens_q": [0, 6, 8], "cu_seqlens_kv": [0, 6, 8]}},
        "packed sequence 0 takes 6 tokens, no multiple of 2 * cp = 4: pad it to 8 (cu_seqlens_padded) or cut it to 4",
    ),
    (
        "attention2d",
        [2, 1],
        {"hybrid_context_parallel": True},
        {},
        "hybrid_context_parallel is not supported by context-parallel attention: it changes the context-parallel group "
        "with every batch, and a grid is laid once; leave it out",
    ),
    ("p2p", None, {"attention_backend": "local"}, {}, "attention_backend local is not supported by context-parallel"),
    (
        "attention2d",
        [2, 1],
        {},
        {"packing": {"cu_seqlens_q": [0, 12], "cu_seqlens_kv": [0, 12]}},
        "packed sequences take 12 of 8 tokens",
    ),
    ("p2p", None, {}, {"attn_mask_type": "padding_causal"}, "attention mask padding_causal is not supported"),
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


def started_by_a_stock_launch(rank: int, **arguments: Any) -> str:
    """What an attention says to the arguments of Megatron's own launch."""
    from argparse import Namespace
    from unittest import mock

    from megatron.training import global_vars

    with mock.patch.object(global_vars, "_GLOBAL_ARGS", Namespace(**arguments)):
        try:
            with built(torch.distributed.get_world_size(), "attention2d", None):
                return ""
        except ValueError as error:
            return str(error)


@pytest.mark.parametrize(
    ("ranks", "given", "said"),
    [
        (1, {"reset_attention_mask": False, "reset_position_ids": False}, ""),
        (1, {"reset_attention_mask": True}, "--reset-attention-mask, a mask for each sequence of the batch, is not"),
        (1, {"dataloader_inter_document_masking": True}, ""),
        (2, {"dataloader_inter_document_masking": True}, "--dataloader-inter-document-masking, whose documents don't"),
        (1, {"reset_position_ids": True, "position_embedding_type": "learned_absolute"}, ""),
        (1, {"reset_position_ids": True, "position_embedding_type": "rope"}, "--reset-position-ids, which only"),
    ],
)
def test_what_a_stock_launch_asks_of_the_data_is_served_or_refused(
    ranks: int, given: dict[str, Any], said: str, pool: RankPool
) -> None:
    for found in pool.run(started_by_a_stock_launch, ranks, **given):
        assert found.startswith(said)
        assert bool(found) == bool(said)


def test_upstream_still_rotates_documents_as_if_each_were_spread_over_the_ranks() -> None:
    """If not, --dataloader-inter-document-masking may be served in a stock launch."""
    from types import SimpleNamespace

    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

    half, group = torch.zeros(8, 1, 4), SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    documents = torch.tensor([0, 5, 16], dtype=torch.int32)  # of 16 tokens, of which a rank holds 8
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        _apply_rotary_pos_emb_thd(half, documents, torch.zeros(11, 1, 1, 4), cp_group=group)


def captured(rank: int, shell: dict[str, str], **changes: Any) -> str:
    """What an attention in CUDA graphs says to these environment variables, and in training."""
    import os
    from unittest import mock

    clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name and "NCCL" not in name}
    with mock.patch.dict(os.environ, clean | shell, clear=True):
        try:
            with built(1, None, None, cuda_graph_impl="local", cuda_graph_modules=[], **changes) as module:
                x = torch.zeros(4, 1, 4, 8)
                module(x, x, x, None)
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("shell", "changes", "message"),
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NCCL_GRAPH_REGISTER": "0"}, {}, ""),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            {},
            "cuda_graph_impl 'local' around attention: NCCL_GRAPH_REGISTER=(not set): NCCL would register",
        ),
        (
            {},
            {"attention_dropout": 0.1},
            "attention_dropout 0.1 under cuda_graph_impl 'local': each replay would drop the same probabilities; set "
            "use_te_rng_tracker",
        ),
    ],
)
def test_cuda_graphs_where_they_would_hang_or_repeat_themselves(
    pool: RankPool, shell: dict[str, str], changes: dict[str, Any], message: str
) -> None:
    [found] = pool.run(captured, 1, shell, **changes)
    assert found.startswith(message)
    assert bool(found) == bool(message)


def decentralised(rank: int, mode: str) -> tuple[float, bool]:
    """An attention on process groups that were made without Megatron's global state: its error, and whether two layers
    share a grid."""
    import torch.distributed as dist
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_attn2d.megatron.core_attention import ContextParallelAttention

    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, attention_dropout=0.0, context_parallel_size=2
    )
    groups = ProcessGroupCollection(cp=dist.group.WORLD, hcp=None, tp=dist.new_group([rank]))
    first, second = (
        ContextParallelAttention(config, layer, AttnMaskType.causal, "self", cp_comm_type=mode, pg_collection=groups)
        for layer in (1, 2)
    )
    whole = inputs(12, 2, (4, 4), dims=(8, 8))
    mine = zigzag(12, 2, rank)
    out = first(*(x[mine] for x in whole[:3]), None).unflatten(2, (4, 8))
    expected = dense_gradients(*whole, True)[0][mine]
    return (out - expected).abs().max().item(), first.grid is second.grid


def test_decentralised_groups(pool: RankPool) -> None:
    for mode in ("attention2d", "attention2d:1x2", "p2p", "all_gather", "a2a"):
        for error, shared in pool.run(decentralised, 2, mode):
            assert error <= 1e-12
            assert shared or not mode.startswith("attention2d")
