"""Generated text and its logits, against the whole sequence recomputed on one rank without a cache."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_attn2d.inference import configuration
from megatron_attn2d.inference.sampling import Sampling
from tests.inference.conftest import described
from tests.pool import RankPool

TOKENS = 8
"""Generated after each prompt."""


def prompts_of(*lengths: int) -> list[list[int]]:
    draw = random.Random(sum(lengths))
    return [[draw.randrange(256) for _ in range(length)] for length in lengths]


@dataclass
class Found:
    """What a rank found: of each prompt the tokens, and where it has the logits, those of each token."""

    tokens: list[list[int]]
    logits: list[torch.Tensor]


def generated(
    rank: int, run: Any, arguments: list[str], prompts: list[list[int]], chunk: int, batch: int, graph: Any = "auto"
) -> Found:
    """Greedy completions of `prompts`."""
    from megatron_attn2d.inference.generator import Generator

    class Recording(Generator):
        def _chosen(self, logits: Any, *rest: Any) -> Any:
            seen.append(None if logits is None else logits.cpu())
            return super()._chosen(logits, *rest)

    seen: list[Any] = []
    with Recording.started(run, arguments, chunk=chunk, batch=batch, graph=graph) as generator:
        completions = generator.generate(prompts, Sampling(TOKENS, ignore_end=True))
        replica, replicas = generator._model.replica
    logits = [torch.empty(0)] * len(prompts)
    if seen[0] is not None:
        batches = [torch.stack(seen[i : i + TOKENS], 1) for i in range(0, len(seen), TOKENS)]
        logits[replica::replicas] = list(torch.cat(batches))
    return Found([completion.tokens for completion in completions], logits)


def recomputed(rank: int, arguments: list[str], texts: list[list[int]]) -> list[torch.Tensor]:
    """The logits of the last `TOKENS` tokens of each text, by the model as it trains."""
    from megatron_attn2d.training import session

    found = []
    with session.in_megatron(arguments):
        _, (model,) = session.set_up_model()
        model.eval()
        with torch.no_grad():
            for text in texts:
                padded = [text + [0] * (len(text) % 2)]  # at the end, which no earlier token sees
                tokens = torch.tensor(padded, device="cuda")
                logits = model(tokens, torch.arange(tokens.numel(), device="cuda")[None], None)
                found.append(logits[0, len(text) - TOKENS - 1 : len(text) - 1].float().cpu())
    return found


def check(
    pool: RankPool,
    run_dir: Path,
    prompts: list[list[int]],
    layouts: list[tuple[str, ...]],
    *,
    step: int | None = None,
    chunk: int = 16,
    tolerance: float = 1e-5,
    one_rank: tuple[str, ...] = (),
) -> None:
    """Generates on each of `layouts`, and compares with one rank."""
    base = configuration.configuration(run_dir, ["context_parallel.size=1", *one_rank])
    texts: list[list[int]] = []
    expected: list[torch.Tensor] = []
    for layout in layouts:
        run = configuration.configuration(run_dir, list(layout))
        arguments = configuration.arguments(run, step)
        ranks = pool.run(generated, run.world_size, run, arguments, prompts, chunk, 4, init_group=False)
        assert all(found.tokens == ranks[0].tokens for found in ranks), layout
        found = [prompt + tokens for prompt, tokens in zip(prompts, ranks[0].tokens, strict=True)]
        if found != texts:
            assert not texts, f"{layout}: another text than on {layouts[0]}"
            texts = found
            (expected,) = pool.run(recomputed, 1, configuration.arguments(base, step), texts, init_group=False)
        for wanted, tokens in zip(expected, ranks[0].tokens, strict=True):
            assert tolerance > 1e-5 or wanted[:, :257].argmax(-1).tolist() == tokens, layout
        given = [(a, b) for a, b in zip(ranks[-1].logits, expected, strict=True) if a.numel()]
        worst = max(float((a - b).abs().max()) for a, b in given)
        print(layout, "largest difference of logits", worst)
        assert worst < tolerance, layout


def test_prompts_of_1_to_1000_tokens_on_1_to_8_ranks(pool: RankPool, tmp_path: Path) -> None:
    layouts = [(), ("context_parallel.size=3",), ("context_parallel.size=8",)]
    check(pool, described(tmp_path / "run"), prompts_of(1, 1000, 2, 37, 129, 16), layouts, chunk=128)


NO_GROUPS = "model.num_query_groups=null"
FAMILIES: dict[str, tuple[str, ...]] = {
    "GPT-3": ("model.position_embedding_type=learned_absolute", "model.max_position_embeddings=64", NO_GROUPS),
    "windows on a layer, sinks": (
        "megatron_args.window_size=[5, 0]",
        "megatron_args.window_attn_skip_freq=2",
        "megatron_args.softmax_type=learnable",
    ),
    "MLA": (  # whose rotary positions are YaRN's by default
        NO_GROUPS,
        "megatron_args.multi_latent_attention=true",
        *(f"megatron_args.{name}=16" for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "v_head_dim")),
        "megatron_args.qk_pos_emb_head_dim=8",
        "megatron_args.rotary_scaling_factor=4.0",
    ),
    "MoE": (
        "megatron_args.num_experts=4",
        "megatron_args.moe_router_topk=2",
        "megatron_args.moe_ffn_hidden_size=64",
    ),
    "hybrid, linear scaling": ("model.kind=hybrid", "model.rope_scaling=linear", "model.rope_scaling_factor=3"),
    "bf16": ("training.precision=bf16",),
    "multi-token prediction, YaRN, recomputed while it trained": (
        *("megatron_args.mtp_num_layers=1", "model.untie_embeddings_and_output_weights=true"),
        *("model.rope_scaling=yarn", "model.rope_scaling_factor=4.0", "model.rope_original_length=16"),
        *("training.recompute_granularity=full", "training.recompute_method=uniform"),
        *("training.recompute_num_layers=1", "training.keep_attention_outputs=true"),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, pool: RankPool, tmp_path: Path) -> None:
    layouts = [("context_parallel.size=2",)]
    tolerance = 6.5e-2 if family == "bf16" else 1e-5  # two units in the last place of logits from 4 on
    check(pool, described(tmp_path / "run", *FAMILIES[family]), prompts_of(1, 40, 17), layouts, tolerance=tolerance)


def test_a_checkpoint_says_the_same_on_every_layout(pool: RankPool, trained: Path) -> None:
    layouts = [
        ("parallelism.tensor=1", "parallelism.pipeline=2"),
        ("parallelism.tensor=2", "parallelism.pipeline=2", "context_parallel.size=2"),
        ("parallelism.tensor=1", "context_parallel.size=4", "context_parallel.grid=[2, 1, 2]", "parallelism.data=2"),
    ]
    check(pool, trained, prompts_of(1, 40, 17, 5, 8), layouts, step=1, one_rank=("parallelism.tensor=1",))
