"""Loss by position, against the same weights applied directly."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_attn2d import cli
from megatron_attn2d.commands import evaluate, evaluation_data
from megatron_attn2d.config import load_run, megatron_arguments, resolved_yaml
from megatron_attn2d.data.build import build
from megatron_attn2d.data.tokenizers import TokenizerChoice
from megatron_attn2d.errors import UsageError
from megatron_attn2d.training import evaluation
from tests.pool import RankPool, call

QUICKSTART = Path(__file__).parents[2] / "configs" / "runs" / "quickstart.yaml"
CONTEXT, SAMPLES = 96, 3


@pytest.fixture(scope="module")
def run_dir(pool: RankPool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps at 64 tokens, as `train` leaves it behind."""
    from megatron_attn2d.training import pretrain_gpt

    directory = tmp_path_factory.mktemp("runs") / "run"
    run = load_run(
        QUICKSTART,
        [
            *("model.kind=gpt", "model.num_layers=2", "model.hidden_size=64"),
            *("model.num_query_groups=2", "model.ffn_hidden_size=128"),
            *("training.seq_length=64", "training.train_iters=2", "optimizer.lr_warmup_iters=0"),
            *("parallelism.pipeline=1", "context_parallel.size=1", "checkpoint.save=true", "checkpoint.keep_last=3"),
            *(f"data.paths=[{text}]", f"run.dir={directory}", "optimizer.use_distributed_optimizer=true"),
            "logging.attention_communication=true",
        ],
    )
    pool.run(call, 1, pretrain_gpt.main, megatron_arguments(run), init_group=False)
    (directory / "config.yaml").write_text(resolved_yaml(run))
    return directory


def evaluated(run_dir: Path, data: Path, output: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    by_position = {} if "tasks" in options else {"buckets": 4}
    options = {"context": CONTEXT, "samples": SAMPLES, **by_position, "data": data, "output": output, **options}
    flags = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    assert cli.main(["eval", str(run_dir), *overrides, *flags]) == 0
    return json.loads(output.read_text())


def direct_losses(rank: int, args: list[str], windows: np.ndarray, target: Path) -> None:
    """The loss of each token of `windows` [n, context + 1], by the logits of the model on one rank."""
    from megatron_attn2d.training import session

    def body(console: Any) -> None:
        _, (model,) = session.set_up_model()
        model.eval()
        tokens = torch.from_numpy(windows.astype(np.int64))
        with torch.no_grad():
            logits = model(tokens[:, :-1], torch.arange(CONTEXT).expand(len(windows), -1), None)
        np.save(target, torch.nn.functional.cross_entropy(logits.mT.double(), tokens[:, 1:], reduction="none").numpy())

    session.run_in_megatron(body, args)


def test_buckets_equal_a_direct_computation_on_any_grid(
    run_dir: Path, pool: RankPool, in_pool: None, text: Path, tmp_path: Path
) -> None:
    one = evaluated(run_dir, text, tmp_path / "one.json", "context_parallel.size=1")
    grid = evaluated(run_dir, text, tmp_path / "grid.json", "context_parallel.size=4", "context_parallel.grid=[2, 2]")

    stream = np.fromfile(f"{text}.bin", dtype=np.uint16)
    windows = np.stack([stream[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(SAMPLES)])
    args = [*megatron_arguments(evaluate.configuration(run_dir, CONTEXT, [])), "--skip-train", "--no-load-rng"]
    target = tmp_path / "losses.npy"
    pool.run(direct_losses, 1, [*args, "--no-load-optim"], windows, target, init_group=False)
    losses = np.load(target)

    places = [(bucket["from"], bucket["to"]) for bucket in one["buckets"]]
    assert places == [(0, 12), (12, 24), (24, 48), (48, 96)]
    for result in (one, grid):
        assert result["loss"] == pytest.approx(losses.mean(), abs=1e-5)
        assert result["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)
        assert (result["tokens"], result["samples"], result["step"]) == (CONTEXT * SAMPLES, SAMPLES, 2)
        for bucket in result["buckets"]:
            assert bucket["loss"] == pytest.approx(losses[:, bucket["from"] : bucket["to"]].mean(), abs=1e-5)
            assert bucket["tokens"] == SAMPLES * (bucket["to"] - bucket["from"])
    assert np.ptp([bucket["loss"] for bucket in one["buckets"]]) > 1e-3, "buckets differ, so a mix-up would show"


def test_pipelines_tensors_and_a_text_file(run_dir: Path, in_pool: None, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("Ring attention passes every key by every rank. " * 20)
    build([text], tmp_path / "set", TokenizerChoice())
    base = evaluated(run_dir, tmp_path / "set", tmp_path / "set.json")
    assert base["samples"] == SAMPLES
    spread = ("parallelism.tensor=2", "parallelism.pipeline=2", "context_parallel.size=2")
    result = evaluated(run_dir, text, tmp_path / "file.json", *spread)
    assert [bucket["loss"] for bucket in result["buckets"]] == pytest.approx(
        [bucket["loss"] for bucket in base["buckets"]], abs=1e-5
    )
    assert not list(run_dir.glob(".eval-*"))


def test_as_many_windows_as_there_are(run_dir: Path, text: Path) -> None:
    tokens = np.fromfile(f"{text}.bin", dtype=np.uint16).size
    assert evaluation_data.samples(text, tokens - 1, 16) == 1
    with pytest.raises(UsageError, match=rf"a window of --context {tokens:,} needs one more than that"):
        evaluation_data.samples(text, tokens, 16)
    assert len(list(evaluation.windows(text, (tokens - 1) // 3))) == 3


@pytest.mark.parametrize(
    ("context", "buckets", "edges"),
    [(96, 4, (0, 12, 24, 48, 96)), (100, 3, (0, 25, 50, 100)), (3, 8, (0, 1, 3)), (64, 1, (0, 64))],
)
def test_buckets_double(context: int, buckets: int, edges: tuple[int, ...]) -> None:
    assert evaluate.bucket_edges(context, buckets) == edges


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--context", "0"], "--context 0: choose 1 or more tokens"),
        (["--context", "64", "--step", "9"], "no complete checkpoint of step 9; there are 2"),
        (["--context", "64", "--samples", "0"], "--samples 0: choose 1 or more"),
        (["--context", "64", "--buckets", "0"], "--buckets 0: choose 1 or more"),
        (["--context", "64", "--data", "missing"], "missing: no data set"),
        (["--context", "64", "-o", "none/e.json"], "--output none/e.json: there is no directory none; make it, or"),
        (["--context", "64", "-o", "."], "--output .: a directory; name a file"),
        (
            ["--context", "64", "--data", "a/"],
            "--data a/: a folder, whose files need a name to begin with",
        ),
        (["--context", "64", "--key", "body"], "--key body: "),
        (["--context", "64", "run.dir=elsewhere"], "run.dir = 'elsewhere': the checkpoint of "),
        (
            ["--context", "96", "training.seq_length=48"],
            "training.seq_length = 48: --context 96 says how long",
        ),
        (
            ["--context", "96", "training.seq_length=192"],
            "training.seq_length = 192: --context 96 says how",
        ),
        (
            ["--context", "96", "model.max_position_embeddings=128"],
            "max_position_embeddings = 128: follows from",
        ),
        (["--context", "64", "parallelism.data=2"], "parallelism.data = 2: eval decides about it; leave it out"),
        (
            ["--context", "64", "data.vocab_size=300"],
            "data.vocab_size = 300: the run was trained with 512",
        ),
        (
            ["--context", "64", "megatron_args.num_layers_per_virtual_pipeline_stage=1"],
            "megatron_args.num_layers_per_virtual_pipeline_stage = 1: one window is evaluated at a time, which an ",
        ),
        (
            ["--context", "64", "megatron_args.pipeline_model_parallel_layout=Et|tL"],
            "pipeline_model_parallel_layout = 'Et|tL': 2 stages, but parallelism.pipeline is 1, and one window is",
        ),
        (["--context", "64", "model.num_layers=1"], "model.num_layers = 1: the run was trained with 2; leave it out"),
        (
            ["--context", "64", "model.rotary_base=99"],
            "model.rotary_base = 99: the run was trained with null",
        ),
        (
            ["--context", "64", "megatron_args.squared_relu=true"],
            "megatron_args.squared_relu = true: the run",
        ),
        (["--context", "65", "context_parallel.size=2"], "--context 65: not a"),
        (
            ["--context", "64", "32"],
            "--context 64 32: loss by position takes one; choose one, or give --tasks",
        ),
        (["--context", "64", "--depths", "3"], "--depths: is about tasks; give --tasks too, or leave it out"),
        (["--context", "64", "--tasks", "neddle"], "--tasks neddle: no such task; did you mean needle?"),
        (
            ["--context", "64", "--tasks", "needle"],
            "--data: none of --tasks needle reads it; add perplexity, or leave it out",
        ),
        (
            ["--context", "64", "--tasks", "perplexity", "--haystack", "books"],
            "--haystack: none of --tasks perplexity reads it; add needle or niah_",
        ),
        (["--context", "64", "--tasks", "perplexity", "--buckets", "4"], "--buckets: is about loss by position; leave"),
        (["--context", "64", "--tasks", "perplexity", "-o", "a.png"], "--output a.png: is the JSON file's name, and"),
        (["--context", "1", "64", "--tasks", "perplexity"], "--context 1: perplexity takes two tokens at least"),
        (["--context", "64", "--tasks", "perplexity", "needle"], "--context 64: needle takes 2"),
        (["--context", "64", "--tasks", "qa", "perplexity"], "--tasks qa: asks about documents of yours; give --quest"),
        (["--context", "64", "--tasks", "perplexity", "--samples", "0"], "--samples 0: choose 1 or more"),
        (["--context", "64", "--tasks", "perplexity", "training.seq_length=32"], "training.seq_length = 32: a text is"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, run_dir: Path, text: Path, capsys) -> None:
    assert cli.main(["eval", str(run_dir), "--data", str(text), *words]) == 2
    assert message in capsys.readouterr().err


def test_an_output_that_may_not_be_written_is_refused(run_dir: Path, text: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != run_dir)
    assert cli.main(["eval", str(run_dir), "--data", str(text), "--context", "64"]) == 2
    assert f"--output {run_dir}/eval-64.json: {run_dir} can't be written to" in capsys.readouterr().err


def test_the_table_is_printed_although_the_file_cannot_be_written(tmp_path: Path) -> None:
    request = evaluation.Request("set", "set", 1, (0, 4), "", 2)
    result = evaluation.summary(request, 4, torch.tensor([[8.0], [4.0]]))
    console = io.StringIO()
    with pytest.raises(FileNotFoundError):
        evaluation._deliver(result, str(tmp_path / "none" / "e.json"), console)
    assert console.getvalue() == evaluation.table(result) + "\n"


STAGES = [
    # stages of the training, those of eval, what is left of the former
    ("parallelism.virtual_pipeline=2", 2, {}),
    ("megatron_args.num_layers_per_virtual_pipeline_stage=1", 2, {}),
    ("megatron_args.pipeline_model_parallel_layout='Et|tttL'", 2, {"pipeline_model_parallel_layout": "Et|tttL"}),
    ("megatron_args.pipeline_model_parallel_layout='Et|tttL'", 4, {}),
    ("megatron_args.pipeline_model_parallel_layout='Et|t|t|tL'", 2, {}),
    ("megatron_args.pipeline_model_parallel_layout='Et|t|t|tL'", 4, {"pipeline_model_parallel_layout": "Et|t|t|tL"}),
    ("megatron_args.decoder_first_pipeline_num_layers=1", 2, {"decoder_first_pipeline_num_layers": 1}),
    ("megatron_args.decoder_first_pipeline_num_layers=1", 1, {}),
]


@pytest.mark.parametrize(("given", "pipeline", "left"), STAGES)
def test_stages_of_training_alone_are_left_out(
    given: str, pipeline: int, left: dict[str, Any], run_dir: Path, tmp_path: Path
) -> None:
    trained = ("model.num_layers=4", "parallelism.pipeline=2", "training.global_batch_size=4", given)
    (tmp_path / "config.yaml").write_text(resolved_yaml(load_run(run_dir / "config.yaml", trained)))
    run = evaluate.configuration(tmp_path, 64, [f"parallelism.pipeline={pipeline}"])
    assert run.parallelism.virtual_pipeline is None
    assert {name: value for name, value in run.megatron_args.items() if value is not None} == left


def test_a_run_on_made_up_data_is_evaluated_on_any(run_dir: Path, tmp_path: Path) -> None:
    made_up = ("data.paths=[]", "data.mock=true", "data.vocab_size=1000", "data.null_tokenizer_eod_id=null")
    (tmp_path / "config.yaml").write_text(resolved_yaml(load_run(run_dir / "config.yaml", made_up)))
    assert evaluate.configuration(tmp_path, 64, []).data.vocab_size == 1000


def test_a_key_and_a_set_of_another_tokenizer(run_dir: Path, in_pool: None, tmp_path: Path, capsys) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"body": "Ring attention passes every key by every rank. " * 20}) + "\n")
    assert evaluated(run_dir, lines, tmp_path / "e.json", key="body", samples=1)["data"] == str(lines)
    build([lines], tmp_path / "set", TokenizerChoice(), key="body")
    described = (tmp_path / "set.json").read_text().replace('"bytes"', '"huggingface"').replace("256", "600")
    (tmp_path / "set.json").write_text(described)
    assert cli.main(["eval", str(run_dir), "--data", str(tmp_path / "set"), "--context", "64"]) == 2
    assert "holds token ids up to 600 of tokenizer huggingface" in capsys.readouterr().err


def test_tasks_score_alike_on_any_grid(run_dir: Path, in_pool: None, text: Path, tmp_path: Path, capsys) -> None:
    tasks = {"tasks": "needle perplexity fwe", "context": "600 400", "depths": 2, "samples": 1, "digits": 2}
    one = evaluated(run_dir, text, tmp_path / "one.json", **tasks)
    grid = evaluated(run_dir, text, tmp_path / "grid.json", "context_parallel.size=2", "parallelism.data=2", **tasks)
    assert grid["answers"] == one["answers"]
    assert [(answer["task"], answer["context"]) for answer in one["answers"]] == [
        (task, context) for context in (400, 600) for task in ("needle", "needle", "fwe")
    ]
    for context in ("400", "600"):
        assert grid["perplexity"][context] == pytest.approx(one["perplexity"][context], rel=1e-5)
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_learned_positions_end_where_training_did(run_dir: Path, tmp_path: Path) -> None:
    config = (run_dir / "config.yaml").read_text().replace("type: rope", "type: learned_absolute")
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(UsageError, match="the run has learned 64 positions, --context is 96; choose --context 64 or"):
        evaluate.configuration(tmp_path, 96, [])
    assert evaluate.configuration(tmp_path, 32, []).model.max_position_embeddings == 64
