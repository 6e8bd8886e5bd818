"""What a run shows and records."""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_attn2d.attention.messages import Pending
from megatron_attn2d.config import load_run, megatron_arguments
from megatron_attn2d.data import indexed
from megatron_attn2d.megatron.upstream.patching import applied
from megatron_attn2d.run import checkpoints
from megatron_attn2d.run.metrics import read_steps
from megatron_attn2d.training import progress, session, wandb_run
from megatron_attn2d.training.attention_wait import AttentionWait
from megatron_attn2d.training.console import quiet
from megatron_attn2d.training.progress import Reporter
from tests.megatron.runs import arguments, context_parallel, train
from tests.pool import RankPool

QUICKSTART = Path(__file__).parents[2] / "configs" / "runs" / "quickstart.yaml"
KEYS = ["step", "loss", "grad_norm", "lr", "tokens_per_s", "elapsed_s", "tflops", "memory_gib"]


def test_each_step_is_recorded_once_and_shown_in_a_line(pool: RankPool, text: Path, tmp_path: Path) -> None:
    steps = train(pool, 2, tmp_path, data_path=text, num_layers=1, train_iters=3, pipeline_model_parallel_size=1)
    assert [list(step) for step in steps] == [KEYS] * 3
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["tokens_per_s"] > 0 and step["lr"] == 1e-3 for step in steps)
    assert [step["elapsed_s"] for step in steps] == sorted(step["elapsed_s"] for step in steps)
    logs = [(tmp_path / "logs" / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert "iteration        3/       3" in logs[1], "upstream's own log is in the file"
    assert "derived --distributed-backend gloo: there is no CUDA device" in logs[0]
    upstream = [line for line in logs[1].splitlines() if "lm loss" in line]
    assert f"lm loss: {steps[0]['loss']:.6E}" in upstream[0]


def test_a_start_says_in_a_line_what_trains(pool: RankPool, text: Path, tmp_path: Path) -> None:
    options = {**context_parallel("attention2d", 2, 1), "num_layers": 1, "train_iters": 1, "data_path": text}
    options["document_multiple"] = 8
    (_, said) = pool.run(first_line, 2, arguments(run_dir=tmp_path, **options))
    assert said.startswith(
        "GPT: 1 layer, hidden size 64, 4 heads, 2 key/value heads, float32; 4 x 64 tokens per step; "
        "tensor 1 x context 2 x pipeline 1 x data 1; mode attention2d on a grid of 2x1, kernel reference; "
        f"data {text}, split 1,0,0, seed 1234, each document a sequence of its own in a multiple of 8 tokens; "
    )
    derived = said.partition("; derived: ")[2]
    assert re.fullmatch(r"transformer-impl local, distributed-backend gloo, .*\d switches \(reasons in .*\)", derived)


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        (["attention2d:2x1", "attention2d"], "no attention in the last pipeline stage"),
        (["attention2d:2x1", "p2p"], "attention of Transformer Engine (attention2d:2x1 p2p)"),
    ],
)
def test_a_start_says_what_attends_in_a_stage_without_attention_of_ours(modes: list[str], expected: str) -> None:
    from megatron_attn2d.training.start_line import line

    parallel = [f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline")]
    parallel += ["context_parallel_size", "data_parallel_size"]
    sizes = ["global_batch_size", "seq_length", "num_layers", "hidden_size", "num_attention_heads", *parallel]
    args = Namespace(
        **dict.fromkeys(sizes, 2),
        **dict.fromkeys(["group_query_attention", "num_experts", "document_multiple"], 0),
        **{"hybrid_layer_pattern": "*-|M-", "params_dtype": "torch.bfloat16", "mock_data": True, "cp_comm_type": modes},
    )
    assert f"; {expected}; made-up data; " in line(args, [], [])


def first_line(rank: int, args: list[str]) -> str:
    from megatron_attn2d.training import pretrain_gpt

    console = io.StringIO()
    with mock.patch.object(session, "quiet", return_value=contextlib.nullcontext(console)):
        pretrain_gpt.main(args)
    return console.getvalue().partition("\n")[0]


def test_validation_is_recorded_and_shown_as_upstream_finds_it(pool: RankPool, text: Path, tmp_path: Path) -> None:
    options = {"split": "80,10,10", "eval_iters": 2, "eval_interval": 2, "train_iters": 4, "num_layers": 1}
    train(pool, 2, tmp_path, data_path=text, pipeline_model_parallel_size=1, **options)
    found = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    log = (tmp_path / "logs/rank-1.log").read_text()
    # after step 4 Megatron would find it twice, on other samples
    upstream = re.findall(r"validation loss at iteration (\d)( on test set)?.* \| lm loss value: (\S+)", log)
    assert [(one["step"], one["set"], f"{one['loss']:.6E}") for one in found] == [
        (int(step), "test" if test else "validation", loss) for step, test, loss in upstream
    ]
    assert [(one["step"], one["set"]) for one in found] == [(2, "validation"), (4, "validation"), (4, "test")]


def test_a_run_that_begins_anew_lays_the_records_of_an_earlier_one_aside(tmp_path: Path) -> None:
    console = io.StringIO()
    for loss in (3.0, 2.0, 1.0):
        one = reporter(tmp_path, console)
        one._report(1, loss, 1.25, 1e-3)
        one._report_validation(1, "validation", loss)
    for name in ("metrics", "validation"):
        losses = [json.loads((tmp_path / f"{name}.jsonl{n}").read_text())["loss"] for n in (".1", ".2", "")]
        assert losses == [3.0, 2.0, 1.0]
    assert "an earlier run's metrics.jsonl is metrics.jsonl.2 now\n" in console.getvalue()
    assert "validation after step 1: loss 2.0000  perplexity 7.389\n" in console.getvalue()


def test_a_validation_that_is_repeated_without_a_step_replaces_the_first(tmp_path: Path) -> None:
    """As by --skip-train on a run that has ended, also where a record was cut off."""
    reporter(tmp_path)._report_validation(4, "validation", 2.5)
    with (tmp_path / "validation.jsonl").open("a") as file:
        file.write('{"step": 4, "se')
    reporter(tmp_path)._report_validation(4, "validation", 2.0)
    reporter(tmp_path)._report_validation(4, "test", 3.0)
    found = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [(one["set"], one["loss"]) for one in found] == [("validation", 2.0), ("test", 3.0)]


def test_a_resumed_run_forgets_what_it_repeats(tmp_path: Path) -> None:
    one = reporter(tmp_path)
    for step in (1, 2, 3):
        one._report(step, 2.5, 1.25, 1e-3)
        one._report_validation(step, "validation", 2.5)
    reporter(tmp_path)._report(3, 2.0, 1.25, 1e-3)
    steps = {
        name: [json.loads(line)["step"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "validation")
    }
    assert steps == {"metrics": [1, 2, 3], "validation": [1, 2]}


def reporter(run_dir: Path | None, console: Any = None, **options: Any) -> Reporter:
    """A reporter of a run of 20 steps, whose steps take 2 s."""
    settings = {"rank": 1, "world_size": 2, "seq_length": 100, "train_iters": 20, "save": "there", "run_dir": run_dir}
    settings |= {"peak_tflops": None, "log_attention_communication": False}
    made = Reporter(Namespace(**{**settings, **options}), console or io.StringIO())
    made._step_seconds = 2.0
    return made


@pytest.fixture(autouse=True)
def _batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import num_microbatches_calculator
    from megatron.training import training

    monkeypatch.setattr(num_microbatches_calculator, "get_current_running_global_batch_size", lambda: 8)
    monkeypatch.setattr(
        training, "num_floating_point_operations", lambda args, batch, squares, tokens: (squares or batch) * 1e12
    )
    monkeypatch.setattr(progress, "_memory_bytes", lambda: 3 * 2**29)


def test_a_line_says_how_far_how_good_how_fast_and_how_long() -> None:
    console = io.StringIO()
    reporter(None, console)._report(8, 2.5, 1.25, 1e-3)
    assert console.getvalue().splitlines() == [
        "resumed after step 7",
        "step  8/20  loss 2.5000  grad norm 1.250  lr 1.00e-03  400 tokens/s (200 per rank)  2 TFLOP/s per rank"
        "  1.50 GiB  ETA 0:00:24",
    ]


def test_utilization_and_waiting_are_shown_where_they_are_known(tmp_path: Path) -> None:
    console = io.StringIO()
    one = reporter(tmp_path, console, peak_tflops=5.0, log_attention_communication=True)
    one._wait._seconds = 0.5
    one._report(1, 2.5, 1.25, 1e-3)
    assert "  MFU 40.0%  1.50 GiB  attention waits 25.0%  ETA" in console.getvalue()
    recorded = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (recorded["tflops"], recorded["mfu"], recorded["attention_wait"]) == (2.0, 0.4, 0.25)


def test_documents_are_counted_without_padding() -> None:
    console = io.StringIO()
    reporter(None, console)._report(8, 2.5, 1.25, 1e-3, real_tokens=600.0, squares=4.0)
    assert "  300 tokens/s (150 per rank)  1 TFLOP/s per rank  1.50 GiB  padding 25.0%  ETA" in console.getvalue()


def test_one_rank_needs_no_rate_a_rank() -> None:
    console = io.StringIO()
    reporter(None, console, rank=0, world_size=1)._report(1, 2.5, 1.25, 1e-3)
    assert "  400 tokens/s  4 TFLOP/s per rank  " in console.getvalue()


def test_waiting_for_messages_is_measured_where_attention_waits() -> None:
    class Message:
        def wait(self) -> None:
            time.sleep(0.05)

    wait = AttentionWait()
    with applied([wait.patch()]):
        Pending([Message(), Message()]).wait()
        assert wait.take() == pytest.approx(0.1, abs=0.08)
        Pending().wait()
        assert wait.take() == 0.0
    Pending([Message()]).wait()
    assert wait.take() == 0.0


def test_tensorboard_and_offline_wandb_get_upstreams_values_and_ours(
    pool: RankPool, text: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = load_run(QUICKSTART, ["logging.wandb_project=project", f"run.dir={tmp_path}", "run.name=mine"])
    arguments = megatron_arguments(run)
    options = {"tensorboard_dir": tmp_path / "tensorboard", "wandb_project": "project", "wandb_exp_name": "mine"}
    options["wandb_save_dir"] = tmp_path / "wandb"
    for name, value in options.items():  # what the YAML compiles to
        assert arguments[arguments.index(f"--{name.replace('_', '-')}") + 1] == str(value)
    pool.run(set_environment, 2, {"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    steps = train(
        pool,
        2,
        tmp_path,
        data_path=text,
        num_layers=1,
        train_iters=3,
        log_attention_communication=True,
        peak_tflops=0.5,
        **options,
        **context_parallel("attention2d", 2, 1),
    )
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    recorded = {
        "lm loss": "loss",
        "grad-norm": "grad_norm",
        "tokens-per-second": "tokens_per_s",
        "tflops-per-gpu": "tflops",
        "mfu": "mfu",
        "memory-gib": "memory_gib",
        "attention-wait": "attention_wait",
    }
    for tag, key in recorded.items():
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx([step[key] for step in steps], rel=1e-5), tag
    assert all(0 < step["attention_wait"] < 1 for step in steps)
    assert all(step["mfu"] == pytest.approx(step["tflops"] / 0.5) for step in steps)
    identity = (tmp_path / "wandb-run-id").read_text().strip()
    (log,) = (tmp_path / "wandb").glob(f"wandb/offline-run-*/run-{identity}.wandb")
    content = log.read_bytes()
    assert all(tag.encode() in content for tag in recorded)


def test_a_run_directory_is_one_run_of_wandb_from_its_first_step_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"RANK": "1", "WORLD_SIZE": "2"})
    args = ["--wandb-project", "project", "--run-dir", str(tmp_path)]

    def identity(args: list[str] = args) -> str | None:
        with wandb_run.continued(args):
            assert ("WANDB_RUN_ID" in os.environ) == (os.environ.get("WANDB_RESUME") == "allow")
            return os.environ.get("WANDB_RUN_ID")

    first = identity()
    assert first != identity(), "a training that begins anew is another run"
    checkpoint = checkpoints.folder(tmp_path / "checkpoints", 3)
    checkpoint.mkdir(parents=True)
    for name in (".metadata", "metadata.json"):
        (checkpoint / name).touch()
    second = identity()
    assert second == identity() == (tmp_path / "wandb-run-id").read_text().strip()
    assert identity(args[2:]) is None
    os.environ["RANK"] = "0"
    assert identity() is None


def set_environment(rank: int, values: dict[str, str]) -> None:
    os.environ.update(values)


def test_a_skipped_step_is_recorded_without_a_norm(tmp_path: Path) -> None:
    console = io.StringIO()
    reporter(tmp_path, console)._report(1, 2.5, None, None)
    assert "grad norm skipped" in console.getvalue()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["grad_norm"] is None


def test_a_step_whose_tokens_are_all_masked_has_no_loss_and_others_have_theirs(pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("b" * 1000)
    masked = {"data_path": indexed.build([tmp_path / "a.txt"], tmp_path / "b"), "null_tokenizer_eod_id": ord("b")}
    options = {"eod_mask_loss": True, "num_layers": 1, "train_iters": 2, **masked}
    for step in train(pool, 2, tmp_path / "run", **options):
        assert (step["loss"], step["grad_norm"]) == (None, 0.0)
    assert math.isnan(read_steps(tmp_path / "run")[2]["loss"])


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_recorded_as_json(loss: float, tmp_path: Path) -> None:
    reporter(tmp_path)._report(1, loss, 1.0, 1e-3)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] == str(loss)
    assert read_steps(tmp_path)[1]["loss"] == pytest.approx(loss, nan_ok=True)


def test_a_resumed_run_repeats_no_step_and_goes_on_counting_seconds(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    first = reporter(tmp_path)
    for step in range(1, 6):
        first._report(step, float(step), 1.0, 1e-3)
    with metrics.open("a") as file:
        file.write('{"step": 6, "los')  # the process was killed while it wrote
    elapsed = json.loads(metrics.read_text().splitlines()[2])["elapsed_s"]
    reporter(tmp_path)._report(4, 40.0, 1.0, 1e-3)
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [(step["step"], step["loss"]) for step in steps] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert steps[-1]["elapsed_s"] == pytest.approx(elapsed + 2.0, abs=0.5)


def test_losses_are_recorded_exactly(tmp_path: Path) -> None:
    loss = 5.051658630371094 / 3
    reporter(tmp_path)._report(1, loss, 1.0, 1e-3)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == loss


PRINTS = """
import os, sys
from megatron_attn2d.training.console import quiet
with quiet(sys.argv[1], rank=3) as console:
    print("upstream")
    print("a complaint", file=sys.stderr)
    os.write(1, b"native code\\n")
    print("ours", file=console)
print("afterwards")
"""


def test_output_goes_to_the_ranks_log_and_back(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PRINTS, tmp_path], capture_output=True, text=True, check=True)
    assert (done.stdout.splitlines(), done.stderr) == (["ours", "afterwards"], "")
    logged = (tmp_path / "logs" / "rank-3.log").read_text().splitlines()
    assert sorted(logged) == ["a complaint", "native code", "upstream"]


def test_without_a_directory_nothing_is_redirected_and_no_file_written(tmp_path: Path) -> None:
    with quiet(None, rank=0) as console:
        assert console is sys.stdout
    reporter(None)._report(1, 1.0, 1.0, 1e-3)
    assert not list(tmp_path.iterdir())
