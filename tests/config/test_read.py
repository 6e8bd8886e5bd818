"""From a file to a run: mistakes, ranks and replicas, and back to YAML."""

import importlib.metadata
import importlib.util
import re

import pytest
import yaml

from megatron_attn2d import config
from megatron_attn2d.config import ConfigError, load_run, resolved_yaml
from tests.config.base import arguments, split_overrides


def test_every_mistake_is_reported_at_once(base):
    with pytest.raises(ConfigError) as caught:
        load_run(base, ["model.num_layers=x", "model.swiglu=1", "optimizer.rate=1"])
    assert [line.partition(" ")[0] for line in str(caught.value).splitlines()] == [
        "model.num_layers",
        "model.swiglu",
        "optimizer.rate:",
    ]
    with pytest.raises(ConfigError) as caught:
        load_run(base, ["training.seq_length=252", "optimizer.min_lr=1"])
    assert len(str(caught.value).splitlines()) == 2


def test_libraries_that_a_key_needs_are_named_when_missing(base, monkeypatch):
    find_spec, cuda = importlib.util.find_spec, "environment.device=cuda"
    missing = {"wandb", "nvidia_resiliency_ext"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find_spec(name))
    with pytest.raises(ConfigError, match=r"wandb_project = 'p': wandb is not installed; pip install 'megatron-attn2d"):
        load_run(base, ["logging.wandb_project=p"])
    with pytest.raises(ConfigError, match=r"async_save = true: .* by nvidia_resiliency_ext, which is not installed"):
        load_run(base, ["checkpoint.async_save=true"])
    missing.clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    assert "--async-save --use-persistent-ckpt-worker " in arguments(base, cuda, "checkpoint.async_save=true")
    assert "--async-save --run-dir" in arguments(base, "checkpoint.async_save=true")
    key = "logging.attention_communication=true"
    with pytest.raises(ConfigError, match="mode = ring is Transformer Engine's, whose messages are not followed"):
        load_run(base, [key, cuda, "context_parallel.mode=ring"])
    assert load_run(base, [key, cuda]).logging.attention_communication


@pytest.mark.parametrize(
    "given",
    [
        "decoder_first_pipeline_num_layers=1",
        "pipeline_model_parallel_layout='Et|tttL'",
        "account_for_loss_in_pipeline_split=true",
    ],
)
def test_megatron_shares_layers_out_unevenly_where_it_is_told_to(base, given):
    layers = ["parallelism.pipeline=2", "model.num_layers=3", "environment.nodes=null"]
    with pytest.raises(ConfigError, match=r"do not share model\.num_layers = 3 evenly"):
        load_run(base, layers)
    assert load_run(base, [*layers, f"megatron_args.{given}"]).model.num_layers == 3


@pytest.mark.parametrize(
    ("overrides", "world_size", "ranks", "replicas"),
    [
        ("run.name=x", None, 8, 1),
        ("parallelism.data=2", None, 16, 2),
        ("run.name=x", 32, 32, 4),
        ("parallelism.data=4", 32, 32, 4),
        ("environment.device=cuda environment.gpus_per_node=8", None, 8, 1),
        ("environment.device=cuda environment.gpus_per_node=8 environment.nodes=4", None, 32, 4),
        ("environment.device=cuda environment.gpus_per_node=8 environment.nodes=4", 32, 32, 4),
    ],
)
def test_replicas_are_what_the_world_leaves(base, overrides, world_size, ranks, replicas):
    run = load_run(base, split_overrides(overrides), world_size=world_size)
    assert (run.world_size, run.data_parallel_size) == (ranks, replicas)


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        ("run.name=x", 12, "world size = 12: not a multiple of"),
        ("parallelism.data=2", 8, "parallelism.data = 2: with 8 ranks per replica that is 16 ranks, but there are 8"),
        (
            "environment.device=cuda environment.gpus_per_node=8 environment.nodes=2",
            8,
            "environment.nodes = 2: 16 ranks in all, but 8 were started; start 16, or override environment.nodes",
        ),
    ],
)
def test_ranks_that_do_not_fit_are_refused(base, overrides, world_size, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run(base, split_overrides(overrides), world_size=world_size)


def test_resolved_yaml_loads_back_to_the_same_run(base, tmp_path):
    run = load_run(
        base, ["data.paths={a: 1, b: 2.5}", "megatron_args.note=1e-4", "environment.variables={A: 'no', B: 3}"]
    )
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(resolved_yaml(run))
    assert load_run(resolved) == run
    assert yaml.safe_load(resolved.read_text())["parallelism"]["data"] == 1


def test_public_names():
    assert all(hasattr(config, name) for name in config.__all__)
