"""The picture of the ranks, against Megatron's own groups."""

from pathlib import Path

import pytest

from megatron_attn2d.config import load_run
from megatron_attn2d.preview.topology import context_group, picture

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "runs" / "quickstart.yaml")


def test_ranks_of_the_picture_are_megatrons():
    """Megatron's own generator of rank groups is the reference."""
    from megatron.core.parallel_state import RankGenerator

    sizes = ["parallelism.tensor=2", "parallelism.data=2", "training.global_batch_size=16"]
    for order, extra in (("tp-cp-ep-dp-pp", []), ("tp-cp-ep-pp-dp", ["megatron_args.use_tp_pp_dp_mapping=true"])):
        run = load_run(QUICKSTART, [*sizes, *extra])
        groups = RankGenerator(tp=2, ep=1, dp=2, pp=2, cp=4, order=order).get_ranks("cp")
        ours = [context_group(run, stage, replica) for stage in range(2) for replica in range(2)]
        assert sorted(ours) == sorted(group for group in groups if group[0] % 2 == 0)


def test_rows_and_columns_of_the_picture_are_megatrons_hierarchical_groups(monkeypatch):
    from megatron.core import parallel_state

    groups = {"HIERARCHICAL_CP_L0": [], "HIERARCHICAL_CP_L1": []}
    monkeypatch.setattr(parallel_state, "create_group", lambda ranks, group_desc, **_: groups[group_desc].append(ranks))
    parallel_state.create_hierarchical_groups(-1, list(range(6)), [3, 2], group_desc="CP")
    run = load_run(QUICKSTART, ["context_parallel.size=6", "context_parallel.grid=[3, 2]", "training.seq_length=516"])
    lines = picture(run).splitlines()
    rows = [[int(cell) for cell in line.split()[2:]] for line in lines if line.startswith("    row")][:3]
    columns = [list(column) for column in zip(*rows, strict=True)]
    assert columns == groups["HIERARCHICAL_CP_L0"] == [[0, 1, 2], [3, 4, 5]]  # contiguous groups of R gather K/V
    assert rows == groups["HIERARCHICAL_CP_L1"] == [[0, 3], [1, 4], [2, 5]]  # strided groups of C gather Q


def test_large_pictures_are_cut_and_tensor_ranks_share_a_cell():
    text = picture(load_run(QUICKSTART, ["parallelism.data=4", "parallelism.tensor=2"]))
    assert "... and 4 more" in text
    assert text.count("pipeline stage") == 4
    assert "    row 0        0-1       4-5\n" in text


@pytest.mark.parametrize("mode", ["ring", "all_gather"])
def test_other_modes_are_lines(mode):
    assert "\n    0  1  2  3\n" in picture(load_run(QUICKSTART, [f"context_parallel.mode={mode}"]))
