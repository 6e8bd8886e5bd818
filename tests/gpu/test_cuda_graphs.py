"""Megatron's attention module in a CUDA graph: replays drop other probabilities, and read totals of packs anew."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from tests.gpu.ranks import GpuRanks, start
from tests.megatron.test_core_attention import built

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def replays(rank: int, te_tracker: bool) -> list[torch.Tensor]:
    """What two replays attend, on the same inputs."""
    from megatron.core.tensor_parallel import random

    start()
    changes = {"cuda_graph_impl": "local", "cuda_graph_modules": [], "attention_dropout": 0.5}
    with built(1, None, None, params_dtype=torch.bfloat16, **changes) as module:
        random.model_parallel_cuda_manual_seed(
            1, te_rng_tracker=te_tracker, use_cudagraphable_rng=True, force_reset_rng=True
        )
        q, k, v = (torch.randn(64, 1, heads, 8, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            module(q, k, v, None)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        for state in random.get_all_rng_states().values():
            graph.register_generator_state(state)
        with torch.cuda.graph(graph):
            out = module(q, k, v, None)
        found = []
        for _ in range(2):
            graph.replay()
            found.append(out.float().cpu())
        graph.reset()
    return found


@pytest.mark.parametrize("te_tracker", [False, True])
def test_each_replay_drops_others(pool: GpuRanks, te_tracker: bool) -> None:
    if te_tracker:
        pytest.importorskip("transformer_engine.pytorch")
    [(first, second)] = pool.run(replays, 1, te_tracker, init_group=False)
    assert first.isfinite().all()
    assert (first != second).any()


PACKS = [((100, 60), (128, 64)), ((1, 37, 200), (8, 40, 208)), ((256,), (256,))]
"""Tokens of sequences and the places that they are padded to, for 256 tokens in four bins."""


def packed_replays(rank: int, ranks: int) -> list[float]:
    """How far replays, one for each of PACKS, are from calls that know the totals, over the largest value."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    start()
    tokens = 256
    changes = {"cuda_graph_impl": "local", "cuda_graph_modules": [], "kv_channels": 64}
    mode, sizes = ("attention2d", [1, ranks]) if ranks > 1 else (None, None)
    differences = []
    with built(ranks, mode, sizes, params_dtype=torch.bfloat16, **changes) as module:
        q, k, v = (
            torch.randn(tokens // ranks, heads, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
            for heads in (4, 2, 2)
        )
        dout = torch.randn(tokens // ranks, 4 * 64, device="cuda", dtype=torch.bfloat16)
        totals, padded = (torch.zeros(5, dtype=torch.int32, device="cuda") for _ in range(2))  # as while it warms up

        def call() -> list[torch.Tensor]:
            packing = PackedSeqParams("thd", totals, totals, padded, padded, max_seqlen_q=tokens, max_seqlen_kv=tokens)
            out = module(q, k, v, None, attn_mask_type=AttnMaskType.padding_causal, packed_seq_params=packing)
            return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            static = call()
        module.captured = False
        for lengths, places in PACKS:
            for bins, parts in ((totals, lengths), (padded, places)):
                ends = [*accumulate(parts)]
                bins[1:] = torch.tensor([*ends, *[ends[-1]] * (4 - len(ends))])
            graph.replay()
            differences += [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(static, call(), strict=True)]
        graph.reset()
    return differences


@pytest.mark.parametrize("ranks", [1, 2])
def test_replays_read_totals_of_packs(pool: GpuRanks, ranks: int) -> None:
    for differences in pool.run(packed_replays, ranks, ranks, init_group=False):
        assert max(differences) <= 2e-2, differences
