"""Training in which each document is a sequence of its own: the same in every layout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_attn2d.errors import UsageError
from tests.megatron.combinations import EP, MODELS, PP, SP, VPP, Combination, grid
from tests.megatron.documents import short_examples, short_texts
from tests.megatron.runs import context_parallel, train
from tests.pool import RankPool

COMMON: dict[str, Any] = {"document_multiple": 16, "train_iters": 2}

COMBINATIONS: dict[str, Combination] = {
    "ring 4": Combination("llama", 4, context_parallel("p2p", 1, 4)),
    "2x2, 4 micro-batches": Combination("llama", 4, grid(2, 2, micro_batch_size=1)),
    "4x2": Combination("llama", 8, grid(4, 2)),
    "2x2x2, heads over 2": Combination("llama", 8, grid(2, 2, 2)),
    "TP2 SP, PP2, 1x2": Combination("llama", 8, {**SP, **PP, **grid(1, 2), "micro_batch_size": 1}),
    "PP2 interleaved, 2x1": Combination("four layers", 4, {**VPP, **grid(2, 1), "micro_batch_size": 1}),
    "DP2, 1x2, loss in chunks": Combination("llama", 4, grid(1, 2, loss_chunk_tokens=24)),
    "GPT-3, 2x2": Combination("gpt3", 4, grid(2, 2)),
    "2x2, in bins": Combination("llama", 4, grid(2, 2, document_bins=24)),
    "TP2 SP, PP2, 2x1, in bins": Combination(
        "llama", 8, {**SP, **PP, **grid(2, 1), "micro_batch_size": 1, "document_bins": 8}
    ),
    "hybrid, ring 2, in bins": Combination("hybrid", 2, {**context_parallel("p2p", 1, 2), "document_bins": 8}),
    "balanced MoE, TP2 SP, PP2, EP2 over 2x1": Combination("balanced moe", 8, {**SP, **PP, **EP, **grid(2, 1)}),
    "balanced MoE, EP2 over 2x1": Combination("balanced moe", 2, {**EP, **grid(2, 1)}),
    "MLA, 2x1": Combination("mla", 2, grid(2, 1)),
}


@pytest.fixture(scope="module")
def one_rank(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A set of short documents, and by model a checkpoint after the first step and the second step."""
    directory = tmp_path_factory.mktemp("documents")
    texts = short_texts(directory / "texts")
    found: dict[str, Any] = {}

    def of(model: str) -> tuple[Path, Path, dict[str, Any]]:
        if model not in found:
            start = directory / model
            options = {"data_path": texts, **COMMON, **MODELS[model]}
            saving = {"save": start, "save_interval": 1, "no_save_optim": True}
            found[model] = texts, start, train(pool, 1, directory / f"{model} run", **options, **saving)[1]
        return found[model]

    return of


@pytest.mark.parametrize("case", COMBINATIONS)
def test_losses_gradients_and_throughput_equal_those_of_one_rank(
    case: str, pool: RankPool, one_rank: Any, tmp_path: Path
) -> None:
    combination = COMBINATIONS[case]
    texts, start, expected = one_rank(combination.model)
    options = {"data_path": texts, "load": start, "ckpt_step": 1, "no_load_optim": True, **COMMON}
    (step,) = train(pool, combination.ranks, tmp_path, **options, **MODELS[combination.model], **combination.options)
    assert step["step"] == expected["step"] == 2
    assert step["loss"] == pytest.approx(expected["loss"], abs=combination.tolerance)
    assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * combination.tolerance)
    assert step["padding"] == pytest.approx(expected["padding"])
    assert 0.05 < step["padding"] < 0.3
    # Of one batch operations and tokens are the same however fast it went.
    work = [one["tflops"] * ranks / one["tokens_per_s"] for one, ranks in ((step, combination.ranks), (expected, 1))]
    assert work[0] == pytest.approx(work[1])


def test_completions_are_learned_alike_on_one_rank_and_in_a_grid(pool: RankPool, tmp_path: Path) -> None:
    options = {"data_path": short_examples(tmp_path / "set"), "examples": True, **COMMON, **MODELS["llama"]}
    options |= {"seq_length": 128, "max_position_embeddings": 128, "train_iters": 8, "lr": 4e-3}
    one = train(pool, 1, tmp_path / "one", **options)
    grid_of_4 = train(pool, 4, tmp_path / "grid", **options, **grid(2, 2))
    assert [step["loss"] for step in grid_of_4] == pytest.approx([step["loss"] for step in one], abs=2e-5)
    assert one[-1]["loss"] < one[0]["loss"] - 1


def bins(rank: int, asked: int) -> int | str:
    """How many bins ranks agree on whose fullest samples hold 3 and 4 documents, or why not."""
    from megatron_attn2d.megatron import document_bins
    from megatron_attn2d.megatron.upstream import cpu

    with cpu.seam():
        try:
            return document_bins.agreed(asked, 3 + rank)
        except UsageError as error:
            return str(error)


@pytest.mark.parametrize(
    ("asked", "found"), [(0, 4), (8, 8), (3, "data.document_bins = 3 (--document-bins): a sample")]
)
def test_every_rank_has_bins_for_the_fullest_sample(pool: RankPool, asked: int, found: int | str) -> None:
    for one in pool.run(bins, 2, asked):
        assert str(one).startswith(str(found))


def test_models_and_batches_that_bins_do_not_serve_are_refused() -> None:
    import torch

    from megatron_attn2d.megatron import document_bins

    args = SimpleNamespace(document_multiple=4, document_bins=2, cuda_graph_impl="none", mtp_num_layers=None)
    document_bins.check_model(args)
    document_bins.check_batch(torch.tensor([[0, 4, 8, 8], [0, 8, 8, 8]]), args)
    with pytest.raises(UsageError, match=r"^data.document_bins = 2 .* holds 3 documents; choose 3 or more, or null$"):
        document_bins.check_batch(torch.tensor([[0, 8, 8, 8], [0, 4, 8, 12]]), args)
    args.mtp_num_layers = 1
    with pytest.raises(UsageError, match=r"^--mtp-num-layers 1 would predict .* choose --document-bins 0 and"):
        document_bins.check_model(args)


def test_graphs_of_transformer_engine_get_bins_and_one_sequence_to_be_captured_with() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_attn2d.megatron import bins_in_graphs
    from megatron_attn2d.megatron.upstream import compat, cpu
    from megatron_attn2d.megatron.upstream.patching import applied

    args = SimpleNamespace(cuda_graph_impl="transformer_engine", micro_batch_size=2, document_bins=0)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, context_parallel_size=2)
    config.cuda_graph_impl = args.cuda_graph_impl
    with cpu.seam(), compat.applied_fixes(), applied(bins_in_graphs.patches(args)):
        args.document_bins = 3  # once there are data sets
        found = TransformerLayer.get_layer_static_inputs(SimpleNamespace(config=config), 64, 2)
    assert found["hidden_states"].shape == (64, 1, 8)
    assert found["attention_mask"].tolist() == [[0, *[128] * 6]] * 2


def test_replays_of_an_iteration_count_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from megatron.training import training

    from megatron_attn2d.megatron import bins_in_graphs
    from megatron_attn2d.megatron.upstream.patching import applied

    monkeypatch.setattr(training, "_seqlen_stats_active", False)
    monkeypatch.setattr(training, "_seqlen_stats_in_iteration", torch.tensor([5.0, 13.0]))  # as a replay leaves it
    with applied(bins_in_graphs.patches(SimpleNamespace(cuda_graph_impl="full_iteration"))):
        assert training.consume_seqlen_stats_in_iteration() == (5, 13)
