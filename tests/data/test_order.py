"""What repeats when a run goes on with other data, against tokens that are told apart one by one."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_attn2d.config import RunConfig, load_run
from megatron_attn2d.data import order

QUICKSTART = Path(__file__).parents[2] / "configs" / "runs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets a and b of 40 documents each, in which no token occurs twice; c is a copy of a."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder, random, first = tmp_path_factory.mktemp("data"), np.random.default_rng(0), 0
    for name in "ab":
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.int32)
        for length in random.integers(1, 60, 40):
            builder.add_document(np.arange(first, first + length, dtype=np.int32), [int(length)])
            first += int(length)
        builder.finalize(str(folder / f"{name}.idx"))
    for suffix in ("bin", "idx"):
        shutil.copy(folder / f"a.{suffix}", folder / f"c.{suffix}")
    return folder


def run_of(folder: Path, *overrides: str) -> RunConfig:
    """A run of 16 steps of 4 samples of 16 tokens, about 0.9 epochs of a."""
    given = [f"data.paths=[{folder}/a]", "training.train_iters=16", "training.seq_length=16"]
    return load_run(QUICKSTART, [*given, "training.global_batch_size=4", *(o.format(d=folder) for o in overrides)])


def tokens(dataset: Any, first: int, last: int) -> list[int]:
    """The tokens of the samples, read from the data set."""
    found: list[int] = []
    for i in range(first, min(last, len(dataset))):
        one, j = dataset, i
        if hasattr(dataset, "datasets"):
            one, j = dataset.datasets[dataset.dataset_index[i]], dataset.dataset_sample_index[i]
        found += one._query_document_sample_shuffle_indices(j)[0][:-1].tolist()
    return [token for token in found if token >= 0]  # without padding


@pytest.mark.parametrize(
    ("overrides", "repeats"),
    [
        ((), False),
        (("data.paths=[{d}/c]",), False),  # moved
        (("training.train_iters=17",), False),  # still one epoch
        (("training.seed=5",), True),
        (("training.seq_length=24",), True),
        (("data.split='80,20,0'",), True),
        (("training.train_iters=60",), True),  # more epochs
        (("training.global_batch_size=8",), True),
        (("training.global_batch_size=2",), False),
        (("data.paths={{{d}/a: 0.5, {d}/b: 0.5}}",), True),
        (("data.paths=[{d}/b]",), False),
        (("data.document_masking=true", "training.micro_batch_size=1"), True),
    ],
)
def test_repeats_are_those_of_the_tokens(overrides: tuple[str, ...], repeats: bool, prefixes: Path) -> None:
    step = 8
    before, now = run_of(prefixes), run_of(prefixes, *overrides)
    found = order.repeats(before, now, step)
    consumed = step * 4
    expected = []
    old = order._training_set(before, 64)
    seen = set(tokens(old, 0, consumed))
    assert len(seen) == consumed * 16
    for run in (now, before):
        batch = run.training.global_batch_size
        dataset = order._training_set(run, order._samples(run, step, consumed))
        following = tokens(dataset, consumed, consumed + (run.training.train_iters - step) * batch)
        expected += [len(following), sum(token in seen for token in following)]
    assert [found.following, found.seen, found.unchanged_following, found.unchanged_seen] == expected
    assert found.unchanged_seen == 0
    assert (found.seen > 0) == repeats
    assert not list(prefixes.rglob("*.npy")), "a file is left"


def test_what_repeats_is_told(prefixes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run_of(prefixes)
    told = order.describe(before, run_of(prefixes, "training.seed=5"), 8)
    assert told.startswith("4")
    assert told.endswith(
        "% of the 512 tokens to come have been trained on before; it would be 0.0% if nothing had changed"
    )
    cyclic = run_of(prefixes, "megatron_args.dataloader_type=cyclic")
    assert order.describe(before, cyclic, 8) == "what repeats is not counted under megatron_args.dataloader_type"
    gone = run_of(prefixes, "data.paths=[{d}/gone]")
    assert order.describe(gone, before, 8) == f"what repeats can't be counted: {prefixes}/gone is gone"
    monkeypatch.setattr(order, "_MOST", 10)
    told = order.describe(before, run_of(prefixes, "training.seed=5"), 8)
    assert told.startswith("about 4")
    assert told.endswith("as is to be expected where data is dealt anew (not counted: too many documents)")
