"""A rank that stops in any of our exchanges ends the job in time, and the message says where."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.megatron.runs import arguments, context_parallel

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
    ("attention2d", 1, 1, 2): ["layer 3, head group of ranks [0, 1]: exchanging sequence for heads or back"] * 4,
}


@pytest.fixture(scope="module")
def launched() -> dict[tuple[str, int, int, int], subprocess.Popen[str]]:
    """All launches at once, as they do little but wait."""
    return {
        case: subprocess.Popen(
            [sys.executable, "-m", "tests.faults.targets", str(TIMEOUT), *map(str, case), *map(str, range(len(told)))],
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
    command = [sys.executable, "-m", "tests.faults.targets", "training", str(3 * TIMEOUT), "4", "1", *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("step 1/")
    began = time.monotonic()
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert time.monotonic() - began < 3 * TIMEOUT + 60
    assert "ExchangeError: layer 1, queries in the row of ranks [0, 1]: returning results failed on rank 0" in err
    assert err.endswith("waited for nobody, so that the others may have waited for it: rank 1\n")
