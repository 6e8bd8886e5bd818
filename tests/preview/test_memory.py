"""The estimate of memory, and every run that we ship against it."""

from pathlib import Path

import pytest

from megatron_attn2d.config import load_run
from megatron_attn2d.errors import UsageError
from megatron_attn2d.preview.memory import GIB, check, estimate, estimate_host, report
from megatron_attn2d.preview.parameters import parameters

ROOT = Path(__file__).parents[2]
RUNS = sorted((ROOT / "configs" / "runs").glob("*.yaml"))
MODELS = sorted((ROOT / "configs" / "models").glob("*_*[0-9][bm].yaml"))
ON_GPUS = [path for path in RUNS if load_run(path).environment.device == "cuda"]
MODES = ("attention2d", "ring", "all_gather")
RUN = """
extends: {model}
optimizer: {{lr: 1e-4}}
training: {{train_iters: 10, seq_length: 2048, global_batch_size: 1}}
data: {{mock: true}}
"""


def size_in_name(name):
    """'gpt3_2.7b_16gpus' -> 2.7e9"""
    size = name.split("_")[1]
    return float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]


@pytest.fixture
def of_model(tmp_path):
    def load(model, *overrides):
        (tmp_path / "run.yaml").write_text(RUN.format(model=model))
        return load_run(tmp_path / "run.yaml", overrides)

    return load


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_has_as_many_parameters_as_its_name_says(path, of_model):
    assert parameters(of_model(path)).total == pytest.approx(size_in_name(path.stem), rel=0.03)


def test_the_models_are_the_family():
    names = {path.stem for path in MODELS}
    gpt3 = {f"gpt3_{size}" for size in ("125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b", "175b")}
    assert names == gpt3 | {"llama_8b", "llama_70b", "qwen3_8b"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ON_GPUS, ids=lambda path: path.stem)
def test_a_run_that_we_ship_fits_its_cards(path, mode):
    run = load_run(path, [f"context_parallel.mode={mode}"])
    assert estimate(run).total < 0.9 * run.cluster.memory_gib * GIB
    assert "fits" in report(run)
    check(run)
    assert run.world_size == (run.environment.nodes or 1) * 8
    assert run.model.num_attention_heads % run.parallelism.tensor == 0
    assert run.model.num_layers % run.parallelism.pipeline == 0
    assert parameters(run).total == pytest.approx(size_in_name(path.stem), rel=0.03)


@pytest.mark.parametrize("length", [8192, 16384, 32768, 65536, 131072])
@pytest.mark.parametrize("gpus", [16, 64])
@pytest.mark.parametrize("model", ["760m", "2.7b", "13b"])
def test_the_papers_cases_at_each_length(model, gpus, length):
    path = ROOT / "configs" / "runs" / f"gpt3_{model}_{gpus}gpus.yaml"
    for mode in MODES:
        run = load_run(path, [f"training.seq_length={length}", f"context_parallel.mode={mode}"])
        assert run.world_size == gpus
        assert estimate(run).total < 0.9 * run.cluster.memory_gib * GIB


def test_a_run_that_does_not_fit_is_told_so():
    run = load_run(ROOT / "configs" / "runs" / "gpt3_175b_32k.yaml", ["parallelism.pipeline=1", "environment.nodes=16"])
    assert "of 79 GiB: DOES NOT FIT" in report(run)
    # 174.6 B weights over 8 tensor ranks: 6 bytes each, and 12 over 16 context ranks.
    held = estimate(run)
    assert held.weights + held.gradients + held.optimizer == pytest.approx(174.6e9 / 8 * 6.75, rel=0.01)


def test_what_makes_memory_grow():
    """The dominating terms, one at a time."""

    def of(*overrides):
        path = ROOT / "configs" / "runs" / "gpt3_2.7b_16gpus.yaml"
        return estimate(load_run(path, ["context_parallel.grid=[4, 4]", "context_parallel.head_groups=1", *overrides]))

    base, twice = of(), of("training.seq_length=65536")
    assert (twice.activations, twice.attention) == (2 * base.activations, 2 * base.attention)
    assert twice.weights == base.weights
    assert of("optimizer.use_distributed_optimizer=false").optimizer == 16 * base.optimizer
    full = of(*(f"training.recompute_{key}" for key in ("granularity=full", "method=uniform", "num_layers=1")))
    assert full.activations + full.layer < base.activations / 8
    # 16 ranks, MHA, in shards of Q: a column has keys of 15 others, a square queries and keys of four.
    column = of("context_parallel.grid=[16, 1]")
    assert column.attention / base.attention == pytest.approx((4 * 15 + 3 + 3) / (4 * 4 + 4 * 4 + 4 + 3))
    assert of("context_parallel.mode=ring", "context_parallel.grid=auto").attention < base.attention
    # A shared table is held once on one stage, by the first and the last on two.
    two = of("parallelism.pipeline=2", "context_parallel.size=8", "context_parallel.grid=[4, 2]")
    assert two.weights == pytest.approx((base.weights + 2 * 50304 * 2560) / 2, rel=1e-3)


LONG = ROOT / "configs" / "runs" / "llama_8b_1m.yaml"


def test_a_million_tokens_part_by_part():
    run = load_run(LONG)
    held, host = estimate(run), estimate_host(run)
    tokens = 2**20 // 4  # of a tensor pair
    assert held.total < 75e9
    assert held.activations == tokens * (2 * (4096 + 4096) + 4 * 32)  # two layers: a half of each on each tensor rank
    # 32 layers of 8 ranks: input and output, 1 GiB each, and a log-sum-exp of 16 heads in fp32.
    assert host.activations == 32 * 8 * (2 * 2**30 + tokens * 16 * 4)
    assert "the host of a node" in report(run)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("training.offload_activations=false", "largest part is activations, .*training.offload_activations=true"),
        ("training.loss_chunk_tokens=null", "largest part is logits, .*training.loss_chunk_tokens=2048"),
        (
            "training.recompute_granularity=null training.recompute_method=null training.recompute_num_layers=null "
            "training.keep_attention_outputs=false training.offload_activations=false",
            "largest part is activations, .*training.recompute_granularity=full",
        ),
        ("cluster.host_memory_gib=500", "a node .* cluster.host_memory_gib is 500; .*keep_attention_outputs=false"),
    ],
)
def test_without_a_lever_a_million_tokens_do_not_fit(overrides, message):
    with pytest.raises(UsageError, match=message):
        check(load_run(LONG, overrides.split()))


def test_the_mode_that_takes_most_counts():
    path, modes = ROOT / "configs" / "runs" / "gpt3_125m_8k.yaml", ["ring"] + 11 * ["attention2d"]
    sizes = ["context_parallel.size=2", "training.seq_length=131072", "context_parallel.grid=[2,1]"]
    attention2d, ring, both = (
        estimate(load_run(path, [*sizes, *given])).attention
        for given in (
            [],
            ["context_parallel.mode=ring", "context_parallel.grid=auto"],
            [f"context_parallel.layer_modes={modes}"],
        )
    )
    assert both == ring > attention2d


def test_what_is_not_estimated_is_said():
    path = ROOT / "configs" / "runs" / "gpt3_125m_8k.yaml"
    for given in ("num_experts=8", "num-experts=8", "mtp_num_layers=1", "hybrid_layer_pattern='*-*-'"):
        assert "no estimate of memory with it" in report(load_run(path, [f"megatron_args.{given}"]))
    words = ["data.tokenizer_type=HuggingFaceTokenizer", "data.tokenizer_model=/t", "data.vocab_size=null"]
    words += ["data.null_tokenizer_eod_id=null"]
    assert "vocabulary of HuggingFaceTokenizer is not known" in report(load_run(path, words))
