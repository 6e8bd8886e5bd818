"""Training is the same however it is spread: every mode, size and model gives the losses of one rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.megatron.combinations import COMBINATIONS, MODELS, REFERENCES
from tests.megatron.runs import arguments, context_parallel, metrics, train, train_rank
from tests.pool import RankPool

Steps = list[dict[str, Any]]
Reference = Callable[[str], tuple[Path, Steps]]


@pytest.fixture(scope="module")
def reference(pool: RankPool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A model's checkpoint after its first step, since fresh weights depend on the ranks, and ten steps from there."""
    found: dict[str, tuple[Path, Steps]] = {}

    def of(model: str) -> tuple[Path, Steps]:
        if model not in found:
            directory = tmp_path_factory.mktemp("one-rank")
            options = {"data_path": text, **MODELS[model]}
            nranks, spread = REFERENCES.get(model, (1, {}))
            start = directory / "start"
            train(pool, 1, directory / "first", save=start, no_save_optim=True, exit_interval=1, **options)
            steps = train(pool, nranks, directory / "run", load=start, no_load_optim=True, **options, **spread)
            assert steps[0]["loss"] - steps[-1]["loss"] > 0.5, "it should learn within ten steps, or parity says little"
            found[model] = start, steps
        return found[model]

    return of


@pytest.mark.parametrize("case", COMBINATIONS)
def test_losses_and_gradient_norms_equal_those_of_one_rank(
    case: str, pool: RankPool, text: Path, reference: Reference, tmp_path: Path
) -> None:
    combination = COMBINATIONS[case]
    start, expected = reference(combination.model)
    options = {
        "data_path": text,
        "load": start,
        "no_load_optim": True,
        **MODELS[combination.model],
        **combination.options,
    }
    steps = train(pool, combination.ranks, tmp_path, **options)
    assert [step["step"] for step in steps] == list(range(2, 12))
    for step, other in zip(steps, expected, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], abs=combination.tolerance)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * combination.tolerance)


def test_multi_token_prediction_differs_by_upstreams_weighting_alone(
    pool: RankPool, text: Path, tmp_path: Path
) -> None:
    options = {"data_path": text, **MODELS["mtp"]}
    start = tmp_path / "start"
    train(pool, 1, tmp_path / "first", save=start, no_save_optim=True, exit_interval=1, **options)
    one, two = (
        pool.run(_train_weighing_alike, nranks, arguments(run_dir=run, load=start, no_load_optim=True, **options, **on))
        and metrics(run)
        for nranks, run, on in [(1, tmp_path / "one", {}), (2, tmp_path / "two", context_parallel("attention2d", 2, 1))]
    )
    for step, other in zip(two, one, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def _train_weighing_alike(rank: int, args: list[str]) -> bool:
    """Trains with as many tokens counted after a shift as before, so that no rank weighs its own part by its own."""
    from megatron.core.transformer import multi_token_prediction

    def counting_before(roll: Any) -> Any:
        return lambda tensor, *rest, **kwargs: (roll(tensor, *rest, **kwargs)[0], tensor.sum())

    patched = counting_before(multi_token_prediction.roll_tensor)
    with mock.patch.object(multi_token_prediction, "roll_tensor", patched):
        train_rank(rank, args)
    return True


def test_the_table_is_as_large_as_promised() -> None:
    assert len(COMBINATIONS) >= 30
    assert max(combination.ranks for combination in COMBINATIONS.values()) == 8
