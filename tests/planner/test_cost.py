"""The cost model at its limits, where the answer is known, and what the command prints."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import yaml

from megatron_attn2d.cli import main
from megatron_attn2d.config import load_run, resolved_yaml
from megatron_attn2d.config.auto import cluster, predictions, workload
from megatron_attn2d.planner.cost import (
    EXCHANGE_STARTS,
    GRID_STARTS,
    HEADS_STARTS,
    PEER_STARTS,
    RING_STARTS,
    Candidate,
    Cluster,
    candidates,
    launches,
    plan,
    predict,
    transient_bytes,
)
from megatron_attn2d.planner.traffic import Workload
from megatron_attn2d.preview import growth
from megatron_attn2d.preview.predictions import report, verdict, with_recomputation

NODES = Cluster(8, 360e9, 45e9, 45e9, 5e-6, 12e-6, 2e-6, 620e12, 550e12)
MHA = Workload(seq=32768, heads=40, kv_heads=40, head_dim=128)
RING = Candidate("ring", None, None)


def best(ranks: int, work: Workload, cluster: Cluster = NODES) -> Candidate:
    return plan(ranks, work, cluster)[0].candidate


def test_an_infinitely_fast_network_leaves_the_kernels() -> None:
    free = replace(NODES, intra_bytes_per_s=1e30, nic_bytes_per_s=1e30, rank_nic_bytes_per_s=1e30)
    free = replace(free, intra_latency_s=0.0, nic_latency_s=0.0, message_s=0.0)
    for prediction in plan(16, MHA, free):
        assert prediction.total_s == pytest.approx(prediction.kernels_s)


def test_an_infinitely_fast_kernel_leaves_the_messages() -> None:
    """A ring's speed over attention2d is then the ratio of their bytes through the busiest card."""
    fast = replace(NODES, ranks_per_node=1, forward_flops=1e30, backward_flops=1e30, nic_latency_s=0.0, message_s=0.0)
    ring = predict(RING, 64, MHA, fast)
    grid = predict(Candidate("attention2d", (1, 8, 8), (8, 1)), 64, MHA, fast)
    assert ring.total_s == pytest.approx(6 * 63 * MHA.shard_bytes(64) / 45e9)
    assert ring.total_s / grid.total_s == pytest.approx(378 / 77, rel=0.02)


@pytest.mark.parametrize(("causal", "hides"), [(True, 1.0), (False, 0.0)])
@pytest.mark.parametrize("seq", [2**12, 2**17])
def test_the_own_chunks_hide_the_gather_and_the_return(causal: bool, hides: float, seq: int) -> None:
    """On 2x1 half of a rank's work needs not the other: forward it hides a gather, backward a return as well."""
    node = replace(NODES, intra_latency_s=0.0, message_s=0.0)
    work = replace(MHA, seq=seq, causal=causal)
    found = predict(Candidate("attention2d", (1, 2, 1), None), 2, work, node, (1,))
    flops = 4 * seq**2 * 40 * 128 / 2 / (2 if causal else 1)
    kernels = flops / 620e12, 2.5 * flops / 550e12
    shard = seq * 40 * 128 * 2 / 2
    keys = 2 * shard / 360e9  # rank 0's upper chunk sees both chunks of rank 1, under the mask too
    cut = causal and kernels[0] / 4 > 4e-4  # long enough for two calls of half of the heads, which cost 0.1 ms
    assert cut == (causal and seq == 2**17)
    gather = [
        max(0.0, keys - hides * kernel / share) for kernel, share in zip(kernels, (2, 4 if cut else 2), strict=True)
    ]
    back = max(0.0, keys - kernels[1] / 4) + 1e-4 if cut else keys
    assert found.forward_s == pytest.approx(kernels[0] + gather[0])
    assert found.backward_s == pytest.approx(kernels[1] + gather[1] + back)


def test_heads_over_all_ranks_gather_nothing() -> None:
    """Two exchanges per pass, of q, k, v and of o, or of do and of dq, dk, dv; one head group, as nothing overlaps."""
    node = replace(NODES, intra_latency_s=0.0, message_s=0.0)
    found = predict(Candidate("ulysses", (8, 1, 1), None), 8, MHA, node)
    exchanged = 4 * MHA.shard_bytes(8) * 7 / 8 / 360e9
    assert found.total_s == pytest.approx(found.kernels_s + 2 * exchanged)
    assert found.head_groups == 1


def test_head_groups_must_gain_more_than_predictions_are_good_to() -> None:
    """Hidden messages gain with each group, kernels lose: the fewest within 3% of the best are taken."""
    square = Candidate("attention2d", (1, 8, 8), None)
    for seq in (2**14, 2**16, 2**18):
        work = replace(MHA, seq=seq)
        alone = {groups: predict(square, 64, work, NODES, (groups,)).total_s for groups in (1, 2, 4, 8)}
        enough = [groups for groups, seconds in alone.items() if seconds <= 1.03 * min(alone.values())]
        found = predict(square, 64, work, NODES)
        assert (found.head_groups, found.total_s) == (enough[0], alone[enough[0]])
    assert min(alone, key=lambda groups: alone[groups]) > 1


@pytest.mark.parametrize(
    "mode",
    [
        RING,
        Candidate("attention2d", (1, 2, 4), None),
        Candidate("attention2d", (1, 2, 4), (2, 2)),
        Candidate("ulysses", (8, 1, 1), None),
    ],
)
def test_no_pass_is_shorter_than_its_starts(mode: Candidate) -> None:
    work = replace(MHA, seq=4096)
    device = predict(mode, 8, work, NODES)
    slow = predict(mode, 8, work, replace(NODES, launch_s=1e-3))
    exchange = {n: EXCHANGE_STARTS + PEER_STARTS * n for n in (1, 3, 7)}  # with so many others
    queries = exchange[3] if mode.tile is None else 2 * exchange[1]  # between nodes and within them
    starts = {
        "ring": (RING_STARTS.fixed + 8 * RING_STARTS.per_rank,) * 2,
        "attention2d": (GRID_STARTS[0] + exchange[1] + 2 * queries, GRID_STARTS[1] + 2 * exchange[1] + 2 * queries),
        "ulysses": (HEADS_STARTS[0] + 2 * exchange[7], HEADS_STARTS[1] + 2 * exchange[7]),
    }[mode.mode]
    assert [slow.forward_s, slow.backward_s] == pytest.approx([1e-3 * n for n in starts])
    assert slow.head_groups == 1
    assert slow.device_s == pytest.approx(predict(mode, 8, work, NODES, (1,)).total_s)
    fast = predict(mode, 8, work, replace(NODES, launch_s=1e-9))
    assert (fast.forward_s, fast.backward_s) == (device.forward_s, device.backward_s)


@pytest.mark.parametrize(
    ("mode", "ranks", "ms"),
    [
        *(("ring", ranks, ms) for ranks, ms in ((4, 4.9), (16, 11.3), (64, 30.0), (256, 136.0))),
        *(("all_gather", ranks, ms) for ranks, ms in ((4, 3.3), (16, 4.0), (64, 6.7), (256, 15.9))),
        *(("attention2d", axes, ms) for axes, ms in (((1, 4, 1), 3.09), ((1, 8, 8), 3.71), ((1, 64, 1), 3.80))),
        ("ulysses", (4, 1, 1), 2.40),
    ],
)
def test_starts_are_those_of_hosts(mode: str, ranks: int | tuple[int, int, int], ms: float) -> None:
    """Milliseconds of the host's part of a call, both passes (docs/planner.md), at 0.38 ms per launch."""
    axes = ranks if isinstance(ranks, tuple) else None if mode == "ring" else (1, ranks, 1)
    count = ranks if isinstance(ranks, int) else prod(ranks)
    assert 0.38 * sum(launches(Candidate(mode, axes, None), count, 1)) == pytest.approx(ms, rel=0.16)


def test_a_mode_ends_where_more_ranks_no_longer_pay() -> None:
    """13B, a million tokens, tensor 2: a ring's bytes stay, a grid's shrink; thousands of steps wait for the host."""
    run = load_run("configs/runs/gpt3_13b_1m.yaml", ["parallelism.tensor=2", "context_parallel.size=64"])
    found = growth.growth(run)
    ends = {mode: None if (at := growth.end(line)) is None else growth.RANKS[at] for mode, line in found.items()}
    assert ends == {"ring": 64, "all_gather": 64, "R x C": None, "U x R x C": None}
    assert growth.bound(found["ring"][3]) == "messages"
    assert growth.bound(found["ring"][-1]) == "host"
    assert found["R x C"][-1].nic_bytes < found["R x C"][0].nic_bytes / 5
    assert "ring: ends at 64 ranks" in growth.table(found, run)


def test_long_sequences_a_rank_hide_a_rings_messages() -> None:
    long = replace(MHA, seq=2**22)
    one_node = plan(8, long, NODES)
    assert "Take the ring" in verdict(one_node)


def test_few_key_heads_make_gathering_them_the_best() -> None:
    one_head = Workload(seq=65536, heads=16, kv_heads=1, head_dim=128)
    narrow = replace(NODES, ranks_per_node=1)
    found = {
        p.candidate.label: p.total_s
        for p in plan(16, one_head, narrow)
        if p.candidate.axes and p.candidate.axes[0] == 1
    }
    assert min(found, key=lambda label: found[label]) in ("all_gather", "attention2d 16x1", "attention2d 8x2")


def test_where_latency_decides_the_fewest_phases_win() -> None:
    """Seven heads divide by no rank; a ring waits once per step, a gather of all keys once per pass."""
    far = replace(NODES, ranks_per_node=1, nic_latency_s=200e-6)
    found = plan(8, Workload(seq=8192, heads=7, kv_heads=1, head_dim=128), far)
    assert found[0].candidate.axes == (1, 8, 1)
    assert "Take attention2d 8x1" in verdict(found)


@pytest.mark.parametrize(("ranks", "heads", "kv_heads", "axes"), [(8, 8, 4, (8, 1, 1)), (16, 16, 8, (16, 1, 1))])
def test_key_heads_are_repeated_where_that_pays(
    ranks: int, heads: int, kv_heads: int, axes: tuple[int, int, int]
) -> None:
    """Heads over more ranks than there are key heads, over slow links, one rank per node."""
    slow = replace(NODES, ranks_per_node=1, nic_bytes_per_s=1e9, rank_nic_bytes_per_s=1e9)
    found = plan(ranks, Workload(seq=32768, heads=heads, kv_heads=kv_heads, head_dim=128), slow)
    assert found[0].candidate.axes == axes


def test_repeated_key_heads_take_memory() -> None:
    """On 8 x 2 x 1 ranks, one of the repeated heads per rank instead of a quarter."""
    work = Workload(seq=32768, heads=8, kv_heads=2, head_dim=128)
    shard = work.shard_bytes(16)
    keys_of_the_other, dq_and_own, in_fp32, spread = 4, 1 + 3, 2, 8
    known = (keys_of_the_other + dq_and_own + in_fp32 + spread) * shard
    assert transient_bytes(Candidate("attention2d", (8, 2, 1), None), 16, work, 1) == known


def test_a_column_on_two_nodes_crosses_the_network_once_a_node() -> None:
    """16 x 4 on 8-GPU nodes: tiles of 8 x 1 are the order without tiles, but carry chunks within the node."""
    tiles = {c.tile for c in candidates(64, 8, 8, 8) if c.axes == (1, 16, 4)}
    assert tiles == {None, (8, 1), (4, 2), (2, 4)}
    direct, carried = (
        predict(Candidate("attention2d", (1, 16, 4), tile), 64, MHA, NODES).nic_bytes for tile in (None, (8, 1))
    )
    assert carried < 0.7 * direct


def test_small_messages_over_slow_links_want_the_grid() -> None:
    choice = best(64, MHA)
    assert choice.mode == "attention2d"
    assert "Take attention2d" in verdict(plan(64, MHA, NODES))


def test_candidates_hold_every_mode_once() -> None:
    found = list(candidates(8, 8, 4, 4))
    assert len(found) == len(set(found))
    assert {c.mode for c in found} == {"ring", "all_gather", "ulysses", "attention2d"}
    assert {c.axes for c in found if c.axes} == {
        (u, r, 8 // u // r) for u in (1, 2, 4, 8) for r in (1, 2, 4, 8) if 8 % (u * r) == 0
    }


def test_heads_that_dont_divide_are_no_candidates() -> None:
    assert {c.axes[0] for c in candidates(8, 6, 6, 8) if c.axes} == {1, 2}


def test_a_tile_of_rows_wins_where_keys_are_cheap() -> None:
    """16 x 4 on 8-GPU nodes with 8 query heads a key head: rows within a node beat columns within it."""
    work = Workload(seq=65536, heads=8, kv_heads=1, head_dim=128)
    columns, rows = (predict(Candidate("attention2d", (1, 16, 4), tile), 64, work, NODES) for tile in ((16, 1), (2, 4)))
    assert rows.nic_bytes < 0.6 * columns.nic_bytes
    assert rows.total_s < columns.total_s


RUN = "configs/runs/gpt3_175b_32k.yaml"


def test_the_command_prints_a_table_and_draws(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", RUN, "-o", str(tmp_path / "plan.png"), "--growth", str(tmp_path / "growth.png")]) == 0
    printed = capsys.readouterr().out
    for word in ("ring", "all_gather", "attention2d", "NIC", "Take "):
        assert word in printed
    assert "R x C: " in printed
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert (tmp_path / "growth.png").stat().st_size > 10_000


ON_GPUS = [path for path in sorted(Path("configs/runs").glob("*.yaml")) if "clusters/cpu.yaml" not in path.read_text()]


@pytest.mark.parametrize("path", ON_GPUS, ids=lambda path: path.stem)
def test_a_shipped_run_of_attention2d_is_one_where_it_wins(path: Path) -> None:
    run = load_run(path)
    found = with_recomputation(predictions(run.context_parallel.size, workload(run), cluster(run)), run)
    told_otherwise = "a ring hides" in path.read_text()
    assert (found[0].candidate.stock or "Take the ring" in verdict(found)) == told_otherwise


def test_full_recomputation_counts_the_forward_pass_again_unless_it_is_kept() -> None:
    overrides = "training.recompute_granularity=full training.recompute_method=uniform training.recompute_num_layers=1"
    plain = load_run(RUN, overrides.split())
    kept = load_run(RUN, [*overrides.split(), "training.keep_attention_outputs=true"])
    found = predictions(16, workload(plain), cluster(plain))
    once = {p.candidate: p.total_s for p in found}
    twice = {p.candidate: p.total_s + p.forward_s for p in found}
    for run, of_grids in ((plain, twice), (kept, once)):
        counted = with_recomputation(found, run)
        assert {p.candidate: p.total_s for p in counted} == pytest.approx(
            {candidate: (twice if candidate.stock else of_grids)[candidate] for candidate in once}
        )
        assert [p.total_s for p in counted] == sorted(p.total_s for p in counted)


def test_auto_takes_the_planners_choice() -> None:
    run = load_run(RUN, ["context_parallel.grid=auto"])
    assert run.grid[0] * run.grid[1] * run.grid[2] == run.context_parallel.size
    saved = yaml.safe_load(resolved_yaml(run))["context_parallel"]
    assert saved["grid"] == list(run.grid if run.grid[0] > 1 else run.grid[1:]), "the YAML names the grid that trains"
    tile = None if run.tile == (run.grid[1], 1) else list(run.tile)
    assert (saved["tile"], saved["head_groups"]) == (tile, run.head_groups)
    without = load_run(RUN, ["context_parallel.grid=auto", "cluster.nic_gb_per_s=null"])
    assert without.grid == (1, 4, 4)


@pytest.mark.parametrize("tile", [(1, 8), (8, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("described", [True, False])
def test_auto_takes_a_grid_that_the_given_tile_fills(tile: tuple[int, int], described: bool) -> None:
    overrides = [f"context_parallel.tile={list(tile)}", "context_parallel.grid=auto"]
    run = load_run(RUN, [*overrides, *([] if described else ["cluster.nic_gb_per_s=null"])])
    _, rows, cols = run.grid
    assert run.tile == tile
    assert rows % tile[0] == cols % tile[1] == 0


def test_latent_attention_has_keys_for_every_head() -> None:
    run = load_run(RUN, ["megatron_args.multi_latent_attention=true", "megatron_args.v_head_dim=64"])
    assert run.model.num_query_groups != run.model.num_attention_heads
    work = workload(run)
    assert work.kv_heads == work.heads
    assert work.head_dim == (128 + 64 + 64) // 2
    grouped = ["model.num_query_groups=8", "context_parallel.grid=auto", "cluster.nic_gb_per_s=null"]
    assert load_run(RUN, grouped).grid == (1, 16, 1)
    assert load_run(RUN, [*grouped, "megatron_args.multi_latent_attention=true"]).grid == (1, 4, 4)


def test_what_a_plan_leaves_out_is_said() -> None:
    said = "megatron_args.window_size is not counted"
    assert said not in report(load_run(RUN))
    assert said in report(load_run(RUN, ["megatron_args.window_size=[512, 0]"]))


def test_a_plan_without_a_cluster_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "configs/runs/quickstart.yaml"]) == 2
    assert "the planner needs it; extend one of configs/clusters" in capsys.readouterr().err
