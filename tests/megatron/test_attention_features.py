"""Packed sequences and dropout through the whole model: RoPE, recomputation and tensor parallelism included."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.attention.dense import packed_zigzag
from tests.megatron.runs import arguments, context_parallel, train
from tests.pool import RankPool

LENGTHS, PLACES = (16, 29, 9), (16, 32, 16)  # without and with padding

MODES = {"attention2d 2x2": context_parallel("attention2d", 2, 2), "ring": context_parallel("p2p", 1, 4)}


@pytest.mark.parametrize("mode", MODES)
def test_packed_sequences_train_as_each_alone_and_know_nothing_of_each_other(
    mode: str, pool: RankPool, tmp_path: Path
) -> None:
    args = arguments(run_dir=tmp_path, mock_data=True, num_layers=2, **MODES[mode])
    for losses, gradients, changed in pool.run(_packed_against_alone, 4, args):
        assert losses <= 1e-5
        assert gradients <= 1e-4
        assert changed == [[False, True, False], [False] * 3], "with the second's first token, and with its padding"


def _packed_against_alone(rank: int, args: list[str]) -> tuple[float, float, list[list[bool]]]:
    """Largest difference of a real token's loss, and of a gradient relative to the largest of its parameter.

    And in which sequences losses change with a token of the second one.
    """
    from megatron.training import training

    from megatron_attn2d.training import pretrain_gpt

    found: list[tuple[float, float, list[list[bool]]]] = []

    def instead_of_training(step: Any, model: Any, *rest: Any, **kwargs: Any) -> tuple[int, int]:
        found.append(_compare(model[0]))
        return 0, 0

    with mock.patch.object(training, "train", instead_of_training):
        pretrain_gpt.main(args)
    return found[0]


def _compare(model: Any) -> tuple[float, float, list[list[bool]]]:
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.parallel_state import get_context_parallel_group
    from megatron.core.utils import get_batch_on_this_cp_rank

    group = get_context_parallel_group()
    rank, size = group.rank(), group.size()
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, 256, (1, sum(PLACES)), generator=generator) for _ in range(2))
    starts = list(accumulate(PLACES, initial=0))
    position_ids = torch.cat([torch.arange(place) for place in PLACES])[None]
    real = torch.cat([torch.arange(p) < n for p, n in zip(PLACES, LENGTHS, strict=True)])
    parameters = [p for p in model.parameters() if p.requires_grad]

    def totals(lengths: tuple[int, ...]) -> Any:
        return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)

    def whole(losses: Any, at: Any, gradients: Any) -> tuple[Any, list[Any]]:
        """The losses of all ranks by token, and the gradients of all."""
        by_token = torch.zeros(sum(PLACES))
        by_token[at] = losses.detach().flatten() * real[at]
        for tensor in (by_token, *gradients):
            torch.distributed.all_reduce(tensor, group=group)
        return by_token, list(gradients)

    mine = packed_zigzag(PLACES, size, rank)
    packing = PackedSeqParams(
        "thd", totals(LENGTHS), totals(LENGTHS), totals(PLACES), totals(PLACES), max(PLACES), max(PLACES)
    )
    losses = model(tokens[:, mine], position_ids[:, mine], None, labels=labels[:, mine], packed_seq_params=packing)
    packed = whole(losses, mine, torch.autograd.grad((losses.flatten() * real[mine]).sum(), parameters))

    alone_losses, alone_gradients = torch.zeros(sum(PLACES)), [torch.zeros_like(p) for p in parameters]
    for start, place in zip(starts, PLACES, strict=False):
        at = slice(start, start + place)
        batch = {"tokens": tokens[:, at], "labels": labels[:, at], "position_ids": position_ids[:, at]}
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
        own = start + batch["position_ids"][0]
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        gradients = torch.autograd.grad((losses.flatten() * real[own]).sum(), parameters)
        by_token, gradients = whole(losses, own, gradients)
        alone_losses += by_token
        for total, gradient in zip(alone_gradients, gradients, strict=True):
            total += gradient
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(packed[1], alone_gradients, strict=True))

    changed = []
    for place in (starts[1], starts[1] + LENGTHS[1]):
        other = tokens.clone()
        other[0, place] += 1
        with torch.no_grad():
            losses = model(
                other[:, mine], position_ids[:, mine], None, labels=labels[:, mine], packed_seq_params=packing
            )
        by_token, _ = whole(losses, mine, [])
        differs = (by_token != packed[0]).split(PLACES)
        changed.append([bool(sequence.any()) for sequence in differs])
    return (packed[0] - alone_losses).abs().max().item(), worst, changed


DROPOUT: dict[str, dict[str, Any]] = {
    "one rank": {},
    "attention2d 2x2": context_parallel("attention2d", 2, 2),
    "ring, tensor parallel": {**context_parallel("p2p", 1, 2), "tensor_model_parallel_size": 2},
    "tensor and sequence parallel": {
        **context_parallel("attention2d", 2, 1),
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
    },
    "full recomputation": {
        **context_parallel("attention2d", 2, 1),
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective recomputation": {**context_parallel("attention2d", 1, 2), "recompute_granularity": "selective"},
    "core_attn recomputation": {
        **context_parallel("p2p", 1, 2),
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn"],
    },
}


@pytest.fixture(scope="module")
def start(pool: RankPool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after one step on one rank: weights drawn afresh depend on the tensor and pipeline ranks."""
    directory = tmp_path_factory.mktemp("start")
    train(pool, 1, directory / "run", data_path=text, exit_interval=1, save=directory / "checkpoint")
    return directory / "checkpoint"


def test_dropout_is_the_same_in_every_layout_and_under_recomputation(
    pool: RankPool, text: Path, start: Path, tmp_path: Path
) -> None:
    # from a checkpoint, since fresh weights differ with the number of tensor-parallel ranks
    common = {"exit_interval": 3, "data_path": text, "load": start, "no_load_rng": True}
    losses = {}
    for i, (name, options) in enumerate(DROPOUT.items()):
        ranks = options.get("context_parallel_size", 1) * options.get("tensor_model_parallel_size", 1)
        steps = train(pool, ranks, tmp_path / str(i), **common, attention_dropout=0.2, **options)
        losses[name] = [step["loss"] for step in steps]
    without = train(pool, 1, tmp_path / "without", **common)
    reference = losses["one rank"]
    assert len(reference) == 2
    for name, found in losses.items():
        assert found == pytest.approx(reference, abs=1e-5), name
    assert abs(without[-1]["loss"] - reference[-1]) > 1e-4  # the test would not see it otherwise
