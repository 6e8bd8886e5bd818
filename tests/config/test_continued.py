"""A run goes on as it was begun."""

from unittest import mock

import pytest

from megatron_attn2d.config import ConfigError, load_run, resolved_yaml
from megatron_attn2d.config.continued import check_continued
from megatron_attn2d.config.files import check_files
from megatron_attn2d.run.checkpoints import begin_save, keep_configuration
from tests.config.base import split_overrides, write_checkpoint

CONTINUED = {
    "run.name=x logging.tensorboard=true context_parallel.mode=ring training.micro_batch_size=2": "",
    "megatron_args.log_progress=true megatron_args.recompute_modules=[mlp] megatron_args.ddp_bucket_size=9": "",
    # the learning rate's course
    "training.train_iters=80": (
        "training.train_iters = 80: the run in {run} was begun with 60; choose 60, or another run.dir, or name it in "
        "checkpoint.may_change"
    ),
    "training.train_iters=80 checkpoint.may_change=[training.train_iters]": "",
    "optimizer.lr=1e-4": "optimizer.lr = 0.0001: the run in {run} was begun with 0.001; choose 0.001, or another ...",
    "optimizer.lr=1e-4 checkpoint.may_change=[training.seed]": "optimizer.lr = 0.0001: the run in {run} was begun ...",
    "optimizer.lr_decay_iters=100": "optimizer.lr_decay_iters = 100: the run in {run} was begun with null; choose ...",
    "megatron_args.lr_warmup_init=1e-5": "megatron_args.lr_warmup_init = 1e-05: the run in {run} was begun ...",
    # the order of the data
    "training.seed=3": "training.seed = 3: the run in {run} was begun with 1234; choose 1234, or another ...",
    "training.seq_length=128": "model.max_position_embeddings = 128: the run in {run} was begun with 256; choose ...",
    "training.seq_length=128 model.max_position_embeddings=256": (
        "training.seq_length = 128: the run in {run} was begun with 256; choose 256, or another run.dir, or name it ..."
    ),
    "training.seq_length=512 training.seed=3 checkpoint.may_change=[training.seed,training.seq_length]": (
        # learned positions
        "model.max_position_embeddings = 512: the run in {run} was begun with 256; choose 256, or another run.dir"
    ),
    "data.split='98,1,1'": "data.split = '98,1,1': the run in {run} was begun with '1,0,0'; choose '1,0,0', or ...",
    "data.mock=false": "data.mock = false: the run in {run} was begun with true; choose true, or another ...",
    "megatron_args.dataloader_type=cyclic": "megatron_args.dataloader_type = 'cyclic': the run in {run} was begun ...",
    # the loss
    "model.hidden_dropout=0.1": "model.hidden_dropout = 0.1: the run in {run} was begun with 0.0; choose 0.0, or ...",
    "megatron_args.eod_mask_loss=true": "megatron_args.eod_mask_loss = true: the run in {run} was begun with null; ...",
    "megatron_args.eod_mask_loss=true checkpoint.may_change=[megatron_args.eod_mask_loss]": "",
    "megatron_args.rotary_seq_len_interpolation_factor=2": "megatron_args.rotary_seq_len_interpolation_factor = 2: ...",
    "megatron_args.no_rope_freq=4": "megatron_args.no_rope_freq = 4: the run in {run} was begun with null; ...",
    "megatron_args.rope_type=yarn": "megatron_args.rope_type = 'yarn': the run in {run} was begun with null; ...",
    "megatron_args.rotary_scaling_factor=8": "megatron_args.rotary_scaling_factor = 8: the run in {run} was begun ...",
    "megatron_args.mscale_all_dim=1": "megatron_args.mscale_all_dim = 1: the run in {run} was begun with null; ...",
    "megatron_args.moe_z_loss_coeff=0.1": "megatron_args.moe_z_loss_coeff = 0.1: the run in {run} was begun ...",
    # weights and states
    "model.num_layers=2": "model.num_layers = 2: the run in {run} was begun with 4; choose 4, or another run.dir",
    "model.kind=hybrid": "",
    "model.swiglu=true": "model.swiglu = true: the run in {run} was begun with false; choose false, or another run.dir",
    "model.rotary_base=100": "model.rotary_base = 100: the run in {run} was begun with null; choose null, or ...",
    "model.norm_epsilon=0.1": "model.norm_epsilon = 0.1: the run in {run} was begun with null; choose null, or ...",
    "model.max_position_embeddings=256": "",
    "training.precision=bf16": "training.precision = 'bf16': the run in {run} was begun with 'fp32'; choose ...",
    "optimizer.adam_beta1=0.8": "optimizer.adam_beta1 = 0.8: the run in {run} was begun with 0.9; choose 0.9, or ...",
    "optimizer.use_distributed_optimizer=true": (
        "optimizer.use_distributed_optimizer = true: the run in {run} was begun with false; choose false, or another "
        "run.dir"
    ),
    "megatron_args.window_size=[7,0]": (
        "megatron_args.window_size = [7, 0]: the run in {run} was begun with null; choose null, or another run.dir"
    ),
    "megatron_args.num_experts=4": "megatron_args.num_experts = 4: the run in {run} was begun with null; choose ...",
    "megatron_args.hybrid_override_pattern='*-'": "megatron_args.hybrid_override_pattern = '*-': the run in {run} ...",
    "megatron_args.squared_relu=false megatron_args.log_progress=true": "",
    "megatron_args.softmax_type=vanilla megatron_args.v_head_dim='128' megatron_args.rope_scaling_factor=8": "",
    "data.vocab_size=1024": "data.vocab_size = 1024: the run in {run} was begun with 512; choose 512, or another ...",
}


@pytest.mark.parametrize("overrides", CONTINUED)
def test_a_run_is_continued_as_it_was_begun(base, tmp_path, overrides):
    given = [f"run.dir={tmp_path}/mine", "data.mock=true"]
    changed = load_run(base, [*given, *split_overrides(overrides)])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text(resolved_yaml(load_run(base, given)))
    assert not [*check_continued(changed)]  # nothing has been saved yet
    write_checkpoint(tmp_path / "mine", 4)
    messages = [str(error) for error in check_continued(changed)]
    expected = CONTINUED[overrides].format(run=tmp_path / "mine")
    if expected.endswith("..."):
        assert messages[0].startswith(expected.removesuffix("..."))
    else:
        assert messages == ([expected] if expected else [])


@pytest.mark.parametrize(("begun", "now"), [("[7, 0]", "'7,0'"), ("'7,0'", "[7, 0]")])
def test_a_run_is_continued_with_the_same_in_other_words(base, begun, now, tmp_path):
    directory = [f"run.dir={tmp_path / 'run'}", "data.mock=true"]
    (tmp_path / "run").mkdir()
    run = load_run(base, [*directory, f"megatron_args.window_size={begun}"])
    (tmp_path / "run" / "config.yaml").write_text(resolved_yaml(run))
    with mock.patch("megatron_attn2d.run.checkpoints.last_complete", return_value=1):
        check_files(load_run(base, [*directory, f"megatron_args.window_size={now}"]))
        with pytest.raises(ConfigError, match=r"megatron_args.window_size = \[8, 0\]: the run in .* was begun with"):
            check_files(load_run(base, [*directory, "megatron_args.window_size=[8, 0]"]))


def test_a_gpt_does_not_go_on_from_a_hybrid_model(base, tmp_path):
    (tmp_path / "config.yaml").write_text(resolved_yaml(load_run(base, ["model.kind=hybrid", f"run.dir={tmp_path}"])))
    write_checkpoint(tmp_path, 4)
    [error] = check_continued(load_run(base, [f"run.dir={tmp_path}"]))
    assert str(error).startswith(f"model.kind = 'gpt': the run in {tmp_path} was begun with 'hybrid'; choose 'hybrid'")


def test_a_start_that_saved_nothing_leaves_the_run_as_it_was(base, tmp_path):
    given = [f"run.dir={tmp_path}", "data.mock=true"]
    write_checkpoint(tmp_path, 4)
    (tmp_path / "config.yaml").write_text(resolved_yaml(load_run(base, given)))
    keep_configuration(tmp_path / "checkpoints", 4, tmp_path)
    (tmp_path / "config.yaml").write_text(resolved_yaml(load_run(base, [*given, "training.seed=3"])))
    assert not [*check_continued(load_run(base, given))]
    begin_save(tmp_path / "checkpoints", 4)
    for name in (".metadata", "metadata.json"):
        (tmp_path / "checkpoints" / "iter_0000004" / name).touch()
    assert [error.key for error in check_continued(load_run(base, given))] == ["training.seed"]
