"""Checkpoints interchange: between modes, grids and sizes bit for bit, and with upstream's own models by their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.megatron.combinations import MODELS, OVERLAP, PP, SP, ZERO, Options, grid
from tests.megatron.runs import arguments, context_parallel, metrics, train_rank
from tests.pool import RankFailed, RankPool

Stage = tuple[int, Options]

ONE: Stage = (1, {})
RING = context_parallel("p2p", 1, 2)
ULYSSES = context_parallel("a2a", 1, 2)
CHAINS: dict[str, tuple[Options, list[Stage]]] = {
    "every rank with all states": (
        {},
        [ONE, (4, grid(2, 2)), (8, {**SP, **PP, **grid(1, 2)}), (4, RING), (2, grid(2, 1)), ONE],
    ),
    "distributed optimizer": (
        ZERO,
        [ONE, (4, {**OVERLAP, **grid(1, 2)}), (4, {**SP, **grid(2, 1)}), (4, {**PP, **ULYSSES}), ONE],
    ),
}
"""Of each: what all stages share, and the stages, of which each trains one step from where the one before ended."""


@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_moves_from_one_to_another_bit_for_bit_and_goes_on(
    chain: str, pool: RankPool, text: Path, tmp_path: Path
) -> None:
    common, stages = CHAINS[chain]
    options = {"data_path": text, **MODELS["llama"], **common}
    undisturbed = arguments(run_dir=tmp_path / "undisturbed", exit_interval=len(stages), **options)
    pool.run(train_rank, 1, undisturbed)
    before = None
    for step, (nranks, spread) in enumerate(stages, start=1):
        saved, again = tmp_path / f"saved-{step}", tmp_path / f"again-{step}"
        here = {"load": before, "save": saved, "exit_interval": step, **options, **spread}
        args = arguments(run_dir=tmp_path / "run", **here)
        pool.run(_train_after_saving_again, nranks, args, again)
        if before is not None:
            left, right = (tensors(directory / f"iter_{step - 1:07d}") for directory in (before, again))
            assert left.keys() == right.keys()
            different = [name for name in left if not torch.equal(left[name], right[name])]
            assert not different, f"loaded by stage {step}, {spread}"
            assert sum("exp_avg_sq" in name for name in left) >= 8
        before = saved
    found, expected = ([line["loss"] for line in metrics(tmp_path / run)] for run in ("run", "undisturbed"))
    assert found == pytest.approx(expected, abs=1e-5)


def _train_after_saving_again(rank: int, args: list[str], directory: Path) -> None:
    """Trains, and saves what was loaded to another directory before."""
    from megatron.training import get_args, training

    original = training.train

    def train(step: Any, model: Any, optimizer: Any, scheduler: Any, *rest: Any, **kwargs: Any) -> Any:
        given = get_args()
        if given.iteration:
            with mock.patch.object(given, "save", str(directory)):
                training.save_checkpoint(given.iteration, model, optimizer, scheduler, 0)
        return original(step, model, optimizer, scheduler, *rest, **kwargs)

    with mock.patch.object(training, "train", train):
        train_rank(rank, args)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole; without random states, which belong to ranks."""
    reader = dcp.FileSystemReader(checkpoint)
    state = {
        name: torch.empty(described.size, dtype=described.properties.dtype)
        for name, described in reader.read_metadata().state_dict_metadata.items()
        if isinstance(described, TensorStorageMetadata) and "rng_state" not in name
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.mark.parametrize("model", ["llama", "gpt3", "moe", "mtp"])
def test_a_checkpoint_has_the_names_and_shapes_of_upstreams_own_model(
    model: str, pool: RankPool, tmp_path: Path
) -> None:
    [(ours, theirs)] = pool.run(_names, 1, arguments(run_dir=tmp_path, mock_data=True, **MODELS[model]))
    assert ours == theirs
    assert len(ours) >= 8


def test_a_hybrid_model_goes_on_from_a_gpt(pool: RankPool, text: Path, tmp_path: Path) -> None:
    """By upstream's own translation of names, weights and the optimizer's states; not the other way."""
    options = {"data_path": text, **MODELS["llama"], **ZERO}
    saved, again = tmp_path / "saved", tmp_path / "again"
    pool.run(train_rank, 1, arguments(run_dir=tmp_path / "undisturbed", exit_interval=3, **options))
    pool.run(train_rank, 2, arguments(run_dir=tmp_path / "run", save=saved, exit_interval=1, **options, **grid(2, 1)))
    hybrid = {**options, **MODELS["hybrid"], "run_dir": tmp_path / "run", "load": saved, "exit_interval": 3}
    pool.run(train_rank, 2, arguments(**hybrid, save=again, **grid(1, 2)))
    found, expected = ([line["loss"] for line in metrics(tmp_path / run)] for run in ("run", "undisturbed"))
    assert found == pytest.approx(expected, abs=1e-5)
    refused = arguments(run_dir=tmp_path / "back", load=again, exit_interval=4, **options)
    with pytest.raises(RankFailed, match=r"model\.kind is hybrid in this checkpoint and gpt here"):
        pool.run(train_rank, 1, refused)


def test_a_hybrid_checkpoint_has_the_names_of_transformer_engines_layers(pool: RankPool, tmp_path: Path) -> None:
    [(ours, _)] = pool.run(_names, 1, arguments(run_dir=tmp_path, mock_data=True, **MODELS["hybrid"]))
    assert {
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc2.weight",
        "decoder.final_norm.weight",
    } <= set(ours)


def _names(rank: int, args: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Names and shapes in the checkpoint of our model and, if it is a GPT, of the one with upstream's default spec."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import get_args, training
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    found: list[dict[str, Any]] = []

    def described(model: Any) -> dict[str, Any]:
        groups = {"dp_cp_group": ProcessGroupCollection.use_mpu_process_groups(["dp_cp"]).dp_cp}
        values = nested_values(model.sharded_state_dict(metadata=groups))
        return {value.key: value.global_shape for value in values if isinstance(value, ShardedTensor)}

    def instead_of_training(step: Any, model: Any, *rest: Any, **kwargs: Any) -> tuple[int, int]:
        found.append(described(model[0].module))
        if get_args().hybrid_layer_pattern is None:
            config = gpt_config_from_args(get_args())
            upstreams = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
            found.append(described(upstreams))
        return 0, 0

    with mock.patch.object(training, "train", instead_of_training):
        train_rank(rank, args)
    return found[0], found[-1]
