"""A rank that stops in any of our exchanges ends the job in time, and the message says where."""

import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_attn2d import Grid, attention2d
from megatron_attn2d.attention.messages import ExchangeError
from tests.megatron.runs import arguments, context_parallel
from tests.pool import RankPool

TIMEOUT = 5  # of the process group, in seconds
CASES: dict[tuple[str, int, int, int], list[str]] = {
    ("attention2d", 1, 2, 1): [
        f"layer 3, queries in the row of ranks [0, 1]: {what}" for what in ("gathering", "returning results") * 2
    ],
    ("attention2d", 2, 1, 1): [
        f"layer 3, keys and values in the column of ranks [0, 1]: {what}"
        for what in ("gathering", "gathering", "returning results")
    ],
    ("ring", 1, 1, 1): [
        f"layer 3, ring of ranks [0, 1]: {what}"
        for what in (
            "k, v at step 0",
            "k, v at step 0 of the backward pass",
            "dk, dv at step 1 of the backward pass",
        )
    ],
    ("attention2d", 1, 1, 2): ["layer 3, Ulysses group of ranks [0, 1]: exchanging sequence for heads or back"] * 4,
}


@pytest.fixture(scope="module")
def launched() -> dict[tuple[str, int, int, int], subprocess.Popen[str]]:
    """All launches at once, as they do little but wait."""
    return {
        case: subprocess.Popen(
            [sys.executable, "-m", "tests.guarantees.targets", *map(str, (TIMEOUT, *case, *range(len(told))))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for case, told in CASES.items()
    }


@pytest.mark.parametrize("case", CASES, ids=["row", "column", "ring", "heads"])
def test_a_stopped_rank_ends_the_job_within_the_timeout_and_a_minute_and_is_located(
    case: tuple[str, int, int, int], launched: dict[tuple[str, int, int, int], subprocess.Popen[str]]
) -> None:
    out, err = launched[case].communicate(timeout=240)
    endings, messages = out.splitlines(), err.split("====\n")
    for where, (expected, ending, message) in enumerate(zip(CASES[case], endings, messages[:-1], strict=True)):
        number, code, seconds = ending.split()
        assert (int(number), int(code)) == (where, 1), err
        assert float(seconds) < TIMEOUT + 60
        assert f"ExchangeError: {expected} failed on rank 0" in message


def test_a_rank_that_stops_in_training_is_located_though_other_stages_wait_for_it_too(tmp_path: Path) -> None:
    options = {"mock_data": True, "num_layers": 2, "train_iters": 5, "pipeline_model_parallel_size": 2}
    args = arguments(run_dir=tmp_path, **options, **context_parallel("attention2d", 1, 2))
    command = [sys.executable, "-m", "tests.guarantees.targets", "training", str(3 * TIMEOUT), "4", "1", *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = (process.stdout.readline() for _ in range(2))  # the line that says what trains, then the first step
    assert [line.partition(" ")[0] for line in said] == ["GPT:", "step"]
    began = time.monotonic()
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert time.monotonic() - began < 3 * TIMEOUT + 60
    assert "ExchangeError: layer 1, queries in the row of ranks [0, 1]: returning results failed on rank 0" in err
    assert err.endswith("waited for nobody, so that the others may have waited for it: rank 1\n")


def wait_in_vain(rank: int, tile: tuple[int, int] | None) -> float:
    """Seconds until attention gives up on rank 1, which leaves out the second call over a grid laid on a group."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    assert isinstance(group, dist.ProcessGroup)
    grid = Grid.from_group(group, rows=2, cols=2, node_block=tile)
    q = torch.ones(4, 1, 2, 4)
    attention2d(q, q, q, grid)
    began = time.monotonic()
    if rank != 1:
        with pytest.raises(ExchangeError, match=r"in the (row|column) of ranks"):
            attention2d(q, q, q, grid)
    seconds = time.monotonic() - began
    dist.barrier()
    return seconds


@pytest.mark.parametrize("tile", [None, (1, 2)], ids=["columns", "tiles"])
def test_rows_and_columns_wait_as_long_as_the_group_that_they_were_made_of(
    tile: tuple[int, int] | None, pool: RankPool
) -> None:
    assert max(pool.run(wait_in_vain, 4, tile, timeout=60)) < 20
