"""Files that extend each other, and overrides of what they say."""

import contextlib
import re
from operator import attrgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_attn2d.config import ConfigError, load_run
from megatron_attn2d.config.yaml_io import dump, parse
from tests.config.base import BASE, unhurried


def test_unreadable_files_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "run.yaml", tmp_path / "latin.yaml"):
        (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            load_run(path)


def test_extends_merges_in_order_relative_to_the_file(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "deep.yaml").write_text("model: {num_layers: 2, hidden_size: 64}\n")
    (tmp_path / "parts" / "a.yaml").write_text("extends: deep.yaml\nmodel: {num_layers: 4}\ndata: {vocab_size: 256}\n")
    (tmp_path / "parts" / "b.yaml").write_text("model: {num_attention_heads: 8}\ndata: {vocab_size: 512}\n")
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(
        "extends: [parts/a.yaml, parts/b.yaml]\n"
        "optimizer: {lr: 1e-3}\ntraining: {train_iters: 9, seq_length: 8, global_batch_size: 1}\ndata:\n"
    )
    run = load_run(run_yaml, ["model.hidden_size=128", "data={paths: [c]}"])
    assert (run.model.num_layers, run.model.hidden_size, run.model.num_attention_heads) == (4, 128, 8)
    assert (run.data.paths, run.data.vocab_size) == (["c"], 512)  # an empty heading changes nothing


SECTIONS_MERGE_VALUES_REPLACE = [
    # a key, what a file says, what one that extends it or the command line says, what holds
    ("data.paths", "{paths: {a: 0.7, b: 0.3}}", "{paths: {c: 1.0}}", {"c": 1.0}),
    ("data.paths", "{paths: {a: 0.7, b: 0.3}}", "{paths+: {c: 1.0, b: 0.5}}", {"a": 0.7, "b": 0.5, "c": 1.0}),
    ("data.paths", "{paths: {a: 0.7}}", "{paths: [c]}", ["c"]),
    ("data.paths", "{paths: [a, b]}", "{paths: [c]}", ["c"]),
    ("data.paths", "{paths: [a, b]}", "{paths+: [c]}", ["a", "b", "c"]),
    ("data.paths", "{vocab_size: 300}", "{paths+: [c]}", ["c"]),
    ("data.vocab_size", "{vocab_size: 300, paths: [a]}", "{paths: [c]}", 300),
    ("environment.variables", "{variables: {A: 1, B: 2}}", "{variables: {C: 3}}", {"C": 3}),
    ("environment.variables", "{variables: {A: 1, B: 2}}", "{variables+: {B: 3}}", {"A": 1, "B": 3}),
    ("slurm.sbatch", "{sbatch: {partition: gpu, time: 9}}", "{sbatch: {time: 8}}", {"time": 8}),
    ("slurm.sbatch", "{sbatch: {partition: gpu}}", "{sbatch: {}}", {}),
    (
        "megatron_args",
        "{log_progress: true, recompute-modules: [mlp]}",
        "{log-progress: null, recompute_modules+: [moe]}",
        {"log_progress": None, "recompute_modules": ["mlp", "moe"]},
    ),
]


@pytest.mark.parametrize(("key", "parent", "child", "holds"), SECTIONS_MERGE_VALUES_REPLACE)
def test_sections_merge_and_values_replace_in_files_and_on_the_command_line(base, tmp_path, key, parent, child, holds):
    section = key.partition(".")[0]
    (tmp_path / "parent.yaml").write_text(f"extends: run.yaml\n{section}: {parent}\n")
    (tmp_path / "child.yaml").write_text(f"extends: parent.yaml\n{section}: {child}\n")
    by_key = [f"{section}.{name}={dump(value)}" for name, value in parse(child, "child").items()]
    for path, overrides in (("child", []), ("parent", [f"{section}={child}"]), ("parent", by_key)):
        assert attrgetter(key)(load_run(tmp_path / f"{path}.yaml", overrides)) == holds


def test_one_entry_of_a_table_is_set_on_the_command_line(base):
    run = load_run(base, ["data.paths={a: 1}", "data.paths.corpus/v1.5=0.5", "slurm.sbatch.time=60", "model={}"])
    assert (run.data.paths, run.slurm.sbatch) == ({"a": 1.0, "corpus/v1.5": 0.5}, {"time": 60})


def test_a_file_may_be_extended_twice_but_not_in_a_circle(tmp_path):
    (tmp_path / "leaf.yaml").write_text(BASE)
    (tmp_path / "a.yaml").write_text("extends: leaf.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: leaf.yaml\n")
    (tmp_path / "diamond.yaml").write_text("extends: [a.yaml, b.yaml]\n")
    assert load_run(tmp_path / "diamond.yaml").model.num_layers == 4
    (tmp_path / "leaf.yaml").write_text("extends: diamond.yaml\n")
    with pytest.raises(ConfigError, match=r"circle \(diamond.yaml -> a.yaml -> leaf.yaml -> diamond.yaml\)"):
        load_run(tmp_path / "diamond.yaml")


@unhurried
@given(override=st.text() | st.from_regex(r"(model|data|training|megatron_args)\.[a-z_]+=.{0,12}", fullmatch=True))
def test_any_override_is_applied_or_refused(override, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(BASE)
    with contextlib.suppress(ConfigError):
        load_run(path, [override])
