"""The command of a dry run for Megatron-LM; tests/megatron/test_ways_in.py runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_attn2d.config import load_run, megatron_arguments
from megatron_attn2d.preview.stock_launch import stock_launch

RUNS = Path(__file__).parents[2] / "configs" / "runs"


@pytest.mark.parametrize(
    ("run", "overrides", "parts"),
    [
        (
            "llama_8b_128k",
            ["model.kind=gpt", "context_parallel.head_groups=2", "environment.variables={NCCL_DEBUG: WARN}"],
            [
                "train alone has them: --attention2d-head-groups --peak-tflops --run-dir\n"
                "env NCCL_DEBUG=WARN CUDA_DEVICE_MAX_CONNECTIONS=1 \\\n"
                "  torchrun --nproc-per-node 8 --nnodes 8 --rdzv-backend c10d --rdzv-endpoint HOST_OF_NODE_0:29500 \\\n"
                "  pretrain_gpt.py \\\n"
                "  --spec megatron_attn2d.megatron.layer_spec attention2d_layer_spec \\\n",
                "  --cp-comm-type attention2d:2x8x1/2x1 \\\n",
            ],
        ),
        (
            "gpt3_125m_8k",
            ["model.kind=hybrid", "context_parallel.mode=ring"],
            [
                "  pretrain_hybrid.py \\\n",
                "  --spec megatron_attn2d.megatron.hybrid_spec attention2d_hybrid_stack_spec \\\n",
                f"  --hybrid-layer-pattern '{'*-' * 12}' \\\n",
                "  --cp-comm-type p2p \\\n",
            ],
        ),
        (
            "gpt3_125m_8k",
            ["data.document_masking=true"],
            ["none: Megatron-LM's scripts do not train with data.document_masking"],
        ),
    ],
)
def test_what_it_holds(run: str, overrides: list[str], parts: list[str]) -> None:
    loaded = load_run(RUNS / f"{run}.yaml", overrides)
    printed = stock_launch(loaded, megatron_arguments(loaded))
    for part in parts:
        assert part in printed
    assert "--hierarchical-context-parallel-sizes" not in printed
