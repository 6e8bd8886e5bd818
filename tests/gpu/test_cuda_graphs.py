"""Megatron's attention module in a CUDA graph: each replay drops other probabilities."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.megatron.test_core_attention import built
from tests.pool import RankPool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def replays(rank: int, te_tracker: bool) -> list[torch.Tensor]:
    """What two replays attend, on the same inputs."""
    from megatron.core.tensor_parallel import random

    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
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
def test_each_replay_drops_others(pool: RankPool, te_tracker: bool) -> None:
    if te_tracker:
        pytest.importorskip("transformer_engine.pytorch")
    [(first, second)] = pool.run(replays, 1, te_tracker, init_group=False)
    assert first.isfinite().all()
    assert (first != second).any()
