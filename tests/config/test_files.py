"""What only the files of a machine tell."""

import contextlib
import re

import pytest

from megatron_attn2d.config import ConfigError, load_run, resolved_yaml
from megatron_attn2d.config.files import check_files
from tests.config.base import split_overrides, write_checkpoint


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("", ""),
        ("megatron_args.ckpt_step=4", ""),
        (
            "megatron_args.ckpt_step=5",
            "megatron_args.ckpt_step = 5: there is no checkpoint of that step in {theirs}; complete ones: 4",
        ),
        (
            "training.train_iters=80",
            "training.train_iters = 80: the run in {run} was begun with 60; choose 60, or another checkpoint.load, or "
            "name it in checkpoint.may_change, or take the weights alone by checkpoint.start_from",
        ),
        (
            "model.num_layers=2",
            "model.num_layers = 2: the run in {run} was begun with 4; choose 4, or another checkpoint.load",
        ),
    ],
)
def test_what_a_start_reads_of_another_run_must_fit(base, tmp_path, overrides, expected):
    theirs = tmp_path / "theirs"
    write_checkpoint(theirs, 4)
    (theirs / "config.yaml").write_text(resolved_yaml(load_run(base, ["data.mock=true"])))
    given = [f"run.dir={tmp_path}/mine", "data.mock=true", f"checkpoint.load={theirs}/checkpoints"]
    run = load_run(base, [*given, *split_overrides(overrides)] if overrides else given)
    message = expected.format(run=theirs, theirs=theirs / "checkpoints")
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$") if expected else contextlib.nullcontext():
        check_files(run)
    if "ckpt_step" not in overrides:
        (theirs / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("9")
        with pytest.raises(ConfigError, match="names it, but there is no checkpoint of that step in "):
            check_files(run)


def test_a_runs_directory_in_place_of_its_checkpoints_is_told(base, tmp_path):
    write_checkpoint(tmp_path / "theirs", 4)
    given = [f"run.dir={tmp_path}/mine", "data.mock=true", f"checkpoint.start_from={tmp_path}/theirs"]
    with pytest.raises(ConfigError, match=f"; name {re.escape(str(tmp_path))}/theirs/checkpoints, or null$"):
        check_files(load_run(base, given))
