"""What a run compiles to: Megatron's arguments."""

import re

import pytest

from megatron_attn2d.config import load_run
from megatron_attn2d.config.arguments import embedded_data, left_out
from tests.config.base import BASE, FULL, ROPE, arguments, split_overrides, write_checkpoint


def test_compiles_to_megatrons_arguments(base):
    text = arguments(base)
    for expected in (
        "--num-layers 4 ",
        "--tensor-model-parallel-size 1 ",
        "--pipeline-model-parallel-size 2 ",
        "--context-parallel-size 4 ",
        "--cp-comm-type attention2d ",
        "--hierarchical-context-parallel-sizes 2 2 ",
        "--max-position-embeddings 256 ",
        "--lr 0.001 ",
        "--data-path data/python-standard-library ",
        "--save runs/run/checkpoints --save-interval 60 ",
        "--load runs/run/checkpoints ",
        "--run-dir runs/run ",
    ):
        assert expected in text
    for absent in (
        "--bf16",
        "--fp16",
        "--disable-bias-linear",
        "--num-query-groups",
        "--tensorboard-dir",
        "--mock-data",
        "--attention2d-head-groups",  # one, the default, without a description of the cluster
    ):
        assert absent not in text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("context_parallel.mode=ring", "--cp-comm-type p2p "),
        ("context_parallel.mode=all_gather", "--cp-comm-type all_gather "),
        ("context_parallel.mode=ulysses", "--cp-comm-type a2a "),
        (
            "context_parallel.layer_modes=[attention2d, ring, all_gather, ulysses]",
            "--cp-comm-type attention2d p2p all_gather a2a ",
        ),
        ("context_parallel.grid=[2, 1, 2]", "--hierarchical-context-parallel-sizes 2 1 2 "),
        ("context_parallel.grid=[1, 2, 2]", "--hierarchical-context-parallel-sizes 2 2 "),
        ("context_parallel.grid=[2, 2] context_parallel.tile=[1, 2]", "--hierarchical-context-parallel-sizes 1 2 2 1 "),
        (
            "context_parallel.grid=[2, 2, 1] context_parallel.tile=[1, 1]",
            "--hierarchical-context-parallel-sizes 2 1 1 2 1 ",
        ),
        ("context_parallel.head_groups=2", "--attention2d-head-groups 2 "),
        ("context_parallel.grid=[4, 1]", "--hierarchical-context-parallel-sizes 4 1 "),
        ("context_parallel.grid=[1, 4]", "--hierarchical-context-parallel-sizes 1 4 "),
        ("model.num_query_groups=1", "--hierarchical-context-parallel-sizes 4 1 "),
        ("model.num_query_groups=2", "--group-query-attention --num-query-groups 2 "),
        ("model.kind=hybrid", "--hybrid-layer-pattern *-*-|*-*- "),
        ("model.kind=hybrid parallelism.virtual_pipeline=2", "--hybrid-layer-pattern *-|*-|*-|*- "),
        (
            "model.kind=hybrid context_parallel.layer_modes=[ring, attention2d, attention2d, ring]",
            "--cp-comm-type p2p p2p attention2d attention2d attention2d attention2d p2p p2p ",
        ),
        (
            "model.kind=hybrid megatron_args={num_experts: 4, moe_layer_freq: 2, mtp_num_layers: 2} "
            "model.position_embedding_type=rope",
            "--hybrid-layer-pattern *E*-|*E*-/*-/*- ",
        ),
        (
            "model.kind=hybrid megatron_args={multi_latent_attention: true, window_size: [8, 0], "
            "window_attn_skip_freq: 2}",
            "--window-attn-skip-freq [1,1,0,0,1,1,0,0] --hybrid-layer-pattern +-+-|+-+- ",
        ),
        (
            "model.kind=hybrid model.position_embedding_type=rope megatron_args.no_rope_freq=2",
            "--no-rope-freq [0,0,1,1,0,0,1,1] --hybrid-layer-pattern *-*-|*-*- ",
        ),
        (
            "model.kind=hybrid megatron_args={hybrid_layer_pattern: 'M*M*|-*M*M', window_size: [8, 0], "
            "window_attn_skip_freq: [0, 1, 1, 0]}",
            "--hybrid-layer-pattern M*M*|-*M*M --window-size 8,0 --window-attn-skip-freq [0,0,0,1,1,1,1,0,0] ",
        ),
        (f"{ROPE} model.rope_scaling=linear model.rope_scaling_factor=4", "--rotary-seq-len-interpolation-factor 4 "),
        # 10000 * 4^(32 / 30), heads of 32
        (f"{ROPE} model.rope_scaling=ntk model.rope_scaling_factor=4", "--rotary-base 43873 "),
        (
            f"{ROPE} model.rope_scaling=llama3 model.rope_scaling_factor=16",
            "--use-rope-scaling --rope-scaling-factor 16.0 ",
        ),
        (
            f"{ROPE} model.rope_scaling=yarn model.rope_scaling_factor=4 model.rope_original_length=128",
            "--position-embedding-type yarn --max-position-embeddings 256 --rotary-scaling-factor 4.0 "
            "--yarn-original-max-position-embeddings 128 ",
        ),
        (
            f"{FULL} training.keep_attention_outputs=true training.offload_activations=true "
            "training.loss_chunk_tokens=64",
            "--recompute-num-layers 1 --offload-activations --loss-chunk-tokens 64 ",
        ),
        (f"{FULL} training.keep_attention_outputs=true", "--keep-attention-outputs "),
        ("training.precision=bf16", "--bf16 "),
        ("environment.device=cuda training.cuda_graphs=layer", "--cuda-graph-impl local "),
        (
            "environment.device=cuda training.precision=bf16 training.cuda_graphs=attention",
            "--cuda-graph-impl transformer_engine --cuda-graph-modules attn ",
        ),
        ("environment.device=cuda training.cuda_graphs=iteration", "--cuda-graph-impl full_iteration "),
        (
            "environment.device=cuda training.precision=bf16 training.cuda_graphs=layer "
            "megatron_args.cuda_graph_impl=transformer_engine",
            "--cuda-graph-impl transformer_engine ",
        ),
        (
            "environment.device=cuda training.precision=bf16 training.fp8=delayed",
            "--fp8-recipe delayed --fp8-format hybrid ",
        ),
        (
            "environment.device=cuda training.precision=bf16 training.fp8=blockwise",
            "--fp8-recipe blockwise --fp8-format e4m3 ",
        ),
        (
            "environment.device=cuda training.precision=bf16 training.fp8=delayed megatron_args.fp8_format=e4m3",
            "--fp8-format e4m3 ",
        ),
        ("model.add_bias_linear=false", "--disable-bias-linear "),
        ("data.paths=[a, b]", "--data-path a b "),
        ("data.paths={a: 0.3, b: 0.7}", "--data-path 0.3 a 0.7 b "),
        ("data.mock=true", "--mock-data "),
        ("data.split='98,2,0' training.eval_iters=3 training.eval_interval=20", "--eval-iters 3 "),
        ("training.eval_interval=20", "--eval-interval 20 "),
        ("logging.tensorboard=true run.dir=/x/y", "--tensorboard-dir /x/y/tensorboard "),
        ("logging.wandb_project=p run.name=n", "--tensorboard-dir runs/n/tensorboard "),
        ("logging.attention_communication=true", "--log-attention-communication "),
        ("cluster.peak_tflops=989", "--peak-tflops 989"),
        ("checkpoint.keep_last=3", "--keep-last 3 "),
        ("logging.wandb_project=p run.name=n", "--wandb-project p --timing-log-level 0 "),
        ("logging.wandb_project=p run.name=n", "--wandb-exp-name n --wandb-save-dir runs/n/wandb "),
        ("checkpoint.save_interval=7", "--save-interval 7 "),
        ("megatron_args.ddp_bucket_size=1000", "--ddp-bucket-size 1000 "),
        ("megatron_args={recompute-modules: [mlp, moe]}", "--recompute-modules mlp moe "),
        ("megatron_args.log_progress=true", "--log-progress "),
    ],
)
def test_key_to_argument(base, overrides, expected):
    assert expected in arguments(base, *split_overrides(overrides))


def test_switching_mode_changes_attention_alone(base):
    attention = r"--cp-comm-type \S+ (--hierarchical-context-parallel-sizes \d+ \d+ )?"
    texts = {
        re.sub(attention, "", arguments(base, f"context_parallel.mode={m}"))
        for m in ("attention2d", "ring", "all_gather")
    }
    assert len(texts) == 1


def test_modes_other_than_attention2d_and_one_rank_have_no_grid(base):
    for override in ("context_parallel.mode=ring", "context_parallel.mode=all_gather", "context_parallel.size=1"):
        assert "hierarchical" not in arguments(base, override)


def test_false_and_null_take_back_an_argument_of_an_extended_file(base):
    for value in ("false", "null"):
        given = ["megatron_args.log_progress=true", f"megatron_args.log_progress={value}"]
        assert "--log-progress" not in arguments(base, *given)
    assert "--qk-clip" not in arguments(base, "megatron_args.qk_clip=false")
    assert "--window-size 512,0 " in arguments(base, "megatron_args.window-size=[512, 0]")
    base.write_text(BASE + "megatron_args: {num-experts: 8}\n")
    assert "--num-experts" not in arguments(base, "megatron_args.num_experts=null")


def test_a_run_continues_from_its_own_checkpoint_before_anothers(base, tmp_path):
    overrides = [f"run.dir={tmp_path}/mine", "checkpoint.load=/theirs"]
    assert "--load /theirs " in arguments(base, *overrides)
    assert "--load" not in arguments(base, f"run.dir={tmp_path}/mine", "checkpoint.save=false")
    begun = tmp_path / "mine" / "checkpoints" / "iter_0000004"
    begun.mkdir(parents=True)
    (begun / ".metadata").touch()
    assert "--load /theirs " in arguments(base, *overrides), "killed in its first save"
    (begun / "metadata.json").touch()
    assert f"--load {tmp_path}/mine/checkpoints " in arguments(base, *overrides)


def test_a_start_from_others_weights_is_made_once(base, tmp_path):
    given = [f"run.dir={tmp_path}/mine", "data.mock=true"]
    theirs = f"{tmp_path}/theirs/checkpoints"
    write_checkpoint(tmp_path / "theirs", 4)
    begin = [*given, f"checkpoint.start_from={theirs}", "megatron_args.ckpt_step=4"]
    assert f"--load {tmp_path}/mine/checkpoints --pretrained-checkpoint {theirs} " in arguments(base, *begin)
    assert "--ckpt-step 4" in arguments(base, *begin)
    unsaved = arguments(base, *begin, "checkpoint.save=false")
    assert f"--pretrained-checkpoint {theirs} " in unsaved
    assert "--load" not in unsaved
    onward = [*given, f"checkpoint.load={theirs}", "megatron_args={no_load_optim: true, no_load_rng: true}"]
    assert f"--load {theirs} " in arguments(base, *onward)
    assert "--no-load-optim --no-load-rng" in arguments(base, *onward)
    assert not left_out(load_run(base, onward))
    write_checkpoint(tmp_path / "mine", 3)
    for overrides in (begin, onward):
        continued = arguments(base, *overrides)
        assert continued == arguments(base, *given)
    assert left_out(load_run(base, onward)) == [
        *("checkpoint.load", "megatron_args.no_load_optim", "megatron_args.no_load_rng"),
    ]


def test_the_embedded_data_set_is_where_it_is_built(base, tmp_path, monkeypatch):
    from megatron_attn2d.data import indexed

    monkeypatch.setattr(indexed, "build", lambda files, prefix: prefix)
    run = load_run(base, [f"data.dir={tmp_path}"])
    assert str(indexed.build_default(run.data.dir)) == embedded_data(run)
